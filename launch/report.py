"""Writes report.html: a run on one page, every picture inside the file.

  python launch/report.py --workdir=DIR

Run launch/evaluate.py before it: recalls and examples are read from
DIR/eval/retrieval. Charts are also written to DIR/plots.
"""

from __future__ import annotations

import pathlib
import sys

from absl import app, flags, logging

from glscl_jax import config as config_lib
from glscl_jax.data import pairs, tokenizer
from glscl_jax.export import report
from glscl_jax.export import weights as weights_lib
from glscl_jax.tasks import results
from glscl_jax.train import checkpoint

_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Work dir of a run, or an export directory.", required=True
)
_DATA = flags.DEFINE_string(
  "data", "", "Data directory (default: the one of the training)."
)
_SPLITS = flags.DEFINE_list(
  "splits", [], "Splits of the examples (default: the held-out ones)."
)
_STEP = flags.DEFINE_string(
  "step",
  "auto",
  "best (by validation), latest, a number, or auto: best if the run was "
  "validated, else latest.",
)
_OUTPUT = flags.DEFINE_string(
  "output", "", "The file (default: WORKDIR/report.html)."
)
_NUM_EXAMPLES = flags.DEFINE_integer(
  "num_examples", 6, "Queries a split and direction.", lower_bound=1
)
_SEED = flags.DEFINE_integer("seed", 0, "Chooses the examples.")


def main(argv: list[str]) -> None:
  """Writes the page, and ends with one line on a mistake."""
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments {argv[1:]}")
  logging.set_verbosity(logging.WARNING)  # of the libraries
  workdir = pathlib.Path(_WORKDIR.value)
  output = pathlib.Path(_OUTPUT.value or workdir / "report.html")
  try:
    model = weights_lib.open_weights(workdir, step=_STEP.value)
    page = report.make_report(
      workdir,
      model,
      data_dir=_DATA.value or model.config.data.dir,
      options=report.Options(
        num_queries=_NUM_EXAMPLES.value,
        num_maps=_NUM_EXAMPLES.value,
        splits=tuple(_SPLITS.value),
        seed=_SEED.value,
      ),
    )
  except (
    weights_lib.WeightsError,
    checkpoint.CheckpointError,
    results.ResultError,
    pairs.DataError,
    tokenizer.TokenizerError,
    config_lib.ConfigError,
  ) as error:
    sys.exit(f"error: {error}")
  output.parent.mkdir(parents=True, exist_ok=True)
  output.write_text(page, encoding="utf-8")
  print(f"wrote {output} ({len(page) / 2**20:.1f} MiB)")


if __name__ == "__main__":
  app.run(main)
