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

from glscl_jax import config as config_lib
from glscl_jax.data import pairs, tokenizer
from glscl_jax.export import weights as weights_lib
from glscl_jax.tasks import results
from glscl_jax.train import checkpoint


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
  if any(arg in ("-h", "--help", "-help") for arg in argv[1:]):
    print(f"{__doc__}\n{values.main_module_help()}")
    raise SystemExit(0)
  rest = values(list(argv))[1:]
  if rest:
    raise flags.Error(f"argument {rest[0]!r} is no flag")
  for name in ("workdir", "output"):
    if not values[name].value:
      raise flags.Error(f"--{name} is missing; see --help")
  return values


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


def export(
  workdir: pathlib.Path, output: pathlib.Path, *, step: str
) -> dict[str, Any]:
  """Writes the directory, reads it back and returns its manifest."""
  model = weights_lib.open_weights(workdir, step=step)
  validation = {"validation": model.metrics} if model.metrics else {}
  manifest = weights_lib.save_export(
    output,
    dataclasses.replace(
      model, metrics=validation | measured(workdir, model.step)
    ),
  )
  weights_lib.load_export(output)
  return manifest


def main(argv: Sequence[str]) -> int:
  """Runs the command line `argv` and returns the exit code."""
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()  # libraries read some of their flags
  try:
    values = parse(argv)
    manifest = export(
      pathlib.Path(values.workdir),
      pathlib.Path(values.output),
      step=values.step,
    )
  except (
    flags.Error,
    weights_lib.WeightsError,
    checkpoint.CheckpointError,
    results.ResultError,
    pairs.DataError,
    tokenizer.TokenizerError,
    config_lib.ConfigError,
  ) as error:
    print(f"error: {error}", file=sys.stderr)
    return 2
  size = sum(entry["size"] for entry in manifest["files"].values())
  print(
    f"{values.output}: step {manifest['step']}, "
    f"{manifest['num_parameters']:,} parameters, {size / 2**20:.1f} MiB"
  )
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv))
