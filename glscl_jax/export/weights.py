"""Trained weights as files that verify themselves, and one way to open both.

An export directory holds

  model.safetensors   float32 arrays named by their path joined with "."
  config.json         the whole configuration of the run
  tokenizer.model     or tokenizer.json, the very file the run used
  manifest.json       sha256 and size of each file, step, metrics, lineage

`load_export` refuses a directory whose bytes, names or shapes are not those of
the manifest and of the configuration. `open_weights` opens an export or a work
dir, whichever a path is.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy

from glscl_jax import atomic, errors
from glscl_jax import config as config_lib
from glscl_jax.data import pairs, sources
from glscl_jax.data import tokenizer as tokenizers
from glscl_jax.systems import registry
from glscl_jax.train import checkpoint, initial
from glscl_jax.types import Params

MANIFEST = "manifest.json"
MODEL = "model.safetensors"
CONFIG = "config.json"
FORMAT = "glscl_jax-safetensors"
FORMAT_VERSION = 1


class WeightsError(errors.UserError):
  """Weights that cannot be opened or written; the message names the file."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
  """A model with what is known about it."""

  config: config_lib.Config
  params: Params
  tokenizer_path: pathlib.Path
  step: int  # optimizer steps seen
  metrics: dict[str, Any]  # measured on these very weights; may be empty
  lineage: dict[str, Any]  # data and runs the weights come from

  def data_dir(self, chosen: str) -> str:
    """`chosen`, else the directory that the training read.

    Raises:
      WeightsError: both are empty.
    """
    found = chosen or self.config.data.dir
    if not chosen and not pathlib.Path(found).is_dir():
      # As the training was told; relative to where it was started.
      found = self.lineage.get("data_dir", found)
    if not found:
      raise WeightsError(
        "the weights name no data (their config.data.dir is empty): give "
        "--data=DIR"
      )
    return found


def name_arrays(params: Params) -> dict[str, np.ndarray]:
  """Arrays by the names of the file, such as "vision.ln_pre.scale"."""
  flat = checkpoint.flatten(params, separator=".")
  return {name: np.asarray(leaf) for name, leaf in flat.items()}


def unflatten(flat: Mapping[str, np.ndarray]) -> Params:
  """The nested dict that `name_arrays` took apart."""
  tree: dict[str, Any] = {}
  for name, array in flat.items():
    *parents, last = name.split(".")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = array
  return tree


def save_export(
  directory: str | os.PathLike[str], weights: Weights
) -> dict[str, Any]:
  """Writes an export directory and returns its manifest.

  The directory appears whole or not at all. An earlier export in its place is
  replaced; results and reports that stand beside it there are kept.

  Raises:
    WeightsError: the place is taken by something that is not an export, or a
      parameter is not finite.
  """
  target = pathlib.Path(directory).absolute()
  if target.exists() and not is_export(target) and any(target.iterdir()):
    raise WeightsError(
      f"{target} exists and is no export: choose another --output"
    )
  flat = name_arrays(weights.params)
  for name, array in flat.items():
    if not np.isfinite(array).all():
      raise WeightsError(f"parameter {name} is not finite: nothing is exported")
  with atomic.new_folder(target) as whole:
    whole.mkdir()
    manifest = _write(whole, weights, flat)
    _copy_others(target, whole)
  return manifest


def _write(
  folder: pathlib.Path, weights: Weights, flat: Mapping[str, np.ndarray]
) -> dict[str, Any]:
  safetensors.numpy.save_file(
    {name: np.array(array, order="C") for name, array in flat.items()},
    folder / MODEL,
    # One entry: with several their order, and so the bytes, would vary.
    metadata={"format": FORMAT},
  )
  config_text = config_lib.to_json(weights.config) + "\n"
  (folder / CONFIG).write_text(config_text, encoding="utf-8")
  tokenizer_name = f"tokenizer{weights.tokenizer_path.suffix}"
  shutil.copyfile(weights.tokenizer_path, folder / tokenizer_name)
  # The library makes a file that its owner alone may read.
  shutil.copymode(folder / CONFIG, folder / MODEL)
  manifest = {
    "format": FORMAT,
    "format_version": FORMAT_VERSION,
    "system": weights.config.system,
    "step": weights.step,
    "num_parameters": int(sum(array.size for array in flat.values())),
    "metrics": weights.metrics,
    "lineage": weights.lineage,
    "config_sha256": config_lib.sha256(weights.config),
    "files": {
      path.name: {
        "sha256": pairs.sha256_of(path),
        "size": path.stat().st_size,
      }
      for path in sorted(folder.iterdir())
    },
  }
  text = json.dumps(manifest, indent=2, sort_keys=True, allow_nan=False)
  (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")
  return manifest


def _copy_others(old: pathlib.Path, new: pathlib.Path) -> None:
  """What stood beside an earlier export: results and reports written there."""
  if not is_export(old):
    return
  exported = {MANIFEST, *_read_manifest(old)["files"]}
  for path in old.iterdir():
    if path.name in exported:
      continue
    if path.is_dir():
      shutil.copytree(path, new / path.name, symlinks=True)
    else:
      shutil.copy2(path, new / path.name, follow_symlinks=False)


def load_export(directory: str | os.PathLike[str]) -> Weights:
  """Reads and verifies an export directory; arrays stay NumPy.

  Raises:
    WeightsError: a file that is missing or has other bytes than the manifest
      says, or parameters that are not those the configuration asks for.
  """
  root = pathlib.Path(directory).absolute()
  manifest = _read_manifest(root)
  for name, entry in manifest["files"].items():
    _check_file(root / name, entry)
  stored = json.loads((root / CONFIG).read_text(encoding="utf-8"))
  config = config_lib.from_config_dict(
    checkpoint.complete_config(stored, where=str(root / CONFIG))
  )
  try:
    flat = safetensors.numpy.load_file(root / MODEL)
  except (OSError, safetensors.SafetensorError) as error:
    raise WeightsError(f"{root / MODEL}: {error}") from error
  check_parameters(flat, config, where=str(root / MODEL))
  return Weights(
    config=config,
    params=unflatten(flat),
    tokenizer_path=sources.tokenizer_path(root),
    step=manifest["step"],
    metrics=manifest["metrics"],
    lineage=manifest["lineage"],
  )


def check_parameters(
  flat: Mapping[str, np.ndarray], config: config_lib.Config, *, where: str
) -> None:
  """Compares names and shapes with those that `config` asks for.

  Raises:
    WeightsError: lists what is missing, unexpected or of another shape.
  """
  system = registry.find(config)
  abstract = jax.eval_shape(lambda: system.init(config, jax.random.key(0)))
  wanted = {
    name: tuple(leaf.shape)
    for name, leaf in checkpoint.flatten(abstract, separator=".").items()
  }
  found = {name: tuple(array.shape) for name, array in flat.items()}
  lines = [f"  {name}: missing" for name in sorted(wanted.keys() - found)]
  lines += [f"  {name}: unexpected" for name in sorted(found.keys() - wanted)]
  lines += [
    f"  {name}: shape {found[name]}, the configuration asks for {wanted[name]}"
    for name in sorted(found.keys() & wanted)
    if found[name] != wanted[name]
  ]
  if lines:
    raise WeightsError(
      f"{where} does not fit its configuration:\n" + "\n".join(lines[:20])
    )


def open_weights(
  path: str | os.PathLike[str], *, step: str | int = "auto"
) -> Weights:
  """Opens a work dir or an export directory.

  Args:
    path: either.
    step: of a work dir, as for `checkpoint.find_step`. An export holds one
      step; only that number or "auto" fits.

  Raises:
    WeightsError: neither a work dir nor an export, or a tokenizer that is
      not the one of the training.
    CheckpointError: no such checkpoint.
  """
  root = pathlib.Path(path).absolute()
  if is_export(root):
    weights = load_export(root)
    if step not in ("auto", weights.step, str(weights.step)):
      raise WeightsError(
        f"{root} is an export of step {weights.step}; it has no step {step!r}"
      )
    return weights
  if not (root / "checkpoints").is_dir():
    raise WeightsError(
      f"{root} is neither a work dir of launch/train.py (no checkpoints/) nor "
      f"a directory made by launch/export.py (no {MANIFEST})"
    )
  snapshot = checkpoint.restore_params(root, step=step)
  tokenizer_path = sources.tokenizer_path(root)
  expected = snapshot.lineage["tokenizer_sha256"]
  found = tokenizers.load(tokenizer_path).sha256
  if found != expected:
    raise WeightsError(
      f"{tokenizer_path} has sha256 {found[:12]}, the checkpoint was trained "
      f"with {expected[:12]}: put the right file there"
    )
  return Weights(
    config=snapshot.config,
    params=snapshot.params,
    tokenizer_path=tokenizer_path,
    step=snapshot.step,
    metrics=dict(snapshot.metrics),
    lineage=dict(snapshot.lineage),
  )


def read_params(path: str) -> tuple[Params, dict[str, Any]]:
  """Parameters and lineage of what `train.init_from` names.

  An export directory, or what `train/initial.py` reads itself: a work dir, or
  one of its checkpoints.
  """
  if is_export(path):
    weights = load_export(path)
    return weights.params, weights.lineage
  return initial.read_work_dir(path)


def params_sha256(params: Params) -> str:
  """A fingerprint of all values, for result files."""
  digest = hashlib.sha256()
  for name, array in sorted(name_arrays(params).items()):
    digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
    digest.update(array.tobytes())
  return digest.hexdigest()


def is_export(path: str | os.PathLike[str]) -> bool:
  """Whether a directory looks like one of `save_export`; verifies nothing."""
  root = pathlib.Path(path)
  return (root / MANIFEST).is_file() and (root / MODEL).is_file()


def _read_manifest(root: pathlib.Path) -> dict[str, Any]:
  path = root / MANIFEST
  try:
    manifest = json.loads(path.read_text(encoding="utf-8"))
    kind, version = manifest["format"], manifest["format_version"]
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise WeightsError(
      f"{path}: not the manifest of an export ({error!r})"
    ) from error
  if (kind, version) != (FORMAT, FORMAT_VERSION):
    raise WeightsError(
      f"{path}: format {kind} version {version}, this version reads {FORMAT} "
      f"version {FORMAT_VERSION}"
    )
  return manifest


def _check_file(path: pathlib.Path, entry: Mapping[str, Any]) -> None:
  if not path.is_file():
    raise WeightsError(f"{path} is missing; export again")
  size = path.stat().st_size
  if size != entry["size"]:
    raise WeightsError(
      f"{path} has {size} bytes, the manifest says {entry['size']}: the copy "
      "is not whole; copy or export it again"
    )
  found = pairs.sha256_of(path)
  if found != entry["sha256"]:
    raise WeightsError(
      f"{path} is damaged: sha256 {found[:12]}.., the manifest says "
      f"{entry['sha256'][:12]}..; copy or export it again"
    )
