"""Initial parameters: what `train.init_from` names and what of it fits."""

from __future__ import annotations

import dataclasses
import itertools
import os
import pathlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from glscl_jax import config as config_lib
from glscl_jax import errors, sharding
from glscl_jax.data import tokenizer as tokenizer_lib
from glscl_jax.train import checkpoint
from glscl_jax.types import Params

# Path -> (parameters, lineage): what train.init_from names.
ReadParams = Callable[[str], tuple[Params, Mapping[str, Any]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Merge:
  """What `train.init_from` brought, by parameter name."""

  loaded: tuple[str, ...]
  missing: tuple[str, ...]  # in this model only
  unexpected: tuple[str, ...]  # in the file only
  reshaped: tuple[str, ...]  # in both, of different shape: not loaded


def read_work_dir(path: str) -> tuple[Params, dict[str, Any]]:
  """Parameters and lineage of a work dir DIR or of DIR/checkpoints/STEP.

  STEP is as for `checkpoint.find_step`; DIR alone means "auto".
  """
  place, step = pathlib.Path(path).absolute(), "auto"
  if place.parent.name == "checkpoints":
    place, step = place.parent.parent, place.name
  found = checkpoint.restore_params(place, step=step)
  return found.params, found.lineage


def read_initial(
  config: config_lib.Config,
  tokenizer: tokenizer_lib.Tokenizer,
  tokenizer_path: pathlib.Path,
  read_params: ReadParams,
) -> tuple[Params, dict[str, Any]]:
  """Parameters and lineage of what `train.init_from` names.

  Raises:
    CheckpointError: it cannot be read, or was trained with another tokenizer:
      word tables of one shape would load, and their rows stand for other words.
  """
  try:
    params, lineage = read_params(config.train.init_from)
  except errors.UserError as error:
    raise checkpoint.CheckpointError(
      f"config.train.init_from: {error}"
    ) from error
  there, here = lineage["tokenizer_sha256"], tokenizer.sha256
  if there != here:
    raise checkpoint.CheckpointError(
      f"config.train.init_from: {config.train.init_from} was trained with "
      f"another tokenizer: sha256 {there[:12]} there, {here[:12]} now "
      f"({tokenizer_path}). Set config.data.tokenizer to the copy in "
      "that work dir or export."
    )
  return params, dict(lineage)


def keep_init_from(
  config: config_lib.Config,
  workdir: str | os.PathLike[str],
  *,
  warn: Callable[[str], None],
) -> config_lib.Config:
  """`config` with the `train.init_from` that a run to continue began with."""
  if not checkpoint.list_steps(workdir):
    return config
  stored = checkpoint.read_meta(workdir)["config"]["train"]["init_from"]
  asked = config.train.init_from
  if asked == stored:
    return config
  warn(
    f"config.train.init_from: {asked!r} now, but {workdir} began with "
    f"{stored!r}, which is kept: a run that continues reads neither"
  )
  return dataclasses.replace(
    config, train=dataclasses.replace(config.train, init_from=stored)
  )


def merge_params(params: Params, loaded: Params) -> tuple[Params, Merge]:
  """Replaces the parameters whose name and shape agree.

  Args:
    params: of a fresh state; decides names, types and shardings.
    loaded: any nested dict of arrays.
  """
  there = checkpoint.flatten(loaded)
  here = checkpoint.flatten(params)
  same = {
    name
    for name in here.keys() & there.keys()
    if here[name].shape == there[name].shape
  }

  def choose(name: str, leaf: jax.Array) -> jax.Array:
    if name not in same:
      return leaf
    array = np.asarray(there[name], dtype=leaf.dtype)
    return jax.make_array_from_callback(
      leaf.shape, leaf.sharding, lambda index: array[index]
    )

  return sharding.map_with_name(choose, params), Merge(
    loaded=tuple(sorted(same)),
    missing=tuple(sorted(here.keys() - there.keys())),
    unexpected=tuple(sorted(there.keys() - here.keys())),
    reshaped=tuple(sorted((here.keys() & there.keys()) - same)),
  )


def check_merge(path: str, merge: Merge) -> None:
  """Raises CheckpointError where nothing could be loaded."""
  if not merge.loaded:
    raise checkpoint.CheckpointError(
      f"config.train.init_from: nothing of {path} fits this model: no "
      "parameter has the same name and shape"
    )


def format_merge(path: str, merge: Merge) -> str:
  """Counts and names of what was not loaded, whole branches as one entry."""
  lines = [f"init_from {path}: {len(merge.loaded)} parameters loaded"]
  kinds = {
    "missing there, new here": merge.missing,
    "unexpected there, left out": merge.unexpected,
    "of another shape, new here": merge.reshaped,
  }
  everything = {*merge.loaded, *itertools.chain(*kinds.values())}
  for label, names in kinds.items():
    branches = _branches(names, others=everything.difference(names))
    listed = f": {', '.join(branches)}" if names else ""
    lines.append(f"  {len(names)} {label}{listed}")
  return "\n".join(lines)


def _branches(
  names: Sequence[str], *, others: Collection[str], root: str = ""
) -> list[str]:
  """`names` below `root`; a branch with none of `others` as "branch/* (5)"."""
  inside = [name for name in names if name.startswith(root)]
  if len(inside) == 1:
    return inside
  if root and not any(name.startswith(root) for name in others):
    return [f"{root}* ({len(inside)})"]
  found = []
  for part in sorted({name[len(root) :].partition("/")[0] for name in inside}):
    leaf = root + part
    if leaf in inside:
      found.append(leaf)
    else:
      found += _branches(inside, others=others, root=f"{leaf}/")
  return found
