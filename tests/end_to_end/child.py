"""The launcher as a process of its own, that may be killed.

Processes are forked from one that has imported everything: a start costs the
start alone.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import pathlib
import sys
import time

from launch import train as launcher

DEADLINE = 300.0  # seconds, of one start; a loaded machine is slow
TIMES = ("samples_per_second", "data_wait", "mfu")


def run(argv: list[str], output: str) -> None:
  """What the child does; its output goes to a file."""
  file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
  os.dup2(file, 1)
  os.dup2(file, 2)
  sys.exit(launcher.main(argv))


@dataclasses.dataclass(frozen=True)
class Child:
  """One start of the launcher on a work dir."""

  process: multiprocessing.Process
  output: pathlib.Path
  log: pathlib.Path
  seen: int  # characters of the log that earlier starts wrote

  def wait_for_line(self, text: str) -> None:
    """Returns once this start has logged `text`."""
    end = time.monotonic() + DEADLINE
    while not self.log.is_file() or (
      text not in self.log.read_text()[self.seen :]
    ):
      self.check(end)
      time.sleep(0.002)

  def check(self, end: float) -> None:
    """Fails when the process has ended or the time is over."""
    assert self.process.is_alive(), self.output.read_text()
    assert time.monotonic() < end

  def kill(self) -> None:
    """Ends it as a power cut would."""
    self.process.kill()
    self.process.join()
    assert self.process.exitcode == -9

  def finish(self, *, code: int = 0) -> str:
    """Waits for the end; returns all that starts on this work dir said."""
    self.process.join(DEADLINE)
    assert self.process.exitcode == code, self.output.read_text()
    return self.output.read_text()


class Starter:
  """Starts children."""

  def __init__(self) -> None:
    self._context = multiprocessing.get_context("forkserver")
    self._context.set_forkserver_preload([__name__])

  def __call__(
    self, argv: list[str], workdir: pathlib.Path, *, number: int = 0
  ) -> Child:
    """Starts `argv`, which trains in `workdir` as that process of several."""
    log = workdir / f"log-{number}.txt"
    output = workdir.with_name(f"{workdir.name}.out{number or ''}")
    process = self._context.Process(
      target=run, args=(argv, str(output)), daemon=True
    )
    seen = len(log.read_text()) if log.is_file() else 0
    process.start()
    return Child(process, output, log, seen)


def read_metrics(workdir: pathlib.Path) -> list[dict]:
  """All that training itself wrote, without speeds and validation."""
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [
    {
      key: value
      for key, value in json.loads(line).items()
      if key not in TIMES and not key.startswith("eval/")
    }
    for line in lines
  ]
