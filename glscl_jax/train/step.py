"""One optimizer step, jitted over the mesh: loss, gradients, update."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from glscl_jax import sharding
from glscl_jax.config import Config
from glscl_jax.models import products
from glscl_jax.train import accumulate, optimizer
from glscl_jax.train.state import TrainState, abstract_state
from glscl_jax.types import Batch

Metrics = dict[str, jax.Array]
StepFunction = Callable[
  [TrainState, Batch, jax.Array], tuple[TrainState, Metrics]
]


def step_key(key: jax.Array, step: int | jax.Array) -> jax.Array:
  """The randomness of a step: dropout and in-batch negatives."""
  return jax.random.fold_in(key, step)


def train_step(
  state: TrainState, batch: Batch, key: jax.Array, *, config: Config
) -> tuple[TrainState, Metrics]:
  """The next state and the scalars of this step.

  `key` is that of the run (`state.run_key`, stream "step"), the same for all
  steps.

  A non-finite loss or gradient norm leaves parameters and optimizer, with its
  place in the schedule, as they are and is counted (the temperature is kept in
  its range even then); the loop decides when to give up. `update_norm` is 0.
  """
  grads, metrics = accumulate.gradients(
    state.params,
    batch,
    config=config,
    key=step_key(key, state.step),
    step=state.step,
  )
  grad_norm = optax.tree.norm(grads)
  transform = optimizer.make_optimizer(config.optimizer, config.train.num_steps)
  finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm)
  updates, opt_state = products.choose(
    finite,
    lambda old: transform.update(grads, old, state.params),
    # x + -0.0 is x to the bit, for -0.0 too.
    lambda old: (jax.tree.map(lambda g: jnp.full_like(g, -0.0), grads), old),
    state.opt_state,
  )
  params = clamp_temperature(optax.apply_updates(state.params, updates), config)
  next_state = TrainState(
    step=state.step + 1,
    params=params,
    opt_state=opt_state,
    num_skipped=state.num_skipped + (~finite).astype(jnp.int32),
  )
  schedule = optimizer.make_schedule(config.optimizer, config.train.num_steps)
  return next_state, metrics | {
    "grad_norm": grad_norm,
    "param_norm": optax.tree.norm(params),
    "update_norm": optax.tree.norm(updates),
    "learning_rate": schedule(state.step - state.num_skipped),
    "num_skipped": next_state.num_skipped,
  }


def clamp_temperature(params, config: Config):
  """Projects the learned ITC divisor, or its logarithm, into its range."""
  limits = config.objectives.itc_temperature_range
  if limits is None:
    return params
  low, high = limits
  ranges = {
    "temperature": (low, high),
    "logit_scale": (-math.log(high), -math.log(low)),
  }
  return params | {
    name: {"value": jnp.clip(params[name]["value"], *ranges[name])}
    for name in ranges.keys() & params.keys()
  }


def make_train_step(config: Config, mesh: jax.sharding.Mesh) -> StepFunction:
  """`train_step` jitted with the state donated and kept where it lies."""
  shardings = jax.tree.map(lambda s: s.sharding, abstract_state(config, mesh))

  def step(state, batch, key):
    # Losses over the whole batch ask over which devices it is spread.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return train_step(state, batch, key, config=config)

  whole = sharding.replicated(mesh)
  return jax.jit(
    step,
    in_shardings=(shardings, sharding.batch_sharding(mesh), whole),
    out_shardings=(shardings, whole),
    donate_argnums=0,
  )
