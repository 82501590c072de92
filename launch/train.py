r"""Trains: the same command again continues.

  python launch/train.py --config=configs/quickstart.py --workdir=DIR
  python launch/train.py --config=configs/X.py:arg --workdir=DIR \
    --config.data.dir=DATA --config.train.num_steps=1000 [--dry_run]

Exit code 0: finished (or the dry run passed). 2: `error: ...` says what to
change. 128 + N: signal N (130: Ctrl-C, 143: SIGTERM) stopped it after a save.
JAX_COMPILATION_CACHE_DIR=DIR keeps compiled steps between starts.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import sys
import typing
from collections.abc import Iterator, Sequence

from glscl_jax import huge_pages

if __name__ == "__main__":
  huge_pages.use()  # starts anew, so before all that takes long to import

# Before jax is imported: its C++ log is for its developers.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from absl import flags
from ml_collections import config_flags

from glscl_jax import command_line
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
  summary = loop.train(
    config,
    values.workdir,
    evaluate=retrieval.evaluate,
    read_params=weights.read_params,
  )
  return 0 if summary.stopped_by is None else 128 + summary.stopped_by


def parse(argv: Sequence[str]) -> flags.FlagValues:
  """Reads the command line.

  Raises:
    absl.flags.Error, ConfigError: anything that is wrong with it.
  """
  argv = list(argv)
  values = flags.FlagValues()
  # Not the global FLAGS, so that one process may parse several times.
  config_flags.DEFINE_config_file(
    "config",
    None,
    "File with get_config(), and :argument for it.",
    flag_values=values,
    sys_argv=argv,
  )
  flags.DEFINE_string("workdir", "", "Output folder.", flag_values=values)
  flags.DEFINE_bool(
    "dry_run", False, "Show what would run, then end.", flag_values=values
  )
  flags.DEFINE_bool(
    "compile", False, "With --dry_run: compile too.", flag_values=values
  )
  if command_line.wants_help(argv):
    print(__doc__)
    raise SystemExit(0)
  check_keys(argv[1:])
  try:
    command_line.check_rest(values(argv))
    config = values.config
    if config is not None:
      config.keys()  # a recipe that could not be read raises only here
  except flags.IllegalFlagValueError as error:
    # A recipe that raises comes with its whole traceback.
    lines = str(error).strip().splitlines()
    if "Traceback" not in str(error):
      raise
    reason = lines[-1].removeprefix("ValueError: ")
    raise config_lib.ConfigError(
      f"{lines[0].split(': ')[0]}: {reason}"
    ) from None
  except OSError as error:
    reason = str(error.__cause__ or error).strip().splitlines()[-1].strip()
    raise config_lib.ConfigError(
      f"--config={values['config'].config_filename}: {reason}"
    ) from None
  for name, value in (("config", config), ("workdir", values.workdir)):
    if not value:
      raise config_lib.ConfigError(f"--{name} is missing; see --help")
  if values.compile and not values.dry_run:
    raise flags.Error("--compile goes with --dry_run: training compiles anyway")
  return values


def check_keys(args: Sequence[str]) -> None:
  """Raises ConfigError for a --config.a.b that is no key, naming the nearest.

  config_flags would name the last part alone, not its path.
  """
  known = list(_keys(config_lib.Config, "config"))
  for arg in args:
    name = arg.lstrip("-").split("=")[0].split("[")[0]
    if not arg.startswith("-") or not name.startswith("config."):
      continue
    if name not in known:
      last = name.rpartition(".")[2]
      near = [key for key in known if key.rpartition(".")[2] == last]
      near += difflib.get_close_matches(name, known, n=1)
      hint = f"; did you mean {near[0]}?" if near else ""
      raise config_lib.ConfigError(f"{name}: unknown key{hint}")


def _keys(cls: type, path: str) -> Iterator[str]:
  hints = typing.get_type_hints(cls)
  for item in dataclasses.fields(cls):
    name = f"{path}.{item.name}"
    yield name
    if dataclasses.is_dataclass(hints[item.name]):
      yield from _keys(hints[item.name], name)


if __name__ == "__main__":
  sys.exit(main(sys.argv))
