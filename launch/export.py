"""Writes the weights of a run as files for use elsewhere.

  python launch/export.py --workdir=DIR --format=safetensors --output=OUT

OUT gets model.safetensors, config.json, the tokenizer and manifest.json with
the sha256 of each, the step, the metrics measured at that step and the
lineage. launch/evaluate.py and train.init_from take OUT in place of a work dir.

Exit code 0: done. 2: `error: ...` says what to change.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags

from glscl_jax import command_line, errors
from glscl_jax.export import weights as weights_lib
from glscl_jax.tasks import results


def parse(argv: Sequence[str]) -> flags.FlagValues:
  """Reads the command line.

  Raises:
    absl.flags.Error: anything that is wrong with it.
  """
  # Not the global FLAGS, so that one process may parse several times.
  values = flags.FlagValues()
  flags.DEFINE_string("workdir", None, "Work dir of a run.", flag_values=values)
  flags.DEFINE_enum(
    "format",
    "safetensors",
    ["safetensors"],
    "Format of the weights.",
    flag_values=values,
  )
  flags.DEFINE_string(
    "output", None, "The directory to make.", flag_values=values
  )
  flags.DEFINE_string(
    "step",
    "auto",
    "best (by validation), latest, a number, or auto: best if the run was "
    "validated, else latest.",
    flag_values=values,
  )
  return command_line.parse(
    values, argv, doc=__doc__, required=["workdir", "output"]
  )


def measured(
  workdir: pathlib.Path, model: weights_lib.Weights
) -> dict[str, Any]:
  """Results of launch/evaluate.py on these very weights, by task."""
  found, fingerprint = {}, weights_lib.params_sha256(model.params)
  for path in sorted(workdir.glob(f"eval/*/{results.METRICS}")):
    kept = {
      f"{data}/{split}/{protocol}": entry["metrics"]
      for data, splits in results.read(path)["results"].items()
      for split, protocols in splits.items()
      for protocol, entry in protocols.items()
      if entry["lineage"]["params_sha256"] == fingerprint
    }
    if kept:
      found[path.parent.name] = kept
  return found


def export(
  workdir: pathlib.Path, output: pathlib.Path, *, step: str
) -> dict[str, Any]:
  """Writes the directory, reads it back and returns its manifest."""
  model = weights_lib.open_weights(workdir, step=step)
  validation = {"validation": model.metrics} if model.metrics else {}
  manifest = weights_lib.save_export(
    output,
    dataclasses.replace(model, metrics=validation | measured(workdir, model)),
  )
  weights_lib.load_export(output)
  return manifest


def main(argv: Sequence[str]) -> int:
  """Runs the command line `argv` and returns the exit code."""
  return command_line.run(lambda: _run(parse(argv)))


def _run(values: flags.FlagValues) -> int:
  errors.check_replaceable(values.output, option=f"--output={values.output}")
  manifest = export(
    pathlib.Path(values.workdir), pathlib.Path(values.output), step=values.step
  )
  size = sum(entry["size"] for entry in manifest["files"].values())
  print(
    f"{values.output}: step {manifest['step']}, "
    f"{manifest['num_parameters']:,} parameters, {size / 2**20:.1f} MiB"
  )
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv))
