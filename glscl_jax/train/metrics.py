"""What a run says: metrics.jsonl, TensorBoard, W&B, log and progress line.

`train/loop.py` owns one `RunLog` (for people) and one `MetricWriter` (for
programs). Only the first process writes metrics and speaks on the terminal;
each process keeps its own log-HOST.txt.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import importlib.util
import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TextIO

import jax
import jax.numpy as jnp
import tensorboardX

from glscl_jax import atomic
from glscl_jax import config as config_lib
from glscl_jax.train import hardware


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peak:
  """What MFU is a share of."""

  flops: float | None  # FLOP/s of all devices together; None: not known
  source: str  # said in the log


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
  """One moment of a run, as the progress line shows it."""

  step: int
  num_steps: int
  loss: float
  samples_per_second: float
  seconds_left: float
  mfu: float | None  # share of the peak, or None where no peak is known
  data_wait: float  # share of the training time spent waiting for batches


class RunLog:
  """Lines for people: to log-HOST.txt, and from process 0 to a stream.

  On a terminal the progress line is rewritten in place; elsewhere every
  logged step has a line, so that a log file shows the whole run.
  """

  def __init__(
    self,
    workdir: pathlib.Path,
    *,
    process_index: int = 0,
    stream: TextIO | None = None,
  ):
    self._file = open(  # noqa: SIM115 (closed by close)
      workdir / f"log-{process_index}.txt", "a", encoding="utf-8", buffering=1
    )
    stream = sys.stdout if stream is None else stream
    self._stream = stream if process_index == 0 else None
    self._terminal = self._stream is not None and self._stream.isatty()
    self._line_open = False

  def info(self, text: str) -> None:
    """Writes lines to the file and the stream."""
    stamp = datetime.datetime.now().strftime("%Y-%m-%d %H:%M:%S")
    for line in text.splitlines():
      self._file.write(f"{stamp} {line}\n")
    self._end_progress()
    self._say(f"{text}\n")

  def warning(self, text: str) -> None:
    """As info, marked."""
    self.info(f"warning: {text}")

  def progress(self, text: str, *, logged: bool) -> None:
    """Shows a progress line; only those of logged steps reach files."""
    if logged:
      stamp = datetime.datetime.now().strftime("%Y-%m-%d %H:%M:%S")
      self._file.write(f"{stamp} {text}\n")
    if self._terminal:
      self._say(f"\r{text}\x1b[K")
      self._line_open = True
    elif logged:
      self._say(f"{text}\n")

  def close(self) -> None:
    """Ends an open progress line and closes the file."""
    self._end_progress()
    self._file.close()

  def _end_progress(self) -> None:
    if self._line_open:
      self._say("\n")
      self._line_open = False

  def _say(self, text: str) -> None:
    if self._stream is not None:
      self._stream.write(text)
      self._stream.flush()


class MetricWriter:
  """Scalars by step: metrics.jsonl, TensorBoard files and, if asked, W&B.

  Args:
    workdir: holds the files.
    config: the run's; `train.wandb` asks for W&B.
    start_step: the step restored, 0 for a new run. What an interrupted run
      wrote beyond it is dropped, so no step occurs twice.
    process_index: all but the first process write nothing.
  """

  def __init__(
    self,
    workdir: pathlib.Path,
    *,
    config: config_lib.Config,
    start_step: int,
    process_index: int = 0,
  ):
    self._file = self._board = self._wandb = None
    if process_index != 0:
      return
    if config.train.wandb:
      self._wandb = _start_wandb(workdir, config)
    path = workdir / "metrics.jsonl"
    drop_after(path, start_step)
    self._file = open(  # noqa: SIM115 (closed by close)
      path, "a", encoding="utf-8", buffering=1
    )
    self._board = tensorboardX.SummaryWriter(
      str(workdir), purge_step=start_step + 1, flush_secs=30
    )

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Writes one line; a value that is not finite becomes null."""
    if self._file is None:
      return
    numbers = {name: float(value) for name, value in values.items()}
    self._file.write(
      json.dumps(
        {
          "step": step,
          **{k: v if math.isfinite(v) else None for k, v in numbers.items()},
        }
      )
      + "\n"
    )
    for name, value in numbers.items():
      self._board.add_scalar(name, value, step)
    if self._wandb is not None:
      self._wandb.log(numbers, step=step)

  def close(self) -> None:
    """Flushes and closes everything."""
    if self._file is None:
      return
    self._file.close()
    self._board.close()
    if self._wandb is not None:
      self._wandb.finish()


class Clock:
  """Adds up wall time by purpose; the summary and the shares come from it."""

  def __init__(self, now: Callable[[], float] = time.perf_counter):
    self._now = now
    self._start = now()
    self.seconds: dict[str, float] = {}

  @contextlib.contextmanager
  def __call__(self, purpose: str) -> Iterator[None]:
    """Counts the time of a with block for `purpose`."""
    start = self._now()
    try:
      yield
    finally:
      spent = self.total(purpose) + self._now() - start
      self.seconds[purpose] = spent

  def total(self, purpose: str) -> float:
    """Seconds so far, 0 for a purpose not met yet."""
    return self.seconds[purpose] if purpose in self.seconds else 0.0

  def elapsed(self) -> float:
    """Seconds since this clock was made."""
    return self._now() - self._start


def format_progress(progress: Progress) -> str:
  """One dense line: where the run is, when it ends, how well it runs."""
  mfu = "" if progress.mfu is None else f" | MFU {100 * progress.mfu:.1f}%"
  return (
    f"step {progress.step}/{progress.num_steps} "
    f"{100 * progress.step // progress.num_steps}% | "
    f"eta {format_duration(progress.seconds_left)} | "
    f"loss {progress.loss:.4f} | "
    f"{progress.samples_per_second:.1f} samples/s{mfu} | "
    f"data wait {100 * progress.data_wait:.1f}%"
  )


def format_duration(seconds: float) -> str:
  """Writes 75 as 1:15, 4000 as 1:06:40 and 200000 as 2d 7:33:20."""
  minutes, second = divmod(max(0, round(seconds)), 60)
  hours, minute = divmod(minutes, 60)
  days, hour = divmod(hours, 24)
  if days:
    return f"{days}d {hour}:{minute:02}:{second:02}"
  if hours:
    return f"{hour}:{minute:02}:{second:02}"
  return f"{minute}:{second:02}"


def drop_after(path: pathlib.Path, step: int) -> int:
  """Removes the lines of later steps, and a last line cut by a kill.

  Args:
    path: a metrics.jsonl; may be missing.
    step: the last one to keep.

  Returns:
    The number of lines removed.
  """
  if not path.is_file():
    return 0
  lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
  kept = [line for line in lines if _step_of(line) <= step]
  if len(kept) != len(lines):
    atomic.write_text(path, "".join(kept))
  return len(lines) - len(kept)


def _step_of(line: str) -> float:
  """The step of a whole line; infinity where the line is not whole."""
  try:
    return json.loads(line)["step"] if line.endswith("\n") else math.inf
  except (ValueError, KeyError, TypeError):
    return math.inf


def find_peak(devices: list[jax.Device], *, compute_dtype: str) -> Peak:
  """The FLOP/s that MFU is measured against, for all devices together.

  Accelerators: the maker's dense bf16 figure. CPU: a square matmul in
  `compute_dtype`, timed here and now (about 0.3 s), because no figure holds
  for every machine; forced host devices share that one machine.
  """
  device = devices[0]
  if device.platform == "cpu":
    rate = measure_matmul(compute_dtype)
    return Peak(
      flops=rate,
      source=(
        f"a {compute_dtype} matmul on this machine, measured at start: "
        f"{rate / 1e9:.0f} GFLOP/s"
      ),
    )
  chip = hardware.find(device.device_kind)
  if chip is None:
    return Peak(
      flops=None, source=f"no peak known for {device.device_kind}: no MFU"
    )
  return Peak(
    flops=chip.flops * len(devices),
    source=(
      f"{chip.flops / 1e12:.0f} TFLOP/s dense bf16 (data sheet) x "
      f"{len(devices)} {device.device_kind}"
    ),
  )


def measure_matmul(compute_dtype: str) -> float:
  """Best FLOP/s of a few square products with float32 results, one device."""
  size = 1024 if jax.default_backend() == "cpu" else 8192
  a_AA = jax.random.normal(jax.random.key(0), (size, size), compute_dtype)
  multiply = jax.jit(
    lambda a_AA: jnp.matmul(a_AA, a_AA, preferred_element_type=jnp.float32)
  )
  multiply(a_AA).block_until_ready()
  best, end = math.inf, time.perf_counter() + 0.25
  while time.perf_counter() < end:
    start = time.perf_counter()
    multiply(a_AA).block_until_ready()
    best = min(best, time.perf_counter() - start)
  return 2 * size**3 / best


def check_wandb(config: config_lib.Config) -> None:
  """Raises ConfigError when W&B is asked for and not installed."""
  if config.train.wandb and importlib.util.find_spec("wandb") is None:
    raise config_lib.ConfigError(
      "config.train.wandb: the wandb package is not installed; "
      "pip install wandb, or set --config.train.wandb=False"
    )


def _start_wandb(workdir: pathlib.Path, config: config_lib.Config) -> Any:
  """Starts or continues the W&B run whose id is kept in the work dir."""
  check_wandb(config)
  import wandb  # an optional package

  path = workdir / "wandb_id.txt"
  if not path.is_file():
    atomic.write_text(path, os.urandom(8).hex() + "\n")
  return wandb.init(
    project="glscl_jax",
    name=workdir.name,
    id=path.read_text(encoding="utf-8").strip(),
    resume="allow",
    dir=str(workdir),
    config=json.loads(config_lib.to_json(config)),
  )


def peak_rss_mib() -> float:
  """The most memory that this process has held so far, on Linux."""
  # Not getrusage, which tells a new process the peak of the one it came from.
  status = pathlib.Path("/proc/self/status").read_text()
  (line,) = (x for x in status.splitlines() if x.startswith("VmHWM:"))
  return int(line.split()[1]) / 1024
