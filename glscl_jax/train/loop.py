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

import contextlib
import dataclasses
import logging
import os
import pathlib
import shutil
import signal
import threading
import time
import types
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, TextIO

import jax
import numpy as np

from glscl_jax import atomic, errors, processes, roll_call, sharding
from glscl_jax import config as config_lib
from glscl_jax.data import pairs, pipeline, sources
from glscl_jax.data import tokenizer as tokenizer_lib
from glscl_jax.train import (
  accumulate,
  checkpoint,
  initial,
  journal,
  metrics,
)
from glscl_jax.train import state as state_lib
from glscl_jax.train import step as step_lib
from glscl_jax.types import Batch, Params

RECALLS = (1, 5, 10)
SAME_STOP_SECONDS = (
  1.0  # a group of processes is told, and each by its launcher
)


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


class Stop:
  """Remembers SIGTERM or SIGINT; a second one ends the process at once.

  Args:
    calls: through which several processes agree on a step to stop after.
  """

  SIGNALS = (signal.SIGTERM, signal.SIGINT)

  def __init__(self, calls: roll_call.RollCall | None = None) -> None:
    self.number: int | None = None
    self._calls = calls
    self._before: dict[int, Any] = {}
    self._since: float | None = None  # when the first signal came

  def __enter__(self) -> Stop:
    if threading.current_thread() is threading.main_thread():
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
    if self._since is not None:
      if time.monotonic() - self._since > SAME_STOP_SECONDS:
        self._restore()
        signal.raise_signal(number)
      return
    self._since = time.monotonic()
    if self._calls is None:
      self.number = number
    else:
      self._calls.want_stop(number)
    # A log line could re-enter a write that the signal interrupted.
    os.write(2, b"\nstopping after this step (again: at once)\n")

  def asked(self, step: int) -> bool:
    """Whether every process should stop after `step`."""
    if self._calls is not None:
      self.number = self._calls.must_stop(step)
    return self.number is not None


def open_inputs(config: config_lib.Config) -> Inputs:
  """Opens devices, tokenizer and data, and checks that they fit.

  Raises:
    ConfigError, DataError, TokenizerError: what a start would fail with.
  """
  data = config.data
  pipeline.check_named(config)
  mesh = sharding.make_mesh(config.mesh)
  pipeline.check_batch(config, mesh.shape, jax.process_count())
  accumulate.find_parts(config, mesh.shape)
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
  calls: roll_call.RollCall | None = None,
  stream: TextIO | None = None,
) -> journal.Summary:
  """Trains until `config.train.num_steps`, or continues to it.

  Args:
    config: the run's.
    workdir: made when missing; one that holds checkpoints is continued.
    evaluate: retrieval for `train.eval_every`.
    read_params: reads what `train.init_from` names.
    calls: of `processes.joined`; None: this process is alone.
    stream: for people; standard output when None.

  Raises:
    UserError: a start that cannot work, or (journal.TrainError, BadDataError)
      a run that cannot go on.
  """
  workdir = pathlib.Path(workdir).absolute()
  if config.train.eval_every and evaluate is None:
    raise config_lib.ConfigError(
      "config.train.eval_every: this caller gave no evaluation"
    )
  checkpoint.check_writable(workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  processes.check_shared(workdir, option=f"--workdir={workdir}")
  with contextlib.ExitStack() as stack:
    log = metrics.RunLog(
      workdir, process_index=jax.process_index(), stream=stream
    )
    stack.callback(log.close)
    stack.enter_context(_warnings_to(log))
    stop = stack.enter_context(Stop(calls))
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

  def make_journal(self) -> journal.Journal:
    return journal.Journal(
      self.config,
      workdir=self.workdir,
      checkpointer=self.checkpointer,
      writer=self.writer,
      log=self.log,
      clock=self.clock,
    )

  def make_profile(self) -> journal.Profile:
    return journal.Profile(
      self.workdir,
      log=self.log,
      step=self.start_step,
      # Of one process: traces are told apart by their host alone.
      num_steps=(
        self.config.train.profile_steps if jax.process_index() == 0 else 0
      ),
    )


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
    loaded, init_lineage = _read_initial(config, workdir, inputs, read_params)
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
    for line in find_oversights(config, inputs):
      log.warning(line)
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


def _read_initial(
  config: config_lib.Config,
  workdir: pathlib.Path,
  inputs: Inputs,
  read_params: initial.ReadParams,
) -> tuple[Params | None, Mapping[str, Any] | None]:
  """What `train.init_from` brings to a new run, and where it comes from."""
  if checkpoint.list_steps(workdir):
    return None, checkpoint.read_meta(workdir)["lineage"]["init_from"]
  if not config.train.init_from:
    return None, None
  return initial.read_initial(
    config, inputs.tokenizer, inputs.tokenizer_path, read_params
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


def _run_steps(
  run: _Run, *, evaluate: Evaluate | None, stop: Stop
) -> journal.Summary:
  """Everything from the first step to the summary."""
  config, clock, mesh = run.config, run.clock, run.inputs.mesh
  num_steps = config.train.num_steps
  train_step = step_lib.make_train_step(config, mesh)
  key = state_lib.run_key(config, mesh, "step")
  report = run.make_journal()
  state, step = run.state, run.start_step
  compiled: dict[int, jax.stages.Compiled] = {}  # by tokens of texts
  saved, scores = run.start_step, {}
  with run.make_profile() as profile:
    while step < num_steps and not stop.asked(step):
      batch = _next_batch(run, stop)
      if batch is None:
        break
      length = batch.text_ids_BT.shape[1]
      if length not in compiled:
        run.log.info("compiling the step: a minute or several of silence")
        before = clock.total("compile")
        with clock("compile"):
          compiled[length] = train_step.lower(state, batch, key).compile()
        seconds = clock.total("compile") - before
        report.start(
          step, compiled[length], mesh, length=length, seconds=seconds
        )
      with jax.transfer_guard("disallow"):
        state, step_metrics = compiled[length](state, batch, key)
      step += 1
      # Writes the metrics of the step before.
      report.add(step, step_metrics, length=length)
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
  summary = journal.Summary(
    step=step,
    metrics={**report.last, **scores},
    seconds=_split_time(clock),
    stopped_by=stop.number if step < num_steps else None,
  )
  run.log.info(journal.format_summary(summary, run.start_step))
  _log_data_report(run)
  return summary


def _next_batch(run: _Run, stop: Stop) -> Batch | None:
  """The next global batch; None where Ctrl-C ended the worker processes."""
  try:
    with run.clock("data"):
      return pipeline.global_batch(next(run.inputs.iterator), run.inputs.mesh)
  except errors.UserError:
    raise
  except Exception:
    if stop.number is None:
      raise
    return None


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


def _split_time(clock: metrics.Clock) -> dict[str, float]:
  names = ("start", "compile", "data", "eval", "save")
  spent = {name: clock.total(name) for name in names}
  rest = max(0.0, clock.elapsed() - sum(spent.values()))
  return {"train": rest, **spent}


def _log_data_report(run: _Run) -> None:
  report = run.inputs.iterator.report()
  text = journal.format_data_report(report, run.config.model.text.max_length)
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
  atomic.write_text(workdir / "config.json", config_lib.to_json(config) + "\n")
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


def find_oversights(config: config_lib.Config, inputs: Inputs) -> list[str]:
  """What is likely not meant, before hours of training; one line each."""
  found = []
  if config.train.eval_splits and not config.train.eval_every:
    found.append(
      "train.eval_splits is set, but train.eval_every is 0: nothing is "
      "validated"
    )
  length = config.model.text.max_length
  source = sources.open_source(config.data.dir, config.data.train_split)
  some = np.linspace(0, len(source) - 1, min(len(source), 256)).astype(int)
  captions = [text for i in some for text in source[int(i)].captions]
  cut = sum(inputs.tokenizer.encode(c, length).truncated for c in captions)
  if cut > 0.2 * len(captions):
    found.append(
      f"{cut} of {len(captions)} training captions looked at have more than "
      f"{length} tokens and are cut: raise model.text.max_length, or see "
      "--tokenizer_type of launch/prepare.py"
    )
  return found


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
