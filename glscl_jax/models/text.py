"""Text encoder of SCL and GLSCL: RoBERTa (1907.11692)."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from glscl_jax.config import ModelConfig
from glscl_jax.models import layers, products, transformer

PAD_POSITION = 1  # RoBERTa: pads read row 1, real tokens rows 2, 3, ..


def position_ids(valid_BT: jax.Array) -> jax.Array:
  """RoBERTa positions from validity, never from ids."""
  count_BT = jnp.cumsum(valid_BT, axis=1, dtype=jnp.int32)
  return jnp.where(valid_BT, count_BT + PAD_POSITION, PAD_POSITION)


class TextEncoder(nn.Module):
  """Token ids to states, (B, T, D); padding is seen by nobody."""

  config: ModelConfig

  @nn.compact
  def __call__(self, ids_BT: jax.Array, valid_BT: jax.Array) -> jax.Array:
    text = self.config.text
    word_std = self.config.init_std
    place_std = word_std if text.place_std is None else text.place_std

    def table(name: str, rows: int, std: float) -> jax.Array:
      normal = nn.initializers.normal(std)
      return self.param(name, normal, (rows, text.width))

    x_BTD = table("word_embedding", text.vocab_size, word_std)[ids_BT]
    x_BTD += table("position_embedding", text.num_positions, place_std)[
      position_ids(valid_BT)
    ]
    x_BTD += table("type_embedding", 1, place_std)[None]
    if text.embedding_norm:
      x_BTD = layers.LayerNorm(text.norm_eps, name="norm")(x_BTD)
    x_BTD = layers.Dropout(text.dropout)(
      x_BTD.astype(products.activation_dtype(self.config.compute_dtype))
    )
    y_BTD = transformer.Stack(
      functools.partial(
        transformer.PostBlock,
        width=text.width,
        dtype=self.config.compute_dtype,
        eps=text.norm_eps,
        dropout=text.dropout,
        init_std=self.config.init_std,
        zero_residual=self.config.zero_residual,
        parent=None,
      ),
      text.depth,
      self.config.scan,
      self.config.remat,
      name="blocks",
    )(x_BTD, valid_BT)
    if text.class_state == "mean":
      y_BTD = layers.put_mean_first(y_BTD, valid_BT)
    return y_BTD
