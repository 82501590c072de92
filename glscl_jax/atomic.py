"""Files and folders that are replaced whole, or not at all."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
from collections.abc import Iterator


def write_text(path: pathlib.Path, text: str) -> None:
  """Replaces a file so that a kill leaves the old one or the new one."""
  scratch = path.with_name(f"{path.name}.tmp")
  with open(scratch, "w", encoding="utf-8") as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  os.replace(scratch, path)


@contextlib.contextmanager
def new_folder(target: pathlib.Path) -> Iterator[pathlib.Path]:
  """A path at which to make the folder that then takes `target`'s place.

  Its parent is there and holds nothing else: room for what is needed on the
  way. An error, or a kill before the end, leaves `target` as it was; only
  between two renames, at the end, it is missing. What a killed process left
  beside it is cleared.
  """
  target = target.absolute()
  target.parent.mkdir(parents=True, exist_ok=True)
  scratch = target.with_name(f"{target.name}.tmp-{os.getpid()}")
  for stale in target.parent.glob(f"{target.name}.tmp-*"):
    # Numbers come again: in a container each start may be process 1.
    if stale == scratch or not _is_running(stale.name.rpartition("-")[2]):
      shutil.rmtree(stale, ignore_errors=True)
  scratch.mkdir()
  try:
    whole = scratch / "whole"
    yield whole
    if target.exists():
      target.rename(scratch / "old")
    whole.rename(target)
  finally:
    shutil.rmtree(scratch, ignore_errors=True)


def _is_running(pid: str) -> bool:
  try:
    os.kill(int(pid), 0)
  except (ValueError, ProcessLookupError):
    return False
  except PermissionError:
    return True
  return True
