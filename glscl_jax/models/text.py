"""Text encoders: RoBERTa (1907.11692), and the causal one of CoCa.

RoBERTa: SCL, GLSCL, MaskVLM. Causal: SyCoCa, CoCa, CLIP.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from glscl_jax.config import ModelConfig
from glscl_jax.models import attention, layers, products, transformer

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
    x_BTD = layers.keep_samples(x_BTD)
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
        fused=self.config.fused_attention,
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


class CausalTextEncoder(nn.Module):
  """Token ids to states, (B, T + 1, D): a token sees itself and those before.

  The last row is the class: a learned vector appended after the padding, which
  sees all valid tokens. Padding is seen by nobody. Tokens read the rows 0, 1,
  .. of the position table, the class its last one, so that the length of the
  padding does not matter. States are those before `finish`.
  """

  config: ModelConfig

  def setup(self):
    text = self.config.text
    word_std = self.config.init_std
    place_std = word_std if text.place_std is None else text.place_std

    def table(name: str, std: float, *shape: int) -> jax.Array:
      return self.param(name, nn.initializers.normal(std), shape)

    self.word_VD = table(
      "word_embedding", word_std, text.vocab_size, text.width
    )
    self.place_LD = table(
      "position_embedding", place_std, text.num_positions, text.width
    )
    self.class_D = table("class_embedding", place_std, text.width)
    self.norm = layers.LayerNorm(text.norm_eps)
    self.blocks = transformer.Stack(
      functools.partial(
        transformer.PreBlock,
        width=text.width,
        dtype=self.config.compute_dtype,
        eps=text.norm_eps,
        activation="gelu",
        zero_residual=self.config.zero_residual,
        fused=self.config.fused_attention,
        causal=True,
        parent=None,
        **transformer.coca_initializers(text.width, text.depth),
      ),
      text.depth,
      self.config.scan,
      self.config.remat,
    )

  def __call__(self, ids_BT: jax.Array, valid_BT: jax.Array) -> jax.Array:
    batch, length = ids_BT.shape
    word_BTD = layers.keep_samples(
      self.word_VD[ids_BT] + self.place_LD[None, :length]
    )
    class_11D = (self.class_D + self.place_LD[-1])[None, None]
    class_B1D = jnp.broadcast_to(class_11D, (batch, 1, class_11D.shape[2]))
    x_BLD = jnp.concatenate([word_BTD, class_B1D], axis=1)
    valid_BL = jnp.pad(valid_BT, ((0, 0), (0, 1)), constant_values=True)
    dtype = products.activation_dtype(self.config.compute_dtype)
    return self.blocks(x_BLD.astype(dtype), valid_BL)

  def start(self, batch: int, length: int) -> attention.Past:
    """No token yet, room for `length`."""
    text = self.config.text
    return attention.start(
      batch, length, text.width, self.config.compute_dtype, text.depth
    )

  def extend(
    self, ids_BT: jax.Array, past: attention.Past
  ) -> tuple[jax.Array, attention.Past]:
    """States of tokens that follow those of `past`, without a class row."""
    place_T = past.count[0] + jnp.arange(ids_BT.shape[1])
    x_BTD = self.word_VD[ids_BT] + self.place_LD[place_T][None]
    dtype = products.activation_dtype(self.config.compute_dtype)
    return self.blocks(x_BTD.astype(dtype), past=past)

  def finish(self, x: jax.Array) -> jax.Array:
    """LN_final of some rows of the states: what contrast compares."""
    return self.norm(x)
