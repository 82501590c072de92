"""Progress with the time left, on a terminal and off it."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

import tqdm

T = TypeVar("T")


def bar(
  items: Iterable[T], *, name: str, total: int | None = None
) -> Iterator[T]:
  """Passes `items` through; off a terminal a line every ten seconds."""
  live = sys.stderr.isatty()
  return iter(
    tqdm.tqdm(
      items,
      desc=name,
      total=total,
      mininterval=0.1 if live else 10.0,
      ascii=not live,
      ncols=None if live else 72,
      # One line each, so that a log file stays readable.
      file=sys.stderr if live else _LineFile(),
    )
  )


class _LineFile:
  """Turns the carriage returns of tqdm into lines."""

  def write(self, text: str) -> None:
    line = text.strip("\r\n")
    if line.strip():
      sys.stderr.write(line + "\n")

  def flush(self) -> None:
    sys.stderr.flush()
