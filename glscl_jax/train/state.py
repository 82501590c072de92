"""The state of a run as one tree of arrays, created where it will live."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from glscl_jax import sharding
from glscl_jax.config import Config
from glscl_jax.systems import registry
from glscl_jax.train import optimizer
from glscl_jax.types import Params

STREAMS = ("params", "step")  # independent sources of randomness


def stream_key(seed: int | jax.Array, stream: str) -> jax.Array:
  """The key of one stream of the run with this seed."""
  return jax.random.fold_in(jax.random.key(seed), STREAMS.index(stream))


def run_key(config: Config, mesh: jax.sharding.Mesh, stream: str) -> jax.Array:
  """`stream_key` of a run, on all devices.

  Compiled functions take it as an argument, so that runs which differ in
  nothing but their seed share them (JAX_COMPILATION_CACHE_DIR).
  """
  make = functools.partial(stream_key, stream=stream)
  where = sharding.replicated(mesh)
  return jax.jit(make, out_shardings=where)(np.int32(config.train.seed))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
  """Everything that changes during training, but for the data position."""

  step: jax.Array  # optimizer steps done, also the index of the next one
  params: Params  # float32
  opt_state: Any
  num_skipped: jax.Array  # steps without update, non-finite loss or gradient


def create(config: Config, key: jax.Array) -> TrainState:
  """A fresh state; pure, to be traced under jit or eval_shape."""
  params = registry.find(config).init(config, key)
  transform = optimizer.make_optimizer(config.optimizer, config.train.num_steps)
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=transform.init(params),
    num_skipped=jnp.zeros((), jnp.int32),
  )


def abstract_create(config: Config) -> TrainState:
  """Shapes and types of the state."""
  return jax.eval_shape(
    functools.partial(create, config), stream_key(0, "params")
  )


def state_shardings(
  abstract: TrainState, mesh: jax.sharding.Mesh
) -> TrainState:
  """Shardings of a state: moments lie where their parameter lies."""
  by_params = sharding.param_shardings(abstract.params, mesh)
  whole = sharding.replicated(mesh)
  by_name = {}
  sharding.map_with_name(by_name.__setitem__, by_params)
  shapes = {}
  sharding.map_with_name(
    lambda name, leaf: shapes.__setitem__(name, leaf.shape), abstract.params
  )

  def of_leaf(path: str, leaf: jax.ShapeDtypeStruct) -> Any:
    """A moment's path ends in the path of its parameter."""
    parts = path.split("/")
    for start in range(len(parts)):
      name = "/".join(parts[start:])
      if name in by_name and shapes[name] == leaf.shape:
        return by_name[name]
    return whole

  return TrainState(
    step=whole,
    params=by_params,
    opt_state=sharding.map_with_name(of_leaf, abstract.opt_state),
    num_skipped=whole,
  )


def abstract_state(config: Config, mesh: jax.sharding.Mesh) -> TrainState:
  """Shapes, types and shardings of the state, without making it."""
  abstract = abstract_create(config)
  return jax.tree.map(
    lambda leaf, where: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=where
    ),
    abstract,
    state_shardings(abstract, mesh),
  )


def make_state(config: Config, mesh: jax.sharding.Mesh) -> TrainState:
  """A fresh state, each array created on the devices that hold it."""
  shardings = jax.tree.map(lambda s: s.sharding, abstract_state(config, mesh))
  make = jax.jit(functools.partial(create, config), out_shardings=shardings)
  return make(run_key(config, mesh, "params"))
