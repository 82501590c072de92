"""Reads pairs listed in a JSON Lines file; bad lines are counted and named.

A line is {"image": path, "caption": str or list, "id": .., "split": ..}; `id`
and `split` may be absent. Images keep the bytes of their files; where regions
stand for them, `image` is the id by which `region_files.py` knows the image.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import difflib
import functools
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from glscl_jax.data import pairs, progress, transforms


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Line:
  """One line that parsed; its image has not been looked at."""

  number: int  # from 1
  id: str
  split: str
  image: str  # path or id as written
  captions: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reject:
  """One line that cannot be used."""

  line: int  # from 1
  id: str  # or the image's path, or empty
  reason: str


_CHUNK = 256  # images in memory at a time

# "all" is a word of tensorflow-datasets' own split language.
_SPLIT = re.compile(r"(?!all$)[a-zA-Z]\w*", re.ASCII)


class _BadLine(ValueError):
  pass


def read_lines(
  path: pathlib.Path, *, split: str = "train", by_id: bool = False
) -> tuple[list[Line], list[Reject], int]:
  """Parses the file; returns good lines, rejects and the number of lines.

  Empty lines do not count.

  Args:
    path: the file.
    split: of lines that name none.
    by_id: images are named by an id, which may be a number, not by a path.

  Raises:
    DataError: the file cannot be read or holds no line.
  """
  lines, rejects, ids = [], [], set()
  num_lines = 0
  try:
    # Files from Windows begin with a byte order mark.
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
      for number, text in enumerate(file, start=1):
        if not text.strip():
          continue
        num_lines += 1
        try:
          line = _parse(text, number, split, by_id)
          if line.id in ids:
            raise _BadLine(f"id {line.id!r} was used on an earlier line")
        except _BadLine as error:
          rejects.append(Reject(line=number, id="", reason=str(error)))
          continue
        ids.add(line.id)
        lines.append(line)
  except OSError as error:
    raise pairs.DataError(
      f"{path}: cannot be read ({error.strerror}); --input names the JSON "
      "Lines file"
    ) from error
  if num_lines == 0:
    raise pairs.DataError(f"{path}: the file is empty")
  return lines, rejects, num_lines


def _parse(text: str, number: int, split: str, by_id: bool) -> Line:
  if not text.isascii() and any("\udc80" <= c <= "\udcff" for c in text):
    raise _BadLine("not valid UTF-8")
  try:
    row = json.loads(text)
  except ValueError as error:
    raise _BadLine(f"not valid JSON: {error}") from error
  if not isinstance(row, dict):
    raise _BadLine(f"expected an object, got {type(row).__name__}")
  for key in ("image", "caption"):
    if key not in row:
      raise _BadLine(f"no key {key!r}; it has {sorted(row)}")
  image = _text_of_number(row["image"]) if by_id else row["image"]
  if not isinstance(image, str) or not image:
    kind = "an id" if by_id else "a path"
    raise _BadLine(f"image: expected {kind}, got {row['image']!r}")
  if "split" not in row:
    # A test pair that is trained on by mistake is noticed by nobody.
    for key in row:
      if difflib.get_close_matches(key.lower(), ["split"], cutoff=0.75):
        raise _BadLine(f"key {key!r} is not read: did you mean 'split'?")
  chosen = row["split"] if "split" in row else split
  if not isinstance(chosen, str) or not _SPLIT.fullmatch(chosen):
    raise _BadLine(f"split: expected a name like 'train', got {chosen!r}")
  identity = _text_of_number(row["id"]) if "id" in row else f"line-{number}"
  if not isinstance(identity, str) or not identity:
    raise _BadLine(f"id: expected a string, got {identity!r}")
  return Line(
    number=number,
    id=identity,
    split=chosen,
    image=image,
    captions=_parse_captions(row["caption"]),
  )


def _text_of_number(value: Any) -> Any:
  whole = isinstance(value, int) and not isinstance(value, bool)
  return str(value) if whole else value


def _parse_captions(value: Any) -> tuple[str, ...]:
  values = [value] if isinstance(value, str) else value
  if not isinstance(values, list) or not all(
    isinstance(text, str) for text in values
  ):
    raise _BadLine("caption: expected a string or a list of strings")
  captions = tuple(text.strip() for text in values)
  if not captions or not all(captions):
    raise _BadLine("caption: empty")
  return captions


def fingerprint(lines: Sequence[Line], root: pathlib.Path) -> str:
  """A hash of the names, sizes and times of all image files."""
  total = hashlib.sha256()
  for line in lines:
    try:
      stat = (root / line.image).stat()
      seen = f"{line.image}\0{stat.st_size}\0{stat.st_mtime_ns}\n"
    except OSError:
      seen = f"{line.image}\0missing\n"
    total.update(seen.encode("utf-8", "surrogateescape"))
  return total.hexdigest()


def read_records(
  lines: Sequence[Line],
  root: pathlib.Path,
  *,
  split: str,
  rejects: list[Reject],
) -> Iterator[pairs.Record]:
  """Yields the pairs of one split; appends the unreadable ones to `rejects`."""
  chosen = [line for line in lines if line.split == split]
  read = functools.partial(_read_image, root)
  images = _map_threads(read, chosen)
  bar = progress.bar(images, name=f"read {split}", total=len(chosen))
  for line, (image, reason) in zip(chosen, bar, strict=True):
    if reason:
      rejects.append(Reject(line=line.number, id=line.id, reason=reason))
      continue
    yield pairs.Record(
      id=line.id, split=split, image=image, captions=line.captions
    )


def _read_image(root: pathlib.Path, line: Line) -> tuple[bytes, str]:
  """The file's bytes, or why they cannot be used; decodes the whole image."""
  path = root / line.image
  try:
    data = path.read_bytes()
    transforms.decode(data)
  except (OSError, ValueError) as error:
    return b"", f"image {path}: {error}"
  return data, ""


def _map_threads(
  function: Callable[[Line], tuple[bytes, str]], lines: Sequence[Line]
) -> Iterator[tuple[bytes, str]]:
  """Maps in order, a few images ahead; decoding leaves Python's lock."""
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    for start in range(0, len(lines), _CHUNK):
      yield from pool.map(function, lines[start : start + _CHUNK])


def check_rejects(
  path: pathlib.Path,
  rejects: Sequence[Reject],
  *,
  num_lines: int,
  max_share: float,
) -> None:
  """Raises DataError, with the first reasons, when too many were rejected."""
  if len(rejects) <= max_share * num_lines:
    return
  first = "\n".join(f"  line {r.line}: {r.reason}" for r in rejects[:10])
  raise pairs.DataError(
    f"{path}: {len(rejects)} of {num_lines} lines rejected, more than "
    f"--max_reject_share={max_share}. The first:\n{first}"
  )
