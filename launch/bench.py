r"""Measures how fast a recipe trains on this machine.

  python launch/bench.py --config=configs/glscl_base.py \
    --config.data.dir=DATA --config.data.batch_size=256 [--output=FILE.json]

Takes what launch/train.py takes, and trains nothing that is kept.
--against=torch times the published step in PyTorch on the same batch too, on
the CPU, and its images, and prints ratios. Exit code 0: done. 2: `error: ...`
says what to change.
"""

from __future__ import annotations

import os
import pathlib
import sys
from collections.abc import Sequence

from glscl_jax import huge_pages

if __name__ == "__main__":
  huge_pages.use()  # starts anew, so before all that takes long to import

# Before jax is imported: its C++ log is for its developers.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from absl import flags

from glscl_jax import atomic, command_line, errors
from glscl_jax import config as config_lib
from glscl_jax.train import bench


def parse(argv: Sequence[str]) -> flags.FlagValues:
  """Reads the command line.

  Raises:
    absl.flags.Error, ConfigError: anything that is wrong with it.
  """
  # Not the global FLAGS, so that one process may parse several times.
  values = flags.FlagValues()
  flags.DEFINE_integer(
    "steps", 20, "Steps that are timed.", lower_bound=1, flag_values=values
  )
  flags.DEFINE_enum(
    "against", "", ["", "torch"], "What else is timed.", flag_values=values
  )
  flags.DEFINE_string(
    "output", "", "JSON file of the figures.", flag_values=values
  )
  return command_line.parse_recipe(values, argv, doc=__doc__)


def main(argv: Sequence[str]) -> int:
  """Runs the command line `argv` and returns the exit code."""
  return command_line.run(lambda: _run(parse(argv)))


def _run(values: flags.FlagValues) -> int:
  config = config_lib.from_config_dict(values.config)
  if values.output:
    errors.check_file(
      pathlib.Path(values.output), option=f"--output={values.output}"
    )
  found = bench.bench(
    config, num_steps=values.steps, against_torch=values.against == "torch"
  )
  print(bench.format_figures(found))
  if values.output:
    atomic.write_text(pathlib.Path(values.output), found.to_json() + "\n")
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv))
