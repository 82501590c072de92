r"""Trains and measures the rows of a paper's ablation table.

  python launch/ablate.py --suite=glscl --seeds=3 --workdir=DIR --data=DATA
  python launch/ablate.py --suite=maskvlm --rows=itc_itm,maskvlm --steps=500 \
    --workdir=DIR --data=DATA

Each row is a recipe of the quick start's size with the row's overrides; all
rows of a seed start from the same weights and take equally many steps. Rows
are trained and measured by launch/train.py and launch/evaluate.py, whose output
goes to log.txt beside them. The same command again continues: what is done
stays. Writes results.md, results.svg and results.json to DIR/SUITE, of what
this command has trained and measured to its end.

Exit code 0: done. 1: a row failed (its log is named), the others were
measured. 2: `error: ...` says what to change. 130: stopped, what ran was saved.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import fcntl
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Mapping, Sequence

from absl import flags

from glscl_jax import ablations, atomic, command_line, errors
from glscl_jax.data import pairs, sources
from glscl_jax.export import ablation_table
from glscl_jax.train import metrics

ROOT = pathlib.Path(__file__).parents[1]
DONE = "done.txt"  # the commands that were run to their end
TOWERS = "towers"  # folder of the weights that rows start from
COMPILED = "compiled"  # folder of programs, which the seeds of a row share


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
  """A work dir and the commands that fill it, in order."""

  name: str
  workdir: pathlib.Path
  commands: tuple[tuple[str, ...], ...]
  after: str = ""  # name of a job that must be done before
  row: str = ""  # of the table; empty: none shows it

  @property
  def text(self) -> str:
    """What a shell would be given."""
    return "\n".join(" ".join(command) for command in self.commands) + "\n"


def parse(argv: Sequence[str]) -> flags.FlagValues:
  """Reads the command line.

  Raises:
    absl.flags.Error: anything that is wrong with it.
  """
  # Not the global FLAGS, so that one process may parse several times.
  values = flags.FlagValues()
  flags.DEFINE_enum(
    "suite",
    None,
    sorted(ablations.SUITES),
    "Whose table.",
    flag_values=values,
  )
  flags.DEFINE_string("workdir", None, "Output folder.", flag_values=values)
  flags.DEFINE_string(
    "data", None, "Data directory of launch/prepare.py.", flag_values=values
  )
  flags.DEFINE_integer(
    "seeds", 3, "Runs a row.", lower_bound=1, flag_values=values
  )
  flags.DEFINE_list("rows", [], "Rows (default: all).", flag_values=values)
  flags.DEFINE_integer(
    "steps",
    0,
    "Steps of each row; 0: those of the recipe.",
    lower_bound=0,
    flag_values=values,
  )
  flags.DEFINE_integer(
    "jobs",
    1,
    "Runs at a time: on one device they share it.",
    lower_bound=1,
    flag_values=values,
  )
  flags.DEFINE_integer(
    "limit",
    256,
    "Images a split of which ITM scores all pairs; 0: all.",
    lower_bound=0,
    flag_values=values,
  )
  return command_line.parse(
    values, argv, doc=__doc__, required=["suite", "workdir", "data"]
  )


def plan(
  suite_name: str,
  *,
  workdir: pathlib.Path,
  data: str,
  rows: Sequence[str],
  seeds: int,
  steps: int,
  limit: int,
) -> list[Job]:
  """The jobs of a table; those that others wait for come first."""
  suite = ablations.SUITES[suite_name]
  data = str(pathlib.Path(data).absolute())
  jobs = []

  def train(stage: str, seed: int, into: pathlib.Path, *more: str):
    return (
      sys.executable,
      str(ROOT / "launch/train.py"),
      f"--config={ROOT / 'configs/quickstart.py'}:{stage}",
      f"--workdir={into}",
      f"--config.data.dir={data}",
      f"--config.data.seed={seed}",
      f"--config.train.seed={seed}",
      # No checkpoint is picked: all rows are measured after their last step.
      "--config.train.eval_every=0",
      "--config.train.eval_splits=()",
      *more,
    )

  for seed in range(seeds if suite.towers else 0):
    into = workdir / TOWERS / f"{suite.towers}-seed{seed}"
    jobs.append(
      Job(
        name=into.name,
        workdir=into,
        commands=(train(suite.towers, seed, into),),
      )
    )
  # A row's first seed compiles what its others take; and what was stopped has
  # whole seeds.
  for seed in range(seeds):
    for name in rows:
      into = workdir / suite_name / name / f"seed{seed}"
      row = suite.rows[name]
      more = [f"--config.{path}={v}" for path, v in row.overrides.items()]
      if steps:
        more.append(f"--config.train.num_steps={steps}")
      after = f"{suite.towers}-seed{seed}" if suite.towers else ""
      if after:
        more.append(f"--config.train.init_from={workdir / TOWERS / after}")
      measure = [
        (
          sys.executable,
          str(ROOT / "launch/evaluate.py"),
          f"--workdir={into}",
          f"--splits={','.join(suite.splits)}",
          "--step=latest",
          *options,
        )
        for options in _measures(suite, row, limit)
      ]
      jobs.append(
        Job(
          name=f"{name}-seed{seed}",
          workdir=into,
          commands=(train(suite.system, seed, into, *more), *measure),
          after=after,
          row=name,
        )
      )
  return jobs


def _measures(
  suite: ablations.Suite, row: ablations.Row, limit: int
) -> list[tuple[str, ...]]:
  """Options of launch/evaluate.py for what the row's model can be asked."""
  found: list[tuple[str, ...]] = []
  orders = {"itc": "none", "itm": "full"}  # by cosines; by all its pairs
  reranks = [order for name, order in orders.items() if suite.has(row, name)]
  if reranks:
    own = (f"--limit={limit}", "--pair_batch_size=1024")
    found.append(
      (f"--rerank={','.join(reranks)}", *(own if "full" in reranks else ()))
    )
  if any(suite.has(row, name) for name in ("amc", "wrc")):
    found.append(("--task=anchors",))
  return found


def is_done(job: Job) -> bool:
  """Whether these commands, and no others, have filled the work dir."""
  path = job.workdir / DONE
  return path.is_file() and path.read_text() == job.text


class Table:
  """Runs jobs, some at a time, and says how far they are."""

  def __init__(
    self,
    jobs: Sequence[Job],
    *,
    at_a_time: int,
    environment: Mapping[str, str] = types.MappingProxyType({}),
  ):
    self._jobs = jobs
    self._environment = environment  # where this process has none of the name
    self._at_a_time = at_a_time
    self._finished = {job.name: threading.Event() for job in jobs}
    self._failed: dict[str, str] = {}
    self._lock = threading.Lock()
    self._done = self._ran = 0
    self._started = time.monotonic()
    self._running: set[subprocess.Popen] = set()
    self._stopped = False

  def run(self) -> Mapping[str, str]:
    """Job name -> why it failed, of those that did."""
    with concurrent.futures.ThreadPoolExecutor(self._at_a_time) as pool:
      try:
        # In order: what a job waits for was started before it.
        for future in [pool.submit(self._run, job) for job in self._jobs]:
          future.result()
      except BaseException:
        self._stop()
        pool.shutdown(cancel_futures=True)
        raise
    return self._failed

  def _run(self, job: Job) -> None:
    try:
      if is_done(job):
        self._tell(job, "was done before")
        return
      if job.after:
        self._finished[job.after].wait()
        if job.after in self._failed:
          self._failed[job.name] = f"{job.after} failed"
          self._tell(job, f"left out: {job.after} failed")
          return
      began = time.monotonic()
      reason = self._execute(job)
      self._ran += 1
      if reason:
        self._failed[job.name] = reason
        stopped = f"stopped: {reason}" if self._stopped else ""
        self._tell(job, stopped or f"FAILED: {reason}")
      else:
        atomic.write_text(job.workdir / DONE, job.text)
        spent = metrics.format_duration(time.monotonic() - began)
        self._tell(job, f"done in {spent}")
    finally:
      self._finished[job.name].set()

  def _execute(self, job: Job) -> str:
    """Why a command failed; empty where all did well."""
    job.workdir.mkdir(parents=True, exist_ok=True)
    log_path = job.workdir / "log.txt"
    environment = dict(self._environment) | dict(os.environ)
    if self._at_a_time > 1:  # several processes on one accelerator
      environment.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    with open(log_path, "ab") as log:
      # Held by the commands too, which write there: one that outlives this
      # process, killed, must not be joined by a second one.
      try:
        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except OSError:
        return (
          f"{job.workdir} is in use by another call, or by what one that was "
          "killed has left running: wait for its end or end it"
        )
      for command in job.commands:
        with self._lock:
          if self._stopped:
            return "not started"
          # A session of its own: Ctrl-C reaches it through `_stop` alone.
          process = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
          )
          self._running.add(process)
        code = process.wait()
        with self._lock:  # `_stop` may be at it
          self._running.discard(process)
        if code:
          return f"{pathlib.Path(command[1]).name}, code {code}: see {log_path}"
    return ""

  def _stop(self) -> None:
    """Ends what runs; training saves first."""
    with self._lock:
      self._stopped = True
      for process in self._running:
        process.terminate()

  def _tell(self, job: Job, what: str) -> None:
    with self._lock:
      self._done += 1
      left = len(self._jobs) - self._done
      eta = "unknown"
      if self._ran:
        spent = time.monotonic() - self._started
        eta = metrics.format_duration(spent / self._ran * left)
      print(
        f"[{self._done}/{len(self._jobs)}] {job.name}: {what}, eta {eta}",
        flush=True,
      )


def main(argv: Sequence[str]) -> int:
  """Runs the command line `argv` and returns the exit code."""
  signal.signal(signal.SIGTERM, _interrupt)
  try:
    return command_line.run(lambda: _run(parse(argv)))
  except KeyboardInterrupt:
    print("stopped; the same command continues", file=sys.stderr)
    return 128 + signal.SIGINT


def _interrupt(number: int, frame: types.FrameType | None) -> None:
  raise KeyboardInterrupt


def _run(values: flags.FlagValues) -> int:
  suite = ablations.SUITES[values.suite]
  rows = check_rows(suite, values.rows)
  check_data(suite, values.data)
  workdir = pathlib.Path(values.workdir).absolute()
  errors.check_writable(workdir, option=f"--workdir={values.workdir}")
  jobs = plan(
    values.suite,
    workdir=workdir,
    data=values.data,
    rows=rows,
    seeds=values.seeds,
    steps=values.steps,
    limit=values.limit,
  )
  failed = Table(
    jobs,
    at_a_time=values.jobs,
    environment={"JAX_COMPILATION_CACHE_DIR": str(workdir / COMPILED)},
  ).run()
  output = workdir / values.suite
  runs = find_runs(jobs, rows=rows)
  if any(runs.values()):
    ablation_table.write(
      output,
      suite=suite,
      runs=runs,
      command="python launch/ablate.py " + " ".join(_told(values)),
    )
    print(f"wrote {output / ablation_table.MARKDOWN}")
  return 1 if failed else 0


def find_runs(
  jobs: Sequence[Job], *, rows: Sequence[str]
) -> dict[str, list[pathlib.Path]]:
  """Row -> work dirs that these commands have filled.

  Others may hold what an earlier call with other flags has measured.
  """
  runs: dict[str, list[pathlib.Path]] = {name: [] for name in rows}
  for job in jobs:
    if job.row and is_done(job):
      runs[job.row].append(job.workdir)
  return runs


def check_rows(suite: ablations.Suite, asked: Sequence[str]) -> list[str]:
  """The rows asked for in the table's order, or all.

  Raises:
    absl.flags.Error: an unknown row.
  """
  for name in asked:
    if name not in suite.rows:
      raise flags.Error(f"--rows: no row {name!r}; {', '.join(suite.rows)}")
  return [name for name in suite.rows if not asked or name in asked]


def check_data(suite: ablations.Suite, data_dir: str) -> None:
  """Raises DataError where the data lack what rows read or are measured on."""
  if suite.system == "cmal" and sources.read_schema(data_dir) is None:
    raise pairs.DataError(
      f"--data={data_dir}: no regions, which CMAL reads; name scenes that "
      "`python launch/prepare.py --source=scenes` made of it"
    )
  sources.check_splits(data_dir, suite.splits, option="--data")


def _told(values: flags.FlagValues) -> list[str]:
  """The flags that make this table, without paths of this machine."""
  told = [f"--suite={values.suite}", f"--seeds={values.seeds}"]
  if values.rows:
    told.append(f"--rows={','.join(values.rows)}")
  if values.steps:
    told.append(f"--steps={values.steps}")
  if values["limit"].present:
    told.append(f"--limit={values.limit}")
  return [*told, "--workdir=DIR", "--data=DATA"]


if __name__ == "__main__":
  sys.exit(main(sys.argv))
