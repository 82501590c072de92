"""Writes the weights of a run as files for use elsewhere.

  python launch/export.py --workdir=DIR --format=safetensors --output=OUT

OUT gets model.safetensors, config.json, the tokenizer and manifest.json with
the sha256 of each, the step, the metrics measured at that step and the
lineage. launch/evaluate.py and train.init_from take OUT in place of a work dir.
"""

from __future__ import annotations

import pathlib
import sys
from typing import Any

from absl import app, flags, logging

from glscl_jax import config as config_lib
from glscl_jax.data import pairs, tokenizer
from glscl_jax.export import weights as weights_lib
from glscl_jax.tasks import results
from glscl_jax.train import checkpoint

_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Work dir of a run.", required=True
)
_FORMAT = flags.DEFINE_enum(
  "format", "safetensors", ["safetensors"], "Format of the weights."
)
_OUTPUT = flags.DEFINE_string(
  "output", None, "The directory to make.", required=True
)
_STEP = flags.DEFINE_string(
  "step",
  "auto",
  "best (by validation), latest, a number, or auto: best if the run was "
  "validated, else latest.",
)


def measured(workdir: pathlib.Path, step: int) -> dict[str, Any]:
  """Results of launch/evaluate.py on this very step, by task."""
  found = {}
  for path in sorted(workdir.glob(f"eval/*/{results.METRICS}")):
    kept = {
      f"{data}/{split}/{protocol}": entry["metrics"]
      for data, splits in results.read(path)["results"].items()
      for split, protocols in splits.items()
      for protocol, entry in protocols.items()
      if entry["lineage"]["step"] == step
    }
    if kept:
      found[path.parent.name] = kept
  return found


def main(argv: list[str]) -> None:
  """Exports, reads back, and ends with one line on a mistake."""
  if len(argv) > 1:
    raise app.UsageError(f"unknown arguments {argv[1:]}")
  logging.set_verbosity(logging.WARNING)  # of the libraries
  try:
    model = weights_lib.open_weights(_WORKDIR.value, step=_STEP.value)
    validation = {"validation": model.metrics} if model.metrics else {}
    metrics = validation | measured(pathlib.Path(_WORKDIR.value), model.step)
    manifest = weights_lib.save_export(
      _OUTPUT.value,
      weights_lib.Weights(
        config=model.config,
        params=model.params,
        tokenizer_path=model.tokenizer_path,
        step=model.step,
        metrics=metrics,
        lineage=model.lineage,
      ),
    )
    weights_lib.load_export(_OUTPUT.value)
  except (
    weights_lib.WeightsError,
    checkpoint.CheckpointError,
    results.ResultError,
    pairs.DataError,
    tokenizer.TokenizerError,
    config_lib.ConfigError,
  ) as error:
    sys.exit(f"error: {error}")
  size = sum(entry["size"] for entry in manifest["files"].values())
  print(
    f"{_OUTPUT.value}: step {model.step}, {manifest['num_parameters']:,} "
    f"parameters, {size / 2**20:.1f} MiB"
  )


if __name__ == "__main__":
  app.run(main)
