"""Errors that a user can mend, and the check that output has a place."""

from __future__ import annotations

import os
import pathlib


class UserError(ValueError):
  """What is wrong and what to change; a command ends with it and code 2."""


def check_writable(folder: str | os.PathLike[str], *, option: str) -> None:
  """Checks, touching no file, that files could be written into a folder.

  Commands call it before they work, so that no work is lost.

  Args:
    folder: may be missing, then its nearest parent counts.
    option: what the user gave, such as "--output=DIR"; begins the message.

  Raises:
    UserError: naming what stands in the way.
  """
  path = pathlib.Path(folder).absolute()
  there = next(p for p in (path, *path.parents) if os.path.lexists(p))
  if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
    raise UserError(f"{option}: {there} is not a folder that can be written")


def check_replaceable(folder: str | os.PathLike[str], *, option: str) -> None:
  """As `check_writable`, for a folder that is made beside and then renamed."""
  for place in (pathlib.Path(folder).absolute().parent, folder):
    check_writable(place, option=option)


def check_file(path: str | os.PathLike[str], *, option: str) -> None:
  """As `check_writable`, for one file."""
  if os.path.isdir(path):
    raise UserError(f"{option} is a folder: name a file in it")
  check_writable(pathlib.Path(path).absolute().parent, option=option)
