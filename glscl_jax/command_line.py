"""What the commands of launch/ share: how flags are read and how they end.

Exit code 0: done. 2: `error: ...` on standard error says what to change.
"""

from __future__ import annotations

import dataclasses
import difflib
import sys
import typing
from collections.abc import Callable, Iterator, Sequence

from absl import flags
from ml_collections import config_flags

from glscl_jax import config as config_lib
from glscl_jax import errors


def parse(
  values: flags.FlagValues,
  argv: Sequence[str],
  *,
  doc: str,
  required: Sequence[str],
) -> flags.FlagValues:
  """Reads the command line into `values`; --help prints `doc` and the flags.

  Raises:
    absl.flags.Error: anything that is wrong with it.
  """
  if wants_help(argv):
    print(f"{doc}\n{values.main_module_help()}")
    raise SystemExit(0)
  check_rest(values(list(argv)))
  for name in required:
    if not values[name].value:
      raise flags.Error(f"--{name} is missing; see --help")
  return values


def parse_recipe(
  values: flags.FlagValues,
  argv: Sequence[str],
  *,
  doc: str,
  required: Sequence[str] = (),
) -> flags.FlagValues:
  """As `parse`, of a command that takes a recipe: --config and --config.a.b.

  Raises:
    absl.flags.Error, ConfigError: anything that is wrong with it.
  """
  argv = list(argv)
  config_flags.DEFINE_config_file(
    "config",
    None,
    "File with get_config(), and :argument for it.",
    flag_values=values,
    sys_argv=argv,
  )
  if not wants_help(argv):
    check_keys(argv[1:])
  try:
    parse(values, argv, doc=doc, required=("config", *required))
    values.config.keys()  # a recipe that could not be read raises only here
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


def wants_help(argv: Sequence[str]) -> bool:
  """Whether --help stands in the command line."""
  return any(arg in ("-h", "--help", "-help") for arg in argv[1:])


def check_rest(argv: Sequence[str]) -> None:
  """Raises absl.flags.Error if arguments are left besides the program."""
  if len(argv) > 1:
    raise flags.Error(f"argument {argv[1]!r} is no flag")


def run(command: Callable[[], int]) -> int:
  """The exit code of `command`; 2 if it ends with a mistake of the user."""
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()  # libraries read some of their flags
  try:
    return command()
  except (flags.Error, errors.UserError) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
