"""Co-attention fusion, as in METER (2111.02387), and its poolers."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from glscl_jax.config import ModelConfig
from glscl_jax.models import layers, transformer


class CoAttention(nn.Module):
  """One layer per stream; both read the other's old values.

  A stream whose rows are an empty selection (`rows.shape[1] == 0`) is left out.
  """

  width: int
  dtype: str
  eps: float
  dropout: float
  init_std: float
  fused: bool = False  # attention

  def setup(self):
    settings = (
      self.width,
      self.dtype,
      self.eps,
      self.dropout,
      self.init_std,
      self.fused,
    )
    self.text = transformer.PostCrossBlock(*settings)
    self.image = transformer.PostCrossBlock(*settings)

  def __call__(
    self,
    streams: tuple[jax.Array, jax.Array],
    text_valid_BT: jax.Array,
    text_rows_BQ: jax.Array | None = None,
    image_rows_BJ: jax.Array | None = None,
  ) -> tuple[jax.Array, jax.Array]:
    x_BTD, y_BID = streams
    text = self._stream(
      self.text, x_BTD, y_BID, text_valid_BT, None, text_rows_BQ
    )
    image = self._stream(
      self.image, y_BID, x_BTD, None, text_valid_BT, image_rows_BJ
    )
    return text, image

  def text_to_image(self, streams, text_valid_BT: jax.Array) -> jax.Array:
    """Cross-attention probabilities of the text stream, (B, H, T, I)."""
    x_BTD, y_BID = streams
    return self.text.cross_probabilities(x_BTD, y_BID, text_valid_BT, None)

  def example(self):
    """Smallest inputs, to create parameters."""
    token_11D = transformer.example_token(self.width, self.dtype)
    return (token_11D, token_11D), jnp.ones((1, 1), bool)

  @staticmethod
  def _stream(block, x_BLD, context_BMD, valid_BL, context_valid_BM, rows_BQ):
    if rows_BQ is not None and rows_BQ.shape[1] == 0:
      return x_BLD[:, :0]
    return block(x_BLD, context_BMD, valid_BL, context_valid_BM, rows_BQ)


class Fusion(nn.Module):
  """Transforms, `depth` co-attention layers, poolers.

  The last layer stands apart from the stack because losses read few of its
  rows: it can be asked for just those.
  """

  config: ModelConfig

  def setup(self):
    fusion = self.config.fusion
    normal = nn.initializers.normal(self.config.init_std)
    settings = dict(
      width=fusion.width,
      dtype=self.config.compute_dtype,
      eps=fusion.norm_eps,
      dropout=fusion.dropout,
      init_std=self.config.init_std,
      fused=self.config.fused_attention,
    )
    dense = functools.partial(
      layers.Dense, fusion.width, self.config.compute_dtype, kernel_init=normal
    )
    self.text_transform = dense()
    self.image_transform = dense()
    self.text_pooler = dense()
    self.image_pooler = dense()
    self.type_embedding = layers.Values((2, fusion.width), normal)
    if fusion.depth > 1:
      self.stack = transformer.Stack(
        functools.partial(CoAttention, **settings, parent=None),
        fusion.depth - 1,
        self.config.scan,
        self.config.remat,
      )
    self.last = CoAttention(**settings)

  def transform_text(self, x_BTD: jax.Array) -> jax.Array:
    """t0 = W_x e_text + b: what ITC reads and the layers start from."""
    return self.text_transform(x_BTD)

  def transform_image(self, y_BID: jax.Array) -> jax.Array:
    """y0 = W_y e_image + b."""
    return self.image_transform(y_BID)

  def body(
    self, x_BTD: jax.Array, text_valid_BT: jax.Array, y_BID: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """All layers but the last, from transformed states."""
    type_2D = self.type_embedding()
    streams = (
      x_BTD + type_2D[0][None, None].astype(x_BTD.dtype),
      y_BID + type_2D[1][None, None].astype(y_BID.dtype),
    )
    if self.config.fusion.depth > 1:
      streams = self.stack(streams, text_valid_BT)
    return streams

  def head(
    self,
    streams: tuple[jax.Array, jax.Array],
    text_valid_BT: jax.Array,
    text_rows_BQ: jax.Array | None = None,
    image_rows_BJ: jax.Array | None = None,
  ) -> tuple[jax.Array, jax.Array]:
    """The last layer, for all rows or the ones asked for."""
    return layers.keep_samples(
      self.last(streams, text_valid_BT, text_rows_BQ, image_rows_BJ)
    )

  def attention(self, streams, text_valid_BT: jax.Array) -> jax.Array:
    """Text-to-image cross-attention of the last layer, (B, H, T, I)."""
    return self.last.text_to_image(streams, text_valid_BT)

  def pool(self, text_BD: jax.Array, image_BD: jax.Array) -> jax.Array:
    """cls_feats = [tanh(W x_0 + b); tanh(W y_0 + b)], (B, 2D)."""
    return jnp.concatenate(
      [
        jnp.tanh(self.text_pooler(text_BD)),
        jnp.tanh(self.image_pooler(image_BD)),
      ],
      axis=-1,
    )
