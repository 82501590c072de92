"""What the commands of launch/ share: how flags are read and how they end.

Exit code 0: done. 2: `error: ...` on standard error says what to change.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from absl import flags

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
