"""Gradients of a whole batch, one micro-batch in memory at a time.

    L = sum_k local(p, x_k) + contrast(p, f(p, x_1) .. f(p, x_K))

Losses over the whole batch read features f of every sample, so that gradients
of micro-batches cannot just be added up. Two passes (GradCache, 2101.06983):

  1. f of all micro-batches without gradients, and what local means count;
     then the gradients of the contrast, dC/dp and dC/df_k;
  2. for each micro-batch one vector-Jacobian product,
     d local/dp + (dC/df_k) . df_k/dp.

Loss and gradients are those of the batch in one piece, what is drawn included
(`draws.py`). Held at once: one micro-batch, and the features of all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from glscl_jax import config as config_lib
from glscl_jax import draws
from glscl_jax.systems import registry, terms
from glscl_jax.types import BATCH_AXES, Batch, Params

Tree = Any  # of arrays whose leading axis counts samples
# Groups that meet inside a micro-batch.
LOCAL_GROUPS = ("neg_group", "amc_pair_group")


def gradients(
  params: Params,
  batch: Batch,
  *,
  config: config_lib.Config,
  key: jax.Array,
  step: jax.Array,
) -> tuple[Params, dict[str, jax.Array]]:
  """Gradients of the step's loss, and its scalars.

  Args:
    params: of the run.
    batch: the whole one.
    config: the run's; `train.accumulate` is the number of micro-batches.
    key: of this step.
    step: of training.
  """
  system, number = registry.find(config), config.train.accumulate
  if number > 1:
    return _two_passes(params, batch, config=config, key=key, step=step)

  def loss(params: Params) -> tuple[jax.Array, dict[str, jax.Array]]:
    output = system.loss(params, batch, config=config, key=key, step=step)
    return output.loss, output.metrics

  return jax.grad(loss, has_aux=True)(params)


def _two_passes(
  params: Params,
  batch: Batch,
  *,
  config: config_lib.Config,
  key: jax.Array,
  step: jax.Array,
) -> tuple[Params, dict[str, jax.Array]]:
  system, number = registry.find(config), config.train.accumulate
  weights = system.weights(config, key)
  num_parts = find_parts(config, jax.sharding.get_abstract_mesh().shape)
  index_K, batch_K = jnp.arange(number), cut(batch, number, num_parts)

  def parts(params: Params, index: jax.Array, rows: Batch) -> terms.Parts:
    with draws.share(draws.Share(index, number, num_parts)):
      return system.parts(params, rows, config=config, key=key, step=step)

  def look(_, piece):
    found = parts(params, *piece)
    counts = _map_means(
      lambda mean: jnp.float32(mean.count), (found.local, found.extra)
    )
    return None, (counts, found.features)

  _, (counts_K, features_K) = jax.lax.scan(look, None, (index_K, batch_K))
  counts = jax.tree.map(lambda count_K: jnp.sum(count_K, axis=0), counts_K)

  def contrast(params: Params, features: Tree):
    wide = system.contrast(params, features, batch, config=config)
    return _total(wide, weights), wide

  features = join(features_K, num_parts)
  (gradient, d_features), wide = jax.grad(
    contrast, argnums=(0, 1), has_aux=True
  )(params, features)

  def pull(gradient, piece):
    index, rows, d_rows = piece

    def give(params: Params):
      found = parts(params, index, rows)
      # What this piece adds to the mean over all.
      own = _map_means(
        lambda mean, count: terms.Mean(
          mean.value * mean.count / jnp.maximum(count, 1.0), 1.0
        ),
        (found.local, found.extra),
        counts,
      )
      return (_total(own[0], weights), found.features), own

    _, pull_back, own = jax.vjp(give, params, has_aux=True)
    (d_params,) = pull_back((jnp.ones(()), d_rows))
    return jax.tree.map(jnp.add, gradient, d_params), own

  gradient, own_K = jax.lax.scan(
    pull, gradient, (index_K, batch_K, cut(d_features, number, num_parts))
  )
  local, extra = jax.tree.map(lambda own_K: jnp.sum(own_K, axis=0), own_K)
  return gradient, terms.weighted_sum(local | wide, weights, extra).metrics


def _map_means(function: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
  """Maps over the means of `tree`, and what stands there in the others."""
  return jax.tree.map(
    function, tree, *rest, is_leaf=lambda node: isinstance(node, terms.Mean)
  )


def _total(
  found: Mapping[str, terms.Term], weights: Mapping[str, Any]
) -> jax.Array:
  """What some of the objectives give to the loss."""
  theirs = {name: weights[name] for name in found}
  return terms.weighted_sum(found, theirs, {}).loss


def cut(tree: Tree, number: int, num_parts: int) -> Tree:
  """(K, A, ..): micro-batches of one piece of each of `num_parts` runs.

  With a run a device, rows stay on the device that holds them.
  """

  def of_leaf(x: jax.Array) -> jax.Array:
    length = x.shape[0] // (number * num_parts)
    pieces = x.reshape(num_parts, number, length, *x.shape[1:])
    cut = pieces.swapaxes(0, 1).reshape(number, -1, *x.shape[1:])
    return _spread(cut, P(None, BATCH_AXES))

  return jax.tree.map(of_leaf, tree)


def join(tree: Tree, num_parts: int) -> Tree:
  """Undoes `cut`."""

  def of_leaf(x: jax.Array) -> jax.Array:
    number, rows = x.shape[:2]
    pieces = x.reshape(number, num_parts, rows // num_parts, *x.shape[2:])
    whole = pieces.swapaxes(0, 1).reshape(number * rows, *x.shape[2:])
    return _spread(whole, P(BATCH_AXES))

  return jax.tree.map(of_leaf, tree)


def _spread(x: jax.Array, spec: P) -> jax.Array:
  """Over the devices of the mesh of the context, if there is one."""
  if not set(BATCH_AXES) <= set(jax.sharding.get_abstract_mesh().axis_names):
    return x
  return jax.lax.with_sharding_constraint(x, spec)


def find_parts(config: config_lib.Config, mesh_shape: Mapping[str, int]) -> int:
  """How many runs of samples give a piece to each micro-batch.

  As many as devices where the pieces hold whole groups: then no sample leaves
  its device. Fewer otherwise.

  Args:
    config: the run's.
    mesh_shape: size of each mesh axis.

  Raises:
    ConfigError: micro-batches cannot be spread over the devices, or are smaller
      than what has to be in one.
  """
  number, batch_size = config.train.accumulate, config.data.batch_size
  num_devices = math.prod(mesh_shape.get(axis, 1) for axis in BATCH_AXES)
  if number == 1:
    return num_devices
  if batch_size % (number * num_devices):
    raise config_lib.ConfigError(
      f"config.train.accumulate: {number} micro-batches on {num_devices} "
      f"devices do not divide data.batch_size {batch_size}; set it to "
      f"a divisor of {batch_size // num_devices}"
    )
  groups = {
    name: min(getattr(config.objectives, name), batch_size)
    for name in LOCAL_GROUPS
    if getattr(config.objectives, config_lib.GROUPS[name]) > 0
  }
  for num_parts in range(num_devices, 0, -1):
    piece, rest = divmod(batch_size, number * num_parts)
    if num_devices % num_parts or rest:
      continue
    if all(piece % group == 0 for group in groups.values()):
      return num_parts
  name = next(n for n, group in groups.items() if batch_size // number % group)
  raise config_lib.ConfigError(
    f"config.train.accumulate: {number} micro-batches of "
    f"{batch_size // number} samples do not hold whole groups of "
    f"objectives.{name} = {groups[name]}; lower one of the two"
  )
