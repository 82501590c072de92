"""Optimizers with warm-up, per-part rates and decay.

The same idiom as for sharding: a table of path patterns, each parameter
matches exactly one. Default rates and decays: SCL's published code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from glscl_jax import sharding
from glscl_jax.config import OptimizerConfig

LR_RULES: tuple[tuple[str, str], ...] = (
  (r"fusion/(stack|last)/.*", "fusion"),
  (r"fusion/(text|image)_(transform|pooler)/.*", "fusion"),
  (r"(text_cross|image_cross|(caption_|image_)?decoder)/.*", "fusion"),
  (r"image_positions/value", "fusion"),
  (r"(mlm|match|pixel|caption|word|region|feature)_head/.*", "head"),
  (r"pooler/(kernel|bias)", "head"),
  (r"(vision|text|region)/.*", "encoder"),
  # CMAL's only stack is BERT's.
  (r"encoder/layers/.*", "encoder"),
  (r"(text|image)_projection/(fc[12]|norm)/.*", "encoder"),
  # A single matrix is MaskVLM's or CoCa's: it is with the heads there [choice].
  (r"(text|image)_projection/(kernel|bias)", "head"),
  (r"(temperature|logit_scale|fusion/type_embedding)/value", "encoder"),
)

# "accident": arrays that the published code decays because of their names.
DECAY_RULES: tuple[tuple[str, str], ...] = (
  (r".*/kernel", "decay"),
  (r"vision/patch_kernel", "decay"),
  (r"(text/(word|position|type)|vision/position)_embedding", "decay"),
  (
    r"(fusion/type_embedding|image_positions|region/mask_feature)/value",
    "decay",
  ),
  (r".*/(patch_)?bias", "none"),
  (r"vision/(class_embedding|mask_token/value)", "accident"),
  (r"temperature/value", "accident"),
  (r"(text/class_embedding|logit_scale/value)", "none"),
  (r"(vision/.*|(text|image)_projection/)norm\d?/scale", "accident"),
  (r"vision/ln_(pre|post)/scale", "accident"),
  (
    r"(text|fusion|(mlm|pixel|caption|word|region|feature)_head)"
    r"/.*norm\d?/scale",
    "none",
  ),
  (r"(region|encoder)/.*norm\d?/scale", "none"),
  (
    r"(text_cross|image_cross|(caption_|image_)?decoder)/.*norm\d?/scale",
    "none",
  ),
)

# What variant="muon" orthogonalizes; Adam moves the others. The vocabulary
# matrix is a table of words, like an embedding. The patch matrix is with the
# others too, as in every run so far; a stem's matrices are not [choice].
MUON_RULES: tuple[tuple[str, str], ...] = (
  (r"(vision|text|fusion|region|encoder)/.*/kernel", "matrix"),
  (r"pooler/kernel", "matrix"),
  (r"(text_cross|image_cross|(caption_|image_)?decoder)/.*/kernel", "matrix"),
  (r"(text|image)_projection/(fc[12]/)?kernel", "matrix"),
  (
    r"((mlm|word|region|feature)_head/fc1|(match|pixel)_head/fc)/kernel",
    "matrix",
  ),
  (r"((mlm|region)_head/fc2|caption_head/fc)/kernel", "other"),
  (r"vision/patch_kernel", "other"),
  (r"(vision|text)/[a-z]+_embedding", "other"),
  (r".*/((patch_)?bias|scale|value)", "other"),
)


def lr_multiplier(name: str, config: OptimizerConfig) -> float:
  """The factor on the learning rate of parameter `name`."""
  return {
    "encoder": 1.0,
    "fusion": config.fusion_multiplier,
    "head": config.head_multiplier,
  }[sharding.match_one(name, LR_RULES)]


def decays(name: str, config: OptimizerConfig) -> bool:
  """Whether weight decay applies to parameter `name`."""
  rule = sharding.match_one(name, DECAY_RULES)
  return rule == "decay" or (rule == "accident" and config.decay_norms)


def decay_rate(name: str, config: OptimizerConfig) -> float:
  """The weight decay of parameter `name`."""
  return config.weight_decay if decays(name, config) else 0.0


def make_schedule(
  config: OptimizerConfig, num_steps: int
) -> Callable[[jax.Array], jax.Array]:
  """Learning rate after t updates: linear from 0, then down to `f` of it.

  base * t / w for t < w, then base * (f + (1 - f) u), where u is
  (s - t) / (s - w) or its cosine and f is `config.final_fraction`.
  """
  warmup = round(config.warmup_fraction * num_steps)

  def schedule(step: jax.Array) -> jax.Array:
    step = jnp.asarray(step, jnp.float32)
    rising = step / max(warmup, 1)
    left = jnp.clip((num_steps - step) / max(num_steps - warmup, 1), 0.0, 1.0)
    if config.schedule == "cosine":
      left = 0.5 * (1.0 - jnp.cos(jnp.pi * left))
    left = config.final_fraction + (1.0 - config.final_fraction) * left
    return config.learning_rate * jnp.where(step < warmup, rising, left)

  return schedule


class Moments(NamedTuple):
  """State of `hf_adamw`: update count and running moments."""

  count: jax.Array
  mu: Any
  nu: Any


def hf_adamw(
  config: OptimizerConfig, schedule: Callable[[jax.Array], jax.Array]
) -> optax.GradientTransformation:
  """The published code's AdamW: eps before the correction, decay last.

  u = -lr sqrt(1-b2^t)/(1-b1^t) m / (sqrt(v) + eps); p' = (p + u)(1 - lr wd)
  """
  b1, b2 = config.beta1, config.beta2

  def init(params):
    zeros = jax.tree.map(jnp.zeros_like, params)
    return Moments(
      jnp.zeros((), jnp.int32), zeros, jax.tree.map(jnp.copy, zeros)
    )

  def update(grads, state, params):
    count = state.count + 1
    mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, grads)
    nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.nu, grads)
    t = count.astype(jnp.float32)
    correction = jnp.sqrt(1 - b2**t) / (1 - b1**t)
    base = schedule(state.count)

    def one(name, param, m, v):
      rate = base * lr_multiplier(name, config)
      step = -rate * correction * m / (jnp.sqrt(v) + config.eps)
      # Two roundings, as there: this matters near 1, for norm scales.
      moved = param + step
      return (moved - rate * decay_rate(name, config) * moved) - param

    return _map_with_name(one, params, mu, nu), Moments(count, mu, nu)

  return optax.GradientTransformation(init, update)


def scale_by_rules(
  config: OptimizerConfig, schedule: Callable[[jax.Array], jax.Array]
) -> optax.GradientTransformation:
  """Makes -lr (u + wd p) of u, with each parameter's own rate and decay."""

  def init(params):
    del params
    return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

  def update(directions, state, params):
    base = schedule(state.count)

    def one(name, param, direction):
      rate = base * lr_multiplier(name, config)
      return -rate * (direction + decay_rate(name, config) * param)

    updates = _map_with_name(one, params, directions)
    return updates, optax.ScaleByScheduleState(state.count + 1)

  return optax.GradientTransformation(init, update)


def muon_direction(config: OptimizerConfig) -> optax.GradientTransformation:
  """Muon (Jordan et al., 2024) where MUON_RULES say so, Adam for the rest.

  A matrix moves along its orthogonalized momentum, scaled to the root mean
  square `muon_rms`; leading axes of stacked layers are batch axes.
  """
  matrix = optax.contrib.MuonDimensionNumbers(-2, -1)

  def label(name: str, param: jax.Array) -> str:
    del param
    return sharding.match_one(name, MUON_RULES)

  def rescale(updates, params=None):
    del params
    return jax.tree.map(
      lambda u: u * (config.muon_rms * max(u.shape[-2:]) ** 0.5), updates
    )

  orthogonalize = optax.contrib.scale_by_muon(
    beta=config.muon_beta,
    weight_dimension_numbers=lambda updates: jax.tree.map(
      lambda _: matrix, updates
    ),
  )
  return optax.partition(
    {
      "matrix": optax.chain(orthogonalize, optax.stateless(rescale)),
      "other": optax.scale_by_adam(config.beta1, config.beta2, config.eps),
    },
    lambda params: sharding.map_with_name(label, params),
  )


def make_optimizer(
  config: OptimizerConfig, num_steps: int
) -> optax.GradientTransformation:
  """Optional clipping by the global norm, then `config.variant`.

  standard: AdamW, p - lr (m^ / (sqrt(v^) + eps) + wd p). muon, hf: as above.
  """
  schedule = make_schedule(config, num_steps)
  adam = optax.scale_by_adam(config.beta1, config.beta2, config.eps)
  steps = {
    "standard": lambda: [adam, scale_by_rules(config, schedule)],
    "muon": lambda: [muon_direction(config), scale_by_rules(config, schedule)],
    "hf": lambda: [hf_adamw(config, schedule)],
  }[config.variant]()
  if config.clip_norm is not None:
    steps.insert(0, optax.clip_by_global_norm(config.clip_norm))
  return optax.chain(*steps)


def _map_with_name(function: Callable[..., Any], *trees: Any) -> Any:
  return jax.tree_util.tree_map_with_path(
    lambda path, *leaves: function(sharding.path_name(path), *leaves), *trees
  )
