r"""Trains: the same command again continues.

  python launch/train.py --config=configs/quickstart.py --workdir=DIR
  python launch/train.py --config=configs/X.py:arg --workdir=DIR \
    --config.data.dir=DATA --config.train.num_steps=1000 [--dry_run]
  python launch/train.py --config=.. --workdir=.. --num_processes=2 \
    --process_id=0 --coordinator_address=HOST:PORT  # and 1, on another host

Exit code 0: finished (or the dry run passed). 2: `error: ...` says what to
change. 128 + N: signal N (130: Ctrl-C, 143: SIGTERM) stopped it after a save.
75: another process of the run was lost; the same commands continue.
JAX_COMPILATION_CACHE_DIR=DIR keeps compiled steps between starts.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from glscl_jax import huge_pages

if __name__ == "__main__":
  huge_pages.use()  # starts anew, so before all that takes long to import

# Before jax is imported: its C++ log is for its developers.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from absl import flags

from glscl_jax import command_line, processes
from glscl_jax import config as config_lib
from glscl_jax.export import weights
from glscl_jax.tasks import retrieval
from glscl_jax.train import dry_run, loop


def main(argv: Sequence[str]) -> int:
  """Runs the command line `argv` and returns the exit code."""
  return command_line.run(lambda: _run(parse(argv)))


def _run(values: flags.FlagValues) -> int:
  config = config_lib.from_config_dict(values.config)
  if values.dry_run:
    dry_run.dry_run(
      config,
      values.workdir,
      compile_step=values.compile,
      read_params=weights.read_params,
    )
    return 0
  with processes.joined(
    processes.find(values),
    join_timeout=values.join_timeout,
    heartbeat_timeout=values.heartbeat_timeout,
  ) as calls:
    summary = loop.train(
      config,
      values.workdir,
      evaluate=retrieval.evaluate,
      read_params=weights.read_params,
      calls=calls,
    )
  return 0 if summary.stopped_by is None else 128 + summary.stopped_by


def parse(argv: Sequence[str]) -> flags.FlagValues:
  """Reads the command line.

  Raises:
    absl.flags.Error, ConfigError: anything that is wrong with it.
  """
  # Not the global FLAGS, so that one process may parse several times.
  values = flags.FlagValues()
  flags.DEFINE_string("workdir", None, "Output folder.", flag_values=values)
  flags.DEFINE_bool(
    "dry_run", False, "Show what would run, then end.", flag_values=values
  )
  flags.DEFINE_bool(
    "compile", False, "With --dry_run: compile too.", flag_values=values
  )
  processes.define_flags(values)
  command_line.parse_recipe(values, argv, doc=__doc__, required=["workdir"])
  if values.compile and not values.dry_run:
    raise flags.Error("--compile goes with --dry_run: training compiles anyway")
  if values.dry_run and values.num_processes is not None:
    raise flags.Error("--dry_run looks at one process: without --num_processes")
  return values


if __name__ == "__main__":
  sys.exit(main(sys.argv))
