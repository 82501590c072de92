"""Writes report.html: a run on one page, every picture inside the file.

  python launch/report.py --workdir=DIR

Run launch/evaluate.py before it: recalls and examples are read from
DIR/eval/retrieval. Charts are also written to `plots` beside the page.

Exit code 0: done. 2: `error: ...` says what to change.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Sequence

from absl import flags

from glscl_jax import atomic, command_line, errors
from glscl_jax.data import sources
from glscl_jax.export import report, selection
from glscl_jax.export import weights as weights_lib


def parse(argv: Sequence[str]) -> flags.FlagValues:
  """Reads the command line.

  Raises:
    absl.flags.Error: anything that is wrong with it.
  """
  # Not the global FLAGS, so that one process may parse several times.
  values = flags.FlagValues()
  flags.DEFINE_string(
    "workdir",
    None,
    "Work dir of a run, or an export directory.",
    flag_values=values,
  )
  flags.DEFINE_string(
    "data",
    "",
    "Data directory (default: the one of the training).",
    flag_values=values,
  )
  flags.DEFINE_list(
    "splits",
    [],
    "Splits of the examples (default: the held-out ones).",
    flag_values=values,
  )
  flags.DEFINE_string(
    "step",
    "auto",
    "best (by validation), latest, a number, or auto: best if the run was "
    "validated, else latest.",
    flag_values=values,
  )
  flags.DEFINE_string(
    "output", "", "The file (default: WORKDIR/report.html).", flag_values=values
  )
  flags.DEFINE_integer(
    "num_examples",
    6,
    "Queries a split and direction.",
    lower_bound=1,
    flag_values=values,
  )
  flags.DEFINE_integer("seed", 0, "Chooses the examples.", flag_values=values)
  return command_line.parse(values, argv, doc=__doc__, required=["workdir"])


def main(argv: Sequence[str]) -> int:
  """Runs the command line `argv` and returns the exit code."""
  return command_line.run(lambda: _run(parse(argv)))


def _run(values: flags.FlagValues) -> int:
  workdir = pathlib.Path(values.workdir)
  output = pathlib.Path(values.output or workdir / "report.html")
  errors.check_file(output, option=f"--output={output}")
  charts = output.parent / "plots"
  errors.check_writable(charts, option=f"--output={output}")
  model = weights_lib.open_weights(workdir, step=values.step)
  data_dir = model.data_dir(values.data)
  sources.check_splits(data_dir, values.splits, option="--splits")
  page = report.make_report(
    workdir,
    model,
    data_dir=data_dir,
    charts=charts,
    options=selection.Options(
      num_queries=values.num_examples,
      num_maps=values.num_examples,
      splits=tuple(values.splits),
      seed=values.seed,
    ),
  )
  output.parent.mkdir(parents=True, exist_ok=True)
  atomic.write_text(output, page)
  print(f"wrote {output} ({len(page) / 2**20:.1f} MiB)")
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv))
