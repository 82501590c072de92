"""The model of CMAL (2410.12595): words and regions in one stack of blocks.

Parameters are created by the methods that are called at initialisation, so
an objective that is switched off leaves no parameters behind.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from glscl_jax.config import ModelConfig
from glscl_jax.models import heads, layers, products, regions, transformer

TEXT_TYPE, REGION_TYPE = 0, 1  # rows of the table of types


class WordEmbedding(nn.Module):
  """BERT's embedding (1810.04805): content, the word, and place apart."""

  config: ModelConfig

  def setup(self):
    config, text = self.config, self.config.text
    place_std = config.init_std if text.place_std is None else text.place_std

    def table(name: str, rows: int, std: float) -> jax.Array:
      return self.param(name, nn.initializers.normal(std), (rows, text.width))

    self.word_VD = table("word_embedding", text.vocab_size, config.init_std)
    self.place_LD = table("position_embedding", text.num_positions, place_std)
    self.type_2D = table("type_embedding", 2, place_std)
    self.norm = layers.LayerNorm(text.norm_eps)
    self.drop = layers.Dropout(text.dropout)
    if config.unimodal_layers[1]:
      self.first_norm = layers.LayerNorm(text.norm_eps)
      self.blocks = transformer.make_post_stack(
        config, config.unimodal_layers[1]
      )

  def contents(self, ids_BT: jax.Array) -> jax.Array:
    """Rows of the table of words, e, float32 (B, T, D)."""
    return layers.keep_samples(self.word_VD[ids_BT])

  def places(self, valid_BT: jax.Array) -> jax.Array:
    """Position and type, float32 (B, T, D); from validity, never from ids."""
    count_BT = jnp.cumsum(valid_BT, axis=1, dtype=jnp.int32)
    position_BT = jnp.where(valid_BT, count_BT - 1, 0)
    place_BTD = self.place_LD[position_BT] + self.type_2D[TEXT_TYPE][None, None]
    return layers.keep_samples(place_BTD)

  def encode(
    self, content_BTD: jax.Array, place_BTD: jax.Array, valid_BT: jax.Array
  ) -> jax.Array:
    """Contents after the blocks of words alone, of which there may be none.

    The blocks see places too; `embed` adds them once more.
    """
    if not self.config.unimodal_layers[1]:
      return content_BTD
    x_BTD = self._finish(self.first_norm, content_BTD + place_BTD)
    return self.blocks(x_BTD, valid_BT).astype(jnp.float32)

  def embed(self, content_BTD: jax.Array, place_BTD: jax.Array) -> jax.Array:
    """drop(LN(e + position + type)), of the type that travels."""
    return self._finish(self.norm, content_BTD + place_BTD)

  def _finish(self, norm: layers.LayerNorm, x_BTD: jax.Array) -> jax.Array:
    dtype = products.activation_dtype(self.config.compute_dtype)
    return self.drop(norm(x_BTD).astype(dtype))


def put(
  x_BLD: jax.Array, index_BA: jax.Array, ok_BA: jax.Array, new_BAD: jax.Array
) -> jax.Array:
  """`x` with `new` at the slots `index`, where ok; a slot stands there once."""
  slots_L = jnp.arange(x_BLD.shape[1], dtype=index_BA.dtype)
  hits_BLA = (index_BA[:, None, :] == slots_L[None, :, None]) & ok_BA[:, None]
  from_BL = jnp.argmax(hits_BLA, axis=2)
  hit_BL1 = jnp.any(hits_BLA, axis=2, keepdims=True)
  return jnp.where(hit_BL1, layers.take_rows(new_BAD, from_BL), x_BLD)


def swap(
  text_BTD: jax.Array,
  region_BRD: jax.Array,
  pos_BA: jax.Array,
  region_BA: jax.Array,
  ok_BA: jax.Array,
  *,
  sides: tuple[str, ...],
  rescale: bool,
) -> tuple[jax.Array, jax.Array]:
  """Contents of text and regions after those of anchors moved.

  Both are read before either is written: swapping twice swaps back.

  Args:
    text_BTD: contents of the tokens.
    region_BRD: contents of the regions.
    pos_BA: token of each anchor.
    region_BA: its region.
    ok_BA: slots that hold an anchor.
    sides: text: a region's content comes to its word. image: the reverse.
    rescale: what comes is made as long as what it replaces.
  """
  word_BAD = layers.take_rows(text_BTD, pos_BA)
  named_BAD = layers.take_rows(region_BRD, region_BA)
  if rescale:
    ratio_BA1 = _lengths(word_BAD) / _lengths(named_BAD)
    word_BAD, named_BAD = word_BAD / ratio_BA1, named_BAD * ratio_BA1
  if "text" in sides:
    text_BTD = put(text_BTD, pos_BA, ok_BA, named_BAD)
  if "image" in sides:
    region_BRD = put(region_BRD, region_BA, ok_BA, word_BAD)
  return text_BTD, region_BRD


def _lengths(x_BAD: jax.Array) -> jax.Array:
  square_BA1 = jnp.sum(jnp.square(x_BAD), axis=-1, keepdims=True)
  return jnp.sqrt(jnp.maximum(square_BA1, 1e-16))


class CMAL(nn.Module):
  """Every learned part; systems/cmal.py says what is computed."""

  config: ModelConfig

  def setup(self):
    config = self.config
    normal = nn.initializers.normal(config.init_std)
    self.text = WordEmbedding(config)
    self.region = regions.RegionEmbedding(config)
    self.encoder = transformer.make_post_stack(config, config.fusion.depth)
    self.pooler = layers.Dense(
      config.fusion.width, config.compute_dtype, kernel_init=normal
    )
    self.match_head = heads.make_match_head(config)
    self.word_head = heads.TiedHead(
      config.text.vocab_size, config.compute_dtype, config.init_std
    )
    # Class 0, the background, is in the softmax and never a target.
    self.region_head = heads.VocabularyHead(
      config.region.num_classes + 1, config.compute_dtype, config.init_std
    )
    self.feature_head = heads.TiedHead(
      config.region.feature_width, config.compute_dtype, config.init_std
    )
    self.temperature = layers.Values(
      (), nn.initializers.constant(config.itc_temperature)
    )

  def region_type(self) -> jax.Array:
    """The type of regions, (D,); the table is the text's."""
    return self.text.type_2D[REGION_TYPE]

  def word_logits(self, x_BJD: jax.Array) -> jax.Array:
    """(B, J, V) float32, by the table of words."""
    return self.word_head(x_BJD, products.transpose(self.text.word_VD))

  def region_features(self, x_BJD: jax.Array) -> jax.Array:
    """(B, J, P) float32, by the matrix that reads features, transposed."""
    return self.feature_head(
      x_BJD, products.transpose(self.region.feature_kernel())
    )

  def match_logits(self, x_BD: jax.Array) -> jax.Array:
    """(B, 2) float32 of fused class states; class 1 = a true pair."""
    return self.match_head(jnp.tanh(self.pooler(x_BD)))
