"""Result files: workdir/eval/TASK/{metrics,predictions}.json.

One file holds many results. They are keyed by data set, split and protocol, so
a result replaces only an older one of the same question:

  results[data set][split][protocol] = {metrics, chance, protocol, lineage, ..}

A result without lineage or with a number that is not finite is refused. What
was not measured is absent, never 0.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from glscl_jax import atomic, errors
from glscl_jax import config as config_lib
from glscl_jax.data import pairs

METRICS = "metrics.json"
PREDICTIONS = "predictions.json"
LINEAGE_KEYS = (
  "step",
  "params_sha256",
  "config_sha256",
  "tokenizer_sha256",
  "data_manifest_sha256",
  "seed",
  "image_size",
  "eval_splits",
  "picked_as_best",
  "training",
  "regime",
)


OTHER_DATA = "other data set, overlap not checked"


class ResultError(errors.UserError):
  """A result that must not be written, or a file that cannot be read."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSet:
  """What is evaluated on."""

  name: str  # key in the result files
  path: str  # absolute
  sha256: str  # of its manifest, which holds the hash of every file
  split_sha256: Mapping[str, str]  # of the records of each split


def identify(data_dir: str | os.PathLike[str]) -> DataSet:
  """Name and fingerprint of a data directory."""
  manifest = pairs.read_manifest(data_dir)
  digest = pairs.sha256_of(pathlib.Path(data_dir) / pairs.MANIFEST)
  path = pathlib.Path(data_dir).absolute()
  return DataSet(
    name=f"{path.name}-{digest[:8]}",
    path=str(path),
    sha256=digest,
    split_sha256={
      split: pairs.hash_split(manifest, split) for split in manifest["splits"]
    },
  )


def make_lineage(
  *,
  step: int,
  params_sha256: str,
  config: config_lib.Config,
  training: Mapping[str, Any],
  data: DataSet,
  split: str,
) -> dict[str, Any]:
  """Where the weights come from and how they relate to this data set.

  `regime` says what was seen of the data set evaluated. Of another data set
  splits are compared, not single images, which may be the same. A split
  whose validation chose these weights, or weights they began from, among
  others is no held-out one.

  Args:
    step: optimizer steps the weights have seen.
    params_sha256: fingerprint of the weights.
    config: the run's.
    training: the lineage stored with the weights.
    data: the data set evaluated.
    split: the split evaluated.
  """
  seen = _collect(training, "data_sha256")
  if data.split_sha256[split] in seen:
    regime = "training data"
  elif split in _find_pickers(training, data):
    regime = "split that picked the checkpoint"
  elif seen & set(data.split_sha256.values()):
    regime = "held-out split of the training data"
  elif data.path in _collect(training, "data_dir"):
    regime = "unknown: the directory was changed after the training"
  elif seen:
    regime = OTHER_DATA
  else:
    regime = "unknown: the weights do not say what they were trained on"
  return {
    "step": step,
    "params_sha256": params_sha256,
    "config_sha256": config_lib.sha256(config),
    "tokenizer_sha256": training["tokenizer_sha256"],
    "data_manifest_sha256": data.sha256,
    "seed": config.train.seed,
    "image_size": config.model.vision.image_size,
    "eval_splits": list(config.train.validation_splits),
    # None: weights that do not say, exported before it was stored.
    "picked_as_best": (
      training["picked_as_best"] if "picked_as_best" in training else None
    ),
    "training": dict(training),
    "regime": regime,
  }


def _collect(training: Mapping[str, Any], key: str) -> frozenset[str]:
  """Values of a key in a lineage and in those of all its parents."""
  found = set()
  for name, value in training.items():
    if name == key and value:
      found.add(value)
    elif isinstance(value, Mapping):
      found |= _collect(value, key)
  return frozenset(found)


def _find_pickers(training: Mapping[str, Any], data: DataSet) -> frozenset[str]:
  """Splits of `data` that picked a checkpoint, here or of a parent."""
  found = set()
  if "picked_as_best" in training and training["picked_as_best"]:
    if training["data_sha256"] in data.split_sha256.values():
      found.update(training["eval_splits"])
  for value in training.values():
    if isinstance(value, Mapping):
      found |= _find_pickers(value, data)
  return frozenset(found)


def protocol_label(protocol: Mapping[str, Any]) -> str:
  """What a reader calls a protocol."""
  kind = protocol["rerank"]
  if kind == "none":
    label = "dual encoder (cosine)"
  elif kind == "querybank":
    label = f"dual encoder, querybank {protocol['querybank']}"
  elif kind == "querybank_conse":
    label = f"dual encoder, querybank and ConSE {protocol['querybank']}"
  elif kind == "full":
    label = "fusion (ITM) on all pairs"
  else:
    label = f"re-ranked by ITM, k = {protocol['rerank_k']}"
    if kind == "itm_plus_itc":
      label = label.replace("ITM", f"ITM + {protocol['itc_weight']:g} x cosine")
  if protocol.get("querybank_is_this_split"):
    label += " (this split itself)"
  if "views" in protocol:
    label += f", {protocol['views']} views"
  if "limit" in protocol:
    label += f", first {protocol['limit']} images"
  return label + ("" if protocol["captions"] == "first" else ", all captions")


def protocol_key(protocol: Mapping[str, Any]) -> str:
  """A short name, such as "itm_k128", "greedy_5to30" or "swap_both"."""
  if "decode" in protocol:
    return _decode_key(protocol)
  if "swap" in protocol:
    return f"swap_{protocol['swap']}"
  parts = [protocol["rerank"]]
  if "querybank" in protocol:
    parts.append(
      f"{protocol['querybank']}_t{protocol['querybank_temperature']:g}"
    )
  if "conse_temperature" in protocol:
    parts.append(f"c{protocol['conse_temperature']:g}")
  if "rerank_k" in protocol:
    parts.append(f"k{protocol['rerank_k']}")
  if "itc_weight" in protocol:
    parts.append(f"w{protocol['itc_weight']:g}")
  if "views" in protocol:
    parts.append(f"{protocol['views']}views")
  if "limit" in protocol:
    parts.append(f"first{protocol['limit']}")
  if protocol["captions"] != "first":
    parts.append(f"{protocol['captions']}_captions")
  return "_".join(parts)


def _decode_key(protocol: Mapping[str, Any]) -> str:
  parts = [protocol["decode"]]
  if protocol["decode"] == "beam":
    parts.append(f"b{protocol['beam']}_a{protocol['length_power']:g}")
  return "_".join(
    [*parts, f"{protocol['min_tokens']}to{protocol['max_tokens']}"]
  )


def write(
  directory: pathlib.Path,
  *,
  task: str,
  data: DataSet,
  result: Mapping[str, Any],
  predictions: Mapping[str, Any],
) -> None:
  """Adds one result to the files of `directory`; replaces its own kind only.

  Args:
    directory: made when missing.
    task: such as "retrieval".
    data: the data set evaluated.
    result: needs split, protocol, metrics and lineage.
    predictions: what the model answered to every query.

  Raises:
    ResultError: lineage is incomplete or a number is not finite.
  """
  missing = [
    key
    for key in LINEAGE_KEYS
    if "lineage" not in result or key not in result["lineage"]
  ]
  if missing:
    raise ResultError(f"no lineage {missing}: the result is not written")
  _check_finite(result, "result")
  place = (data.name, result["split"], protocol_key(result["protocol"]))
  directory.mkdir(parents=True, exist_ok=True)
  for name, entry in ((METRICS, result), (PREDICTIONS, predictions)):
    tree = read(directory / name)
    tree["task"] = task
    node = tree["results"]
    for key in place[:-1]:
      node = node.setdefault(key, {})
    node[place[-1]] = dict(entry)
    # Predictions are for programs: without line breaks half the size.
    _write_json(directory / name, tree, indent=1 if name == METRICS else None)


def read(path: pathlib.Path) -> dict[str, Any]:
  """Reads a result file; {"results": {}} where there is none yet.

  Raises:
    ResultError: the file is not one.
  """
  if not path.is_file():
    return {"results": {}}
  try:
    tree = json.loads(path.read_text(encoding="utf-8"))
    tree["results"]
  except (ValueError, KeyError, TypeError) as error:
    raise ResultError(
      f"{path} is not a result file ({error!r}); move it away"
    ) from error
  return tree


def _check_finite(value: Any, path: str) -> None:
  if isinstance(value, Mapping):
    for key, item in value.items():
      _check_finite(item, f"{path}.{key}")
  elif isinstance(value, list | tuple):
    for i, item in enumerate(value):
      _check_finite(item, f"{path}[{i}]")
  elif isinstance(value, float) and not math.isfinite(value):
    raise ResultError(f"{path} is {value}: the result is not written")


def _write_json(
  path: pathlib.Path, tree: Mapping[str, Any], *, indent: int | None
) -> None:
  text = json.dumps(tree, indent=indent, sort_keys=True, allow_nan=False)
  atomic.write_text(path, text + "\n")
