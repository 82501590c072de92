"""The training loop: the only file with side effects in order.

Invariants:
  1. A checkpoint is taken before the iterator moves: its `data` is where the
     iterator stands after the batch of the last update in `state`.
  2. The metrics of step n are fetched after step n+1 was dispatched, so the
     devices never wait for the host. Exception: before a save or a validation
     the metrics of that step are written first, so that a run that is killed
     and continued has every line of metrics.jsonl exactly once.
  3. Nothing else moves between host and devices inside a step
     (jax.transfer_guard).
  4. Killed at any moment, the same command continues from the last whole
     checkpoint, bit for bit on the same mesh.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
import os
import pathlib
import shutil
import signal
import threading
import types
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, TextIO

import jax
import numpy as np
from jax.experimental import multihost_utils

from glscl_jax import config as config_lib
from glscl_jax import errors, sharding
from glscl_jax.data import pairs, pipeline, sources
from glscl_jax.data import tokenizer as tokenizer_lib
from glscl_jax.systems import flops
from glscl_jax.train import checkpoint, initial, metrics
from glscl_jax.train import state as state_lib
from glscl_jax.train import step as step_lib
from glscl_jax.types import Params

LINE_SECONDS = 60.0  # off a terminal a line at least this often
WINDOW = 10  # steps that a speed is the mean of, at least
RECALLS = (1, 5, 10)
PROFILE_AFTER = 10  # steps of this process before the trace starts


class TrainError(errors.UserError):
  """Training cannot go on; the message says what to change."""


class Evaluate(Protocol):
  """Retrieval of one split: tasks/retrieval.evaluate."""

  def __call__(
    self,
    params: Params,
    config: config_lib.Config,
    tokenizer: tokenizer_lib.Tokenizer,
    data_dir: str,
    split: str,
    *,
    mesh: jax.sharding.Mesh | None,
  ) -> Mapping[str, Any]:
    """Returns a mapping whose "metrics" hold i2t_r1 .. t2i_r10."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
  """What must be there before anything is computed."""

  mesh: jax.sharding.Mesh
  tokenizer: tokenizer_lib.Tokenizer
  tokenizer_path: pathlib.Path
  iterator: pipeline.TrainIterator
  data_facts: dict[str, Any]  # for the lineage


@dataclasses.dataclass(frozen=True, kw_only=True)
class Summary:
  """How a call of `train` ended."""

  step: int  # updates done in all
  metrics: dict[str, float]  # of the last step, and of the last validation
  seconds: dict[str, float]  # by purpose; "train" is what is left
  stopped_by: int | None = None  # number of the signal that ended it early


class Stop:
  """Remembers SIGTERM or SIGINT; a second one ends the process at once."""

  SIGNALS = (signal.SIGTERM, signal.SIGINT)

  def __init__(self) -> None:
    self.number: int | None = None
    self._before: dict[int, Any] = {}

  def __enter__(self) -> Stop:
    # With several processes jax's coordination service listens to SIGTERM,
    # so that all stop at the same step.
    main = threading.current_thread() is threading.main_thread()
    if main and jax.process_count() == 1:
      for number in self.SIGNALS:
        self._before[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, *error: object) -> None:
    self._restore()

  def _restore(self) -> None:
    for number, handler in self._before.items():
      signal.signal(number, handler)
    self._before = {}

  def _handle(self, number: int, frame: types.FrameType | None) -> None:
    self.number = number
    self._restore()
    # A log line could re-enter a write that the signal interrupted.
    os.write(2, b"\nstopping after this step (again: at once)\n")

  def asked(self, step: int) -> bool:
    """Whether every process should stop after `step`."""
    if jax.process_count() > 1 and self.number is None:
      if multihost_utils.reached_preemption_sync_point(step):
        self.number = signal.SIGTERM
    return self.number is not None


def open_inputs(config: config_lib.Config) -> Inputs:
  """Opens devices, tokenizer and data, and checks that they fit.

  Raises:
    ConfigError, DataError, TokenizerError: what a start would fail with.
  """
  data = config.data
  if not data.dir:
    raise config_lib.ConfigError(
      "config.data.dir is empty: make a data directory with "
      "launch/prepare.py and name it with --config.data.dir=DIR"
    )
  mesh = sharding.make_mesh(config.mesh)
  pipeline.check_batch(config, mesh.shape, jax.process_count())
  # Not jax's own numbers: with a tensor axis that spans processes, these hold
  # the same rows.
  block, num_blocks = pipeline.process_block(mesh, batch_size=data.batch_size)
  manifest = pairs.read_manifest(data.dir)
  _check_validation(config, manifest["splits"])
  path = (
    pathlib.Path(data.tokenizer)
    if data.tokenizer
    else sources.tokenizer_path(data.dir)
  )
  tokenizer = tokenizer_lib.load(path)
  iterator = pipeline.make_train_iterator(
    config,
    tokenizer,
    process_index=block,
    process_count=num_blocks,
  )
  return Inputs(
    mesh=mesh,
    tokenizer=tokenizer,
    tokenizer_path=path,
    iterator=iterator,
    data_facts={
      "data_dir": str(pathlib.Path(data.dir).absolute()),
      "data_sha256": pairs.hash_split(manifest, data.train_split),
      "train_split": data.train_split,
      "train_records": manifest["splits"][data.train_split],
    },
  )


def train(
  config: config_lib.Config,
  workdir: str | os.PathLike[str],
  *,
  evaluate: Evaluate | None = None,
  read_params: initial.ReadParams = initial.read_work_dir,
  stream: TextIO | None = None,
) -> Summary:
  """Trains until `config.train.num_steps`, or continues to it.

  Args:
    config: the run's.
    workdir: made when missing; one that holds checkpoints is continued.
    evaluate: retrieval for `train.eval_every`.
    read_params: reads what `train.init_from` names.
    stream: for people; standard output when None.

  Raises:
    UserError: a start that cannot work, or (TrainError, BadDataError) a run
      that cannot go on.
  """
  workdir = pathlib.Path(workdir).absolute()
  if config.train.eval_every and evaluate is None:
    raise config_lib.ConfigError(
      "config.train.eval_every: this caller gave no evaluation"
    )
  checkpoint.check_writable(workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  with contextlib.ExitStack() as stack:
    log = metrics.RunLog(
      workdir, process_index=jax.process_index(), stream=stream
    )
    stack.callback(log.close)
    stack.enter_context(_warnings_to(log))
    stop = stack.enter_context(Stop())
    run = _start(config, workdir, read_params=read_params, log=log, stack=stack)
    return _run_steps(run, evaluate=evaluate, stop=stop)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Run:
  """What the loop works with."""

  config: config_lib.Config
  workdir: pathlib.Path
  inputs: Inputs
  state: state_lib.TrainState
  start_step: int
  checkpointer: checkpoint.Checkpointer
  writer: metrics.MetricWriter
  log: metrics.RunLog
  clock: metrics.Clock


def _start(
  config: config_lib.Config,
  workdir: pathlib.Path,
  *,
  read_params: initial.ReadParams,
  log: metrics.RunLog,
  stack: contextlib.ExitStack,
) -> _Run:
  """Mesh, data, state, restore: all before the first step."""
  clock = metrics.Clock()
  with clock("start"):
    inputs = open_inputs(config)
    stack.callback(inputs.iterator.close)
    config = initial.keep_init_from(config, workdir, warn=log.warning)
    loaded, init_lineage = None, None
    if checkpoint.list_steps(workdir):
      init_lineage = checkpoint.read_meta(workdir)["lineage"]["init_from"]
    elif config.train.init_from:
      loaded, init_lineage = initial.read_initial(
        config, inputs.tokenizer, inputs.tokenizer_path, read_params
      )
    checkpointer = checkpoint.Checkpointer(
      workdir,
      config=config,
      tokenizer_sha256=inputs.tokenizer.sha256,
      lineage={
        **inputs.data_facts,
        "config_sha256": config_lib.sha256(config),
        "init_from": init_lineage,
      },
    )
    stack.callback(checkpointer.close)
    _write_inputs(config, workdir, inputs)
    log.info(config_lib.to_json(config))
    state, start_step = _make_state(config, inputs, checkpointer, loaded, log)
    writer = metrics.MetricWriter(
      workdir,
      config=config,
      start_step=start_step,
      process_index=jax.process_index(),
    )
    stack.callback(writer.close)
  return _Run(
    config=config,
    workdir=workdir,
    inputs=inputs,
    state=state,
    start_step=start_step,
    checkpointer=checkpointer,
    writer=writer,
    log=log,
    clock=clock,
  )


def _make_state(
  config: config_lib.Config,
  inputs: Inputs,
  checkpointer: checkpoint.Checkpointer,
  loaded: Params | None,
  log: metrics.RunLog,
) -> tuple[state_lib.TrainState, int]:
  """The restored state, or a fresh one with what `loaded` brings."""
  abstract = state_lib.abstract_state(config, inputs.mesh)
  for line in sharding.find_undivided(abstract.params, inputs.mesh):
    log.warning(line)
  restored = checkpointer.restore(abstract)
  if restored is not None:
    inputs.iterator.set_state(restored.data_state)
    log.info(f"continuing after step {restored.step}")
    return restored.state, restored.step
  state = state_lib.make_state(config, inputs.mesh)
  count = sum(x.size for x in jax.tree.leaves(state.params))
  log.info(f"new run with {count:,} parameters")
  if loaded is not None:
    params, merge = initial.merge_params(state.params, loaded)
    state = dataclasses.replace(state, params=params)
    log.info(initial.format_merge(config.train.init_from, merge))
    initial.check_merge(config.train.init_from, merge)
  return state, 0


def _run_steps(run: _Run, *, evaluate: Evaluate | None, stop: Stop) -> Summary:
  """Everything from the first step to the summary."""
  config, clock, log = run.config, run.clock, run.log
  num_steps = config.train.num_steps
  train_step = step_lib.make_train_step(config, run.inputs.mesh)
  iterator, mesh = run.inputs.iterator, run.inputs.mesh
  report = _Report(run)
  state, step = run.state, run.start_step
  compiled = None
  saved, scores = run.start_step, {}
  with _Profile(run) as profile:
    while step < num_steps and not stop.asked(step):
      try:
        with clock("data"):
          batch = pipeline.global_batch(next(iterator), mesh)
      except Exception:
        if stop.number is None:
          raise
        break  # Ctrl-C reached the worker processes as well
      if compiled is None:
        with clock("compile"):
          compiled = train_step.lower(state, batch).compile()
        report.start(_memory_note(compiled))
      with jax.transfer_guard("disallow"):
        state, step_metrics = compiled(state, batch)
      step += 1
      report.add(step, step_metrics)  # writes those of the step before
      profile.after(step)
      last = step == num_steps
      scored = None
      if _due(step, config.train.eval_every, last):
        with clock("eval"):
          scored = scores = _validate(run, state, evaluate)
        report.attach(scored)
      if scored or last or step % config.train.save_every == 0:
        report.flush()
        saved = _save(run, step, state, scored)
    report.flush()
    if step > saved:
      _save(run, step, state, None)
  with clock("save"):
    run.checkpointer.wait()
  summary = Summary(
    step=step,
    metrics={**report.last, **scores},
    seconds=_split_time(clock),
    stopped_by=stop.number if step < num_steps else None,
  )
  log.info(format_summary(summary, run.start_step))
  _log_data_report(run)
  return summary


def _save(
  run: _Run,
  step: int,
  state: state_lib.TrainState,
  scored: Mapping[str, float] | None,
) -> int:
  with run.clock("save"):
    run.checkpointer.save(
      step,
      state,
      data_state=run.inputs.iterator.get_state(),
      metrics=scored,
    )
  return step


class _Report:
  """Turns device scalars into lines, one step late."""

  def __init__(self, run: _Run):
    self.last: dict[str, float] = {}
    self._run = run
    self._pending: tuple[int, Mapping[str, jax.Array]] | None = None
    self._extra: dict[str, float] = {}
    self._peak = metrics.Peak(flops=None, source="")
    self._flops = flops.flops_per_sample(run.config)
    # Step, busy seconds, data seconds at the lines that speeds look back to.
    self._marks: collections.deque[tuple[int, float, float]] = (
      collections.deque()
    )
    self._began: tuple[int, float] | None = None
    self._last_line = 0.0

  def start(self, note: str) -> None:
    """Called once, when the step is compiled and about to run."""
    run = self._run
    self._peak = metrics.find_peak(
      list(run.inputs.mesh.devices.flat),
      compute_dtype=run.config.model.compute_dtype,
    )
    run.log.info(
      f"step compiled in {run.clock.total('compile'):.1f} s{note}; "
      f"{self._flops / 1e9:.3f} GFLOP a sample; MFU against "
      f"{self._peak.source}"
    )
    self._marks.append((run.start_step, *self._times()))
    self._began = (run.start_step, run.clock.elapsed())

  def add(self, step: int, values: Mapping[str, jax.Array]) -> None:
    """Takes the scalars of a dispatched step, writes those of the one before.

    Raises:
      TrainError: too many steps had a non-finite loss or gradient.
    """
    self.flush()
    self._pending = (step, values)

  def attach(self, extra: Mapping[str, float]) -> None:
    """Adds a validation's values to the line of the pending step."""
    self._extra = dict(extra)

  def flush(self) -> None:
    """Fetches and writes what is pending."""
    if self._pending is None:
      return
    step, values = self._pending
    self._pending = None
    numbers = {k: float(v) for k, v in jax.device_get(dict(values)).items()}
    self.last = numbers
    config = self._run.config
    num_steps = config.train.num_steps
    logged = step in (1, num_steps) or step % config.train.log_every == 0
    speed = self._speed(step, numbers)
    clock = self._run.clock.elapsed()
    late = clock - self._last_line > LINE_SECONDS
    self._run.log.progress(
      metrics.format_progress(speed), logged=logged or late
    )
    if logged or late:
      self._last_line = clock
    if logged or self._extra:
      mfu = {} if speed.mfu is None else {"mfu": speed.mfu}
      self._run.writer.write(
        step,
        {
          **numbers,
          **self._extra,
          "samples_per_second": speed.samples_per_second,
          "data_wait": speed.data_wait,
          **mfu,
        },
      )
      self._mark(step)
    if self._extra:
      self._run.log.info(_format_scores(step, self._extra))
      self._extra = {}
    self._check_finite(step, numbers)

  def _check_finite(self, step: int, numbers: Mapping[str, float]) -> None:
    limit = self._run.config.optimizer.max_skips
    if numbers["num_skipped"] >= limit:
      raise TrainError(
        f"step {step}: {numbers['num_skipped']:.0f} steps had a loss or "
        "gradient that is not finite and were skipped "
        f"(optimizer.max_skips = {limit}). "
        + format_advice(self._run.workdir, self._run.checkpointer.latest_step)
      )

  def _mark(self, step: int) -> None:
    """Forgets the marks that are older than the last WINDOW steps need."""
    self._marks.append((step, *self._times()))
    while len(self._marks) > 1 and step - self._marks[1][0] >= WINDOW:
      self._marks.popleft()

  def _speed(self, step: int, numbers: Mapping[str, float]) -> metrics.Progress:
    config = self._run.config
    first, busy_then, data_then = self._marks[0]
    busy, data = self._times()
    busy_spent = max(busy - busy_then, 1e-9)
    rate = (step - first) * config.data.batch_size / busy_spent
    began_step, began = self._began
    per_step = (self._run.clock.elapsed() - began) / max(1, step - began_step)
    return metrics.Progress(
      step=step,
      num_steps=config.train.num_steps,
      loss=numbers["loss"],
      samples_per_second=rate,
      seconds_left=per_step * (config.train.num_steps - step),
      mfu=(
        None
        if self._peak.flops is None
        else rate * self._flops / self._peak.flops
      ),
      data_wait=min(1.0, (data - data_then) / busy_spent),
    )

  def _times(self) -> tuple[float, float]:
    """Seconds of training and, among them, of waiting for batches."""
    clock = self._run.clock
    other = sum(clock.total(name) for name in ("compile", "eval", "save"))
    return clock.elapsed() - other, clock.total("data")


class _Profile:
  """Traces `train.profile_steps` steps into workdir/profile."""

  def __init__(self, run: _Run):
    self._run = run
    self._first = run.start_step + PROFILE_AFTER
    self._open = False

  def __enter__(self) -> _Profile:
    return self

  def after(self, step: int) -> None:
    """Starts or ends the trace when its time has come."""
    num_steps = self._run.config.train.profile_steps
    if num_steps and step == self._first:
      jax.profiler.start_trace(str(self._run.workdir / "profile"))
      self._open = True
    elif self._open and step == self._first + num_steps:
      self._end()

  def __exit__(self, *error: object) -> None:
    if self._open:
      self._end()

  def _end(self) -> None:
    jax.profiler.stop_trace()
    self._open = False
    self._run.log.info(f"profile written to {self._run.workdir / 'profile'}")


def _due(step: int, every: int, last: bool) -> bool:
  return every > 0 and (last or step % every == 0)


def _validate(
  run: _Run, state: state_lib.TrainState, evaluate: Evaluate
) -> dict[str, float]:
  """Recalls of every validation split, and the mean that picks the best."""
  found = {}
  for split in run.config.train.eval_splits:
    report = evaluate(
      state.params,
      run.config,
      run.inputs.tokenizer,
      run.config.data.dir,
      split,
      mesh=run.inputs.mesh,
    )
    for direction in ("i2t", "t2i"):
      for k in RECALLS:
        name = f"{direction}_r{k}"
        found[f"eval/{split}/{name}"] = float(report["metrics"][name])
  firsts = [value for name, value in found.items() if name.endswith("_r1")]
  found[checkpoint.BEST_METRIC] = float(np.mean(firsts))
  return found


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
  return (
    f"stopped by {name} after step {summary.step}, which is saved; {done}\n"
    "the same command continues from there"
  )


def _format_scores(step: int, scores: Mapping[str, float]) -> str:
  shown = ", ".join(
    f"{name.removeprefix('eval/')} {value:.4f}"
    for name, value in scores.items()
    if name.endswith("_r1")
  )
  return f"validation at step {step}: {shown}"


def _split_time(clock: metrics.Clock) -> dict[str, float]:
  names = ("start", "compile", "data", "eval", "save")
  spent = {name: clock.total(name) for name in names}
  rest = max(0.0, clock.elapsed() - sum(spent.values()))
  return {"train": rest, **spent}


def _memory_note(compiled: jax.stages.Compiled) -> str:
  """Bytes a device needs for one step, where the compiler tells."""
  analysis = compiled.memory_analysis()
  if analysis is None:
    return ""
  temporary = analysis.temp_size_in_bytes / 2**20
  lasting = analysis.argument_size_in_bytes / 2**20
  return f", {lasting:.0f} MiB state and batch, {temporary:.0f} MiB temporary"


def _log_data_report(run: _Run) -> None:
  report = run.inputs.iterator.report()
  text = (
    f"data: {report['rows']} rows, {report['truncated']} captions cut to "
    f"{run.config.model.text.max_length} tokens, {report['bad_rows']} rows "
    f"that replaced bad records ({len(report['bad_records'])} distinct)"
  )
  if report["bad_rows"]:
    run.log.warning(text)
  else:
    run.log.info(text)


def _write_inputs(
  config: config_lib.Config, workdir: pathlib.Path, inputs: Inputs
) -> None:
  """Puts config.json and the tokenizer into the work dir."""
  if jax.process_index() != 0:
    return
  checkpoint.write_atomically(
    workdir / "config.json", config_lib.to_json(config) + "\n"
  )
  target = workdir / f"tokenizer{inputs.tokenizer_path.suffix}"
  temporary = target.with_name(f"{target.name}.tmp")
  shutil.copyfile(inputs.tokenizer_path, temporary)
  os.replace(temporary, target)


def _check_validation(
  config: config_lib.Config, splits: Mapping[str, int]
) -> None:
  """Checks before hours of training what a validation will ask."""
  if not config.train.eval_every:
    return
  if not config.train.eval_splits:
    raise config_lib.ConfigError(
      "config.train.eval_splits: empty, but train.eval_every is "
      f"{config.train.eval_every}; name splits of {sorted(splits)}"
    )
  for name in config.train.eval_splits:
    if name not in splits:
      raise config_lib.ConfigError(
        f"config.train.eval_splits: no split {name!r} in {config.data.dir}; "
        f"it has {sorted(splits)}"
      )
  if config.objectives.itc == 0:
    raise config_lib.ConfigError(
      "config.train.eval_every: validation ranks by the contrastive vectors, "
      "which objectives.itc = 0 leaves out; set eval_every to 0"
    )


@contextlib.contextmanager
def _warnings_to(log: metrics.RunLog) -> Iterator[None]:
  """Sends warnings of this package's loggers to the run's log."""

  class Handler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
      log.warning(record.getMessage())

  logger = logging.getLogger("glscl_jax")
  handler, before = Handler(logging.WARNING), logger.propagate
  logger.addHandler(handler)
  logger.propagate = False
  try:
    yield
  finally:
    logger.removeHandler(handler)
    logger.propagate = before
