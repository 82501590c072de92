"""What a run tells while it trains: progress, metrics, a profile, the summary.

The loop decides when; here is what is fetched, worked out and written. Files
and streams are those of `train/metrics.py`.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import pathlib
import signal
from collections.abc import Mapping
from typing import Any

import jax

from glscl_jax import config as config_lib
from glscl_jax import errors
from glscl_jax.systems import registry
from glscl_jax.train import checkpoint, metrics

LINE_SECONDS = 60.0  # off a terminal a line at least this often
WINDOW = 10  # steps that a speed is the mean of, at least
PROFILE_AFTER = 10  # steps of this process before the trace starts


class TrainError(errors.UserError):
  """Training cannot go on; the message says what to change."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
  """How a call of `loop.train` ended."""

  step: int  # updates done in all
  metrics: dict[str, float]  # of the last step, and of the last validation
  seconds: dict[str, float]  # by purpose; "train" is what is left
  stopped_by: int | None = None  # number of the signal that ended it early


class Journal:
  """Turns device scalars into lines, one step late.

  Args:
    config: the run's.
    workdir: the run's, for advice.
    checkpointer: the run's, for advice.
    writer: for programs.
    log: for people.
    clock: counts the purposes data, compile, eval and save.
  """

  def __init__(
    self,
    config: config_lib.Config,
    *,
    workdir: pathlib.Path,
    checkpointer: checkpoint.Checkpointer,
    writer: metrics.MetricWriter,
    log: metrics.RunLog,
    clock: metrics.Clock,
  ):
    self.last: dict[str, float] = {}
    self._config = config
    self._workdir = workdir
    self._checkpointer = checkpointer
    self._writer = writer
    self._log = log
    self._clock = clock
    self._pending: tuple[int, Mapping[str, jax.Array]] | None = None
    self._extra: dict[str, float] = {}
    self._means = Means()
    self._speed: Speed | None = None
    self._last_line = 0.0

  def start(
    self,
    step: int,
    compiled: jax.stages.Compiled,
    mesh: jax.sharding.Mesh,
    *,
    length: int,
    seconds: float,
  ) -> None:
    """Called when a step is compiled and about to run.

    The first call of a run starts the clock that speeds are taken from.

    Args:
      step: updates done.
      compiled: the step of texts of `length` tokens.
      mesh: that it runs on.
      length: as above.
      seconds: that compiling it took.
    """
    if self._speed is None:
      peak = metrics.find_peak(
        list(mesh.devices.flat),
        compute_dtype=self._config.model.compute_dtype,
      )
      self._speed = Speed(self._config, self._clock, peak, step=step)
    several = self._config.data.text_lengths
    self._log.info(
      f"step{f' of {length} tokens' if several else ''} compiled in "
      f"{seconds:.1f} s, a device: {format_memory(compiled)}; "
      f"{self._speed.flops_per_sample(length) / 1e9:.3f} GFLOP a sample; MFU "
      f"against {self._speed.peak.source}"
    )

  def add(
    self, step: int, values: Mapping[str, jax.Array], *, length: int
  ) -> None:
    """Takes the scalars of a dispatched step, writes those of the one before.

    Args:
      step: its number.
      values: its scalars.
      length: tokens of its texts, with padding.

    Raises:
      TrainError: too many steps had a non-finite loss or gradient.
    """
    self.flush()
    self._speed.count(length)
    self._pending = (step, values)

  def attach(self, extra: Mapping[str, float]) -> None:
    """Adds a validation's values to the line of the pending step."""
    self._extra = dict(extra)

  def flush(self) -> None:
    """Fetches and writes what is pending; raises as `add`."""
    if self._pending is None:
      return
    step, values = self._pending
    self._pending = None
    numbers = self._means.add(
      {k: float(v) for k, v in jax.device_get(dict(values)).items()}
    )
    self.last = numbers
    train = self._config.train
    logged = step in (1, train.num_steps) or step % train.log_every == 0
    now = self._speed.measure(step, numbers["loss"])
    self._show(now, logged)
    if logged or self._extra:
      self._write(now, numbers)
      self._means.forget()
    if self._extra:
      self._log.info(format_scores(step, self._extra))
      self._extra = {}
    self._check_finite(step, numbers)

  def _show(self, now: metrics.Progress, logged: bool) -> None:
    elapsed = self._clock.elapsed()
    logged = logged or elapsed - self._last_line > LINE_SECONDS
    self._log.progress(metrics.format_progress(now), logged=logged)
    if logged:
      self._last_line = elapsed

  def _write(self, now: metrics.Progress, numbers: Mapping[str, float]) -> None:
    mfu = {} if now.mfu is None else {"mfu": now.mfu}
    self._writer.write(
      now.step,
      {
        **numbers,
        **self._extra,
        "samples_per_second": now.samples_per_second,
        "data_wait": now.data_wait,
        **mfu,
      },
    )
    self._speed.mark(now.step)

  def _check_finite(self, step: int, numbers: Mapping[str, float]) -> None:
    limit = self._config.optimizer.max_skips
    if numbers["num_skipped"] >= limit:
      raise TrainError(
        f"step {step}: {numbers['num_skipped']:.0f} steps had a loss or "
        "gradient that is not finite and were skipped "
        f"(optimizer.max_skips = {limit}). "
        + format_advice(self._workdir, self._checkpointer.latest_step)
      )


class Means:
  """Scalars that only some steps have, as means over those since a line.

  A step that draws one of several objectives gives NaN for what the others
  would log. All other scalars are those of the step. After a start the first
  line knows the steps of this process alone.
  """

  def __init__(self) -> None:
    self._partial: set[str] = set()  # names some step did not have
    self._values: dict[str, list[float]] = {}

  def add(self, numbers: Mapping[str, float]) -> dict[str, float]:
    """What a line says after this step."""
    if not all(math.isfinite(numbers[name]) for name in ("loss", "grad_norm")):
      # NaN may stand for what went wrong: all of it stays visible.
      return dict(numbers)
    there = {k: v for k, v in numbers.items() if not math.isnan(v)}
    self._partial |= numbers.keys() - there.keys()
    for name, value in there.items():
      self._values.setdefault(name, []).append(value)
    means = {
      name: sum(values) / len(values)
      for name, values in self._values.items()
      if name in self._partial
    }
    return there | means

  def forget(self) -> None:
    """Called after a line."""
    self._values = {}


class Speed:
  """How fast the last steps were and when the run will end.

  Args:
    config: the run's.
    clock: the run's.
    peak: what MFU is a share of.
    step: updates done when this is made, just before the next one.
  """

  def __init__(
    self,
    config: config_lib.Config,
    clock: metrics.Clock,
    peak: metrics.Peak,
    *,
    step: int,
  ):
    self.peak = peak
    self._config = config
    self._clock = clock
    self._per_sample: dict[int, float] = {}
    self._flops = 0.0  # of a sample of each step, added up
    # Step, busy and data seconds, FLOPs at the lines that speeds look back to.
    self._marks = collections.deque([(step, *self._totals())])
    self._began = (step, clock.elapsed())

  def flops_per_sample(self, length: int) -> float:
    """Of the model in a step whose texts have `length` tokens."""
    if length not in self._per_sample:
      config = config_lib.at_length(self._config, length)
      self._per_sample[length] = registry.find(config).forward(config).step
    return self._per_sample[length]

  def count(self, length: int) -> None:
    """Called for each step, with the tokens of its texts."""
    self._flops += self.flops_per_sample(length)

  def measure(self, step: int, loss: float) -> metrics.Progress:
    """The progress after `step`, whose loss was `loss`."""
    first, busy_then, data_then, flops_then = self._marks[0]
    busy, data, flops = self._totals()
    busy_spent = max(busy - busy_then, 1e-9)
    batch_size = self._config.data.batch_size
    rate = (step - first) * batch_size / busy_spent
    began_step, began = self._began
    per_step = (self._clock.elapsed() - began) / max(1, step - began_step)
    num_steps = self._config.train.num_steps
    peak = self.peak.flops
    flops_rate = (flops - flops_then) * batch_size / busy_spent
    return metrics.Progress(
      step=step,
      num_steps=num_steps,
      loss=loss,
      samples_per_second=rate,
      seconds_left=per_step * (num_steps - step),
      mfu=None if peak is None else flops_rate / peak,
      data_wait=min(1.0, (data - data_then) / busy_spent),
    )

  def mark(self, step: int) -> None:
    """Forgets the marks that are older than the last WINDOW steps need."""
    self._marks.append((step, *self._totals()))
    while len(self._marks) > 1 and step - self._marks[1][0] >= WINDOW:
      self._marks.popleft()

  def _totals(self) -> tuple[float, float, float]:
    """Seconds of training, among them of waiting for batches, and FLOPs."""
    other = sum(self._clock.total(name) for name in ("compile", "eval", "save"))
    busy = self._clock.elapsed() - other
    return busy, self._clock.total("data"), self._flops


class Profile:
  """Traces some steps into workdir/profile, while it is entered.

  Args:
    workdir: the run's.
    log: told where the trace is.
    step: updates done; the trace starts PROFILE_AFTER steps later.
    num_steps: `train.profile_steps`; 0: no trace.
  """

  def __init__(
    self,
    workdir: pathlib.Path,
    *,
    log: metrics.RunLog,
    step: int,
    num_steps: int,
  ):
    self._folder = workdir / "profile"
    self._log = log
    self._first = step + PROFILE_AFTER
    self._num_steps = num_steps
    self._open = False

  def __enter__(self) -> Profile:
    return self

  def after(self, step: int) -> None:
    """Starts or ends the trace when its time has come."""
    if self._num_steps and step == self._first:
      jax.profiler.start_trace(str(self._folder))
      self._open = True
    elif self._open and step == self._first + self._num_steps:
      self._end()

  def __exit__(self, *error: object) -> None:
    if self._open:
      self._end()

  def _end(self) -> None:
    jax.profiler.stop_trace()
    self._open = False
    self._log.info(f"profile written to {self._folder}")


def format_memory(compiled: jax.stages.Compiled) -> str:
  """What a device needs for one step, where the compiler tells."""
  analysis = compiled.memory_analysis()
  if analysis is None:
    return "no memory figures from this backend"
  lasting = analysis.argument_size_in_bytes / 2**20
  temporary = analysis.temp_size_in_bytes / 2**20
  return f"{lasting:.1f} MiB state and batch, {temporary:.1f} MiB temporary"


def format_scores(step: int, scores: Mapping[str, float]) -> str:
  """The R@1 of a validation."""
  shown = ", ".join(
    f"{name.removeprefix('eval/')} {value:.4f}"
    for name, value in scores.items()
    if name.endswith("_r1")
  )
  return f"validation at step {step}: {shown}"


def format_data_report(report: Mapping[str, Any], max_length: int) -> str:
  """What the iterator's report says of the rows, which it replaced and cut.

  With `data.text_lengths` one that replaced a bad record may be cut to less.
  """
  return (
    f"data: {report['rows']} rows, {report['truncated']} captions cut to "
    f"{max_length} tokens, {report['bad_rows']} rows "
    f"that replaced bad records ({len(report['bad_records'])} distinct)"
  )


def format_advice(workdir: pathlib.Path, latest: int | None) -> str:
  """What to do about losses that are not finite.

  Args:
    workdir: of the run; one with checkpoints takes no other optimizer.
    latest: its last checkpoint, or None.
  """
  where = (
    "start again"
    if latest is None
    else "start in another --workdir with "
    f"--config.train.init_from={workdir}/checkpoints/{latest}"
  )
  return (
    f"Look at the data, or {where} and a lower optimizer.learning_rate or an "
    "optimizer.clip_norm."
  )


def format_summary(summary: Summary, start_step: int) -> str:
  """Where the run ended, where the time went, and how to go on."""
  spent = ", ".join(
    f"{name} {metrics.format_duration(seconds)}"
    for name, seconds in summary.seconds.items()
  )
  done = f"{summary.step - start_step} steps in this call, time: {spent}"
  if summary.stopped_by is None:
    return f"finished at step {summary.step}; {done}"
  name = signal.Signals(summary.stopped_by).name
  if not summary.step:
    return f"stopped by {name} before the first step: nothing to save; {done}"
  return (
    f"stopped by {name} after step {summary.step}, which is saved; {done}\n"
    "the same command continues from there"
  )
