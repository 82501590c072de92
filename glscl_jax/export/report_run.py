"""The report on the run: its facts, curves, configuration, sources."""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from glscl_jax import config as config_lib
from glscl_jax.data import pairs
from glscl_jax.export import (
  page,
  pictures,
)
from glscl_jax.export.weights import Weights, name_arrays, params_sha256
from glscl_jax.systems import registry

CURVES = {  # metric -> title, in this order
  "loss": "loss, weighted sum",
  "mlm": "MLM (nats a masked token)",
  "itm": "ITM (nats a pair)",
  "itc": "ITC (nats a pair)",
  "mim": "MIM (deviations a pixel)",
  "ic": "IC (nats a token)",
  "tg_mim": "TG-MIM (squared deviations a pixel)",
  "amc": "AMC (nats a word and a region)",
  "wrc": "WRC (nats a pair)",
  "mrc": "MRC (nats a region)",
  "mrfr": "MRFR (squared, a value)",
  "mgsc_image": "MGSC image (nats)",
  "mgsc_text": "MGSC text (nats)",
  "mltc_image": "MLTC image (nats a patch)",
  "mltc_text": "MLTC text (nats a token)",
  "mlm_accuracy": "MLM accuracy",
  "ic_accuracy": "IC accuracy",
  "itm_accuracy": "ITM accuracy",
  "amc_word_anchor_accuracy": "AMC accuracy, anchors' words",
  "amc_word_masked_accuracy": "AMC accuracy, masked words",
  "amc_region_anchor_accuracy": "AMC accuracy, anchors' regions",
  "amc_region_hidden_accuracy": "AMC accuracy, hidden regions",
  "wrc_accuracy": "WRC accuracy",
  "itc_accuracy": "ITC accuracy in the batch",
  "itc_temperature": "ITC temperature",
  "grad_norm": "gradient norm",
  "learning_rate": "learning rate",
  "samples_per_second": "samples a second",
  "eval/mean_r1": "validation R@1, mean",
}

SHARES = frozenset(
  title
  for name, title in CURVES.items()
  if "accuracy" in name or name.startswith("eval/")
)

MAX_POINTS = 600  # of a curve


def read_metrics(path: pathlib.Path) -> list[dict[str, float]]:
  """The lines of a metrics.jsonl; a last line cut by a kill is left out."""
  if not path.is_file():
    return []
  lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
  return [json.loads(line) for line in lines if line.endswith("\n")]


def series(
  records: Iterable[Mapping[str, float]], name: str
) -> list[tuple[float, float]]:
  """(step, value) of one metric, at most MAX_POINTS of them."""
  points = [
    (record["step"], record[name])
    for record in records
    if name in record and record[name] is not None
  ]
  stride = -(-len(points) // MAX_POINTS) or 1
  # The last point is the one that is looked for.
  return points[::-1][::stride][::-1]


def facts(workdir: pathlib.Path, weights: Weights, data_dir: str) -> str:
  """What was trained on what, and how long it took."""
  config, lineage = weights.config, weights.lineage
  count = sum(array.size for array in name_arrays(weights.params).values())
  facts = {
    "System": f"{config.system}: "
    + ", ".join(
      f"{name} {getattr(config.objectives, name):g}"
      for name in config_lib.OBJECTIVES
      if getattr(config.objectives, name) > 0
    ),
    "Parameters": f"{count:,}",
    **_describe_inputs(config),
    "Fusion": registry.find(config).describe_fusion(config),
    "Steps": f"{weights.step:,} of {config.train.num_steps:,}, batch "
    f"{config.data.batch_size:,}, peak learning rate "
    f"{config.optimizer.learning_rate:g}, seed {config.train.seed}",
    "Data": _describe_data(data_dir, config),
    "Time": "; ".join(_spent(workdir)),
    "Started from": _describe_origin(lineage),
    "Fingerprints": f"weights {params_sha256(weights.params)[:12]}, config "
    f"{config_lib.sha256(config)[:12]}, tokenizer "
    f"{lineage['tokenizer_sha256'][:12]}",
  }
  rows = "".join(
    f"<tr><th>{page.text(name)}</th><td>{page.text(value)}</td></tr>"
    for name, value in facts.items()
    if value
  )
  return f'<section><h2>Run</h2><table class="facts">{rows}</table></section>'


def _describe_inputs(config: config_lib.Config) -> dict[str, str]:
  describe, model = registry.find(config).describe_inputs, config.model
  if describe is not None:
    return describe(config)
  return {
    "Image encoder": f"depth {model.vision.depth}, width "
    f"{model.vision.width}, {model.vision.image_size} px, patches of "
    f"{model.vision.patch_size} px{_describe_stem(model.vision)}",
    "Text encoder": f"depth {model.text.depth}, width {model.text.width}, "
    f"{model.text.vocab_size:,} pieces, at most {model.text.max_length} tokens",
  }


def _describe_stem(vision: config_lib.VisionConfig) -> str:
  if not vision.stem:
    return ""
  widths = ", ".join(map(str, vision.stem))
  blocks = ", ".join(map(str, vision.stem_blocks))
  return f", convolution stem of widths {widths} with {blocks} residual blocks"


def _describe_data(data_dir: str, config: config_lib.Config) -> str:
  manifest = pairs.read_manifest(data_dir)
  split = config.data.train_split
  count = (
    f", {manifest['splits'][split]:,} training records"
    if split in manifest["splits"]
    else ""
  )
  return f"{pathlib.Path(data_dir).name}{count}"


def _describe_origin(lineage: Mapping[str, Any]) -> str:
  if "imported" in lineage:
    return lineage["imported"]
  parent = lineage["init_from"] if "init_from" in lineage else None
  if not parent:
    return "random weights"
  if "workdir" in parent:
    return f"{parent['workdir']}, step {parent['step']}"
  return parent["imported"] if "imported" in parent else "other weights"


def _spent(workdir: pathlib.Path) -> list[str]:
  """What the log says of each call of the training, in order."""
  log = workdir / "log-0.txt"
  if not log.is_file():
    return []
  return re.findall(
    r"(?:finished at step|stopped by).*?; (\d+ steps in this call, time: .*)",
    log.read_text(encoding="utf-8"),
  )


def curves(records: Sequence[Mapping[str, float]], charts: pathlib.Path) -> str:
  """Losses and other scalars by step, as one chart."""
  found = {title: series(records, name) for name, title in CURVES.items()}
  found = {title: points for title, points in found.items() if points}
  if not found:
    return page.absent("Training", "There is no metrics.jsonl.")
  chart = pictures.curves(found, percent=SHARES)
  (charts / "curves.svg").write_bytes(chart)
  return (
    "<section><h2>Training</h2>"
    + page.figure(
      page.image(chart, "svg+xml", "training curves", "chart"),
      "Against optimizer steps. Dark: mean over 5% of the steps; pale: logged "
      "values. Losses in nats; validation R@1 is the mean over the validation "
      "splits and both directions.",
    )
    + "</section>"
  )


def config(weights: Weights) -> str:
  """The whole configuration."""
  text = page.text(config_lib.to_json(weights.config))
  return (
    "<section><h2>Configuration</h2><details><summary>the whole configuration"
    f"</summary><pre>{text}</pre></details></section>"
  )


def credits(data_dir: str) -> str:
  """Authors and licences of the pictures, where the data names them."""
  manifest = pairs.read_manifest(data_dir)
  if "studios" not in manifest:
    return ""
  items = ", ".join(
    f"{page.text(name)} by {page.text(entry['author'])} "
    f"({page.text(entry['licence'])})"
    for name, entry in sorted(manifest["studios"].items())
  )
  return f"<footer>Drawings: {items}.</footer>"
