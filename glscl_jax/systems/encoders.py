"""Each encoder by itself, as evaluation asks it: the same in every system.

`model` is the class of the system's model; its fields are `vision` and `text`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from glscl_jax.config import Config, ModelConfig
from glscl_jax.systems import inputs
from glscl_jax.types import Params, Visual

MakeModel = Callable[[ModelConfig], Any]


def apply(
  model: MakeModel, params: Params, config: Config, method: Callable
) -> Any:
  """What `method` gives of the model with these parameters."""
  return model(config.model).apply({"params": params}, method=method)


def encode_visual(
  model: MakeModel,
  params: Params,
  visual: Visual,
  *,
  config: Config,
) -> jax.Array:
  """Complete images to encoder states (B, 1 + N, D), class token first."""

  def method(parts: Any) -> jax.Array:
    return parts.vision(inputs.normalize_images(visual.image_BYXC, config))

  return apply(model, params, config, method)


def encode_text(
  model: MakeModel,
  params: Params,
  text_ids_BT: jax.Array,
  text_valid_BT: jax.Array,
  *,
  config: Config,
) -> jax.Array:
  """Complete texts to the states (B, L, D) of the system's text encoder."""
  return apply(
    model, params, config, lambda parts: parts.text(text_ids_BT, text_valid_BT)
  )
