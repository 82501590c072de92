"""Regions of an image: what a detector found, in place of pixels (CMAL).

A region has a content, its feature, and a place, its box. Both become vectors
of the model's width, which are kept apart until `embed` adds them: what is
swapped is the content, the place stays (2410.12595).
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from glscl_jax.config import ModelConfig
from glscl_jax.models import layers, products, transformer


class RegionEmbedding(nn.Module):
  """UNITER's embedding (1909.11740), part by part; sums are float32."""

  config: ModelConfig

  def setup(self):
    config, width = self.config, self.config.fusion.width
    normal = nn.initializers.normal(config.init_std)
    self.feature = layers.Dense(
      width, config.compute_dtype, kernel_init=normal, out_dtype="float32"
    )
    # float32: eight bits of a coordinate are a place within four pixels.
    self.box = layers.Dense(
      width, "float32", kernel_init=normal, out_dtype="float32"
    )
    self.feature_norm = layers.LayerNorm(config.fusion.norm_eps)
    self.box_norm = layers.LayerNorm(config.fusion.norm_eps)
    self.norm = layers.LayerNorm(config.fusion.norm_eps)
    self.drop = layers.Dropout(config.fusion.dropout)
    self.mask_feature = layers.Values((config.region.feature_width,), normal)
    if config.unimodal_layers[0]:
      self.first_norm = layers.LayerNorm(config.fusion.norm_eps)
      self.blocks = transformer.make_post_stack(
        config, config.unimodal_layers[0]
      )

  def contents(self, region_BRP: jax.Array) -> jax.Array:
    """Features as vectors, r = LN(W f + b), float32 (B, R, D)."""
    content_BRD = layers.keep_samples(self.feature(region_BRP))
    return self.feature_norm(content_BRD)

  def hidden_content(self) -> jax.Array:
    """What stands for a hidden region, r of a learned feature, (D,)."""
    return self.feature_norm(self.feature(self.mask_feature()[None]))[0]

  def places(self, box_BR7: jax.Array, type_D: jax.Array) -> jax.Array:
    """Box and type, LN(W box + b) + type, float32 (B, R, D)."""
    box_BRD = layers.keep_samples(self.box(box_BR7.astype(jnp.float32)))
    return self.box_norm(box_BRD) + type_D[None, None]

  def encode(
    self, content_BRD: jax.Array, place_BRD: jax.Array, valid_BR: jax.Array
  ) -> jax.Array:
    """Contents after the blocks of regions alone, of which there may be none.

    The blocks see places too; `embed` adds them once more.
    """
    if not self.config.unimodal_layers[0]:
      return content_BRD
    x_BRD = self._finish(self.first_norm, content_BRD + place_BRD)
    return self.blocks(x_BRD, valid_BR).astype(jnp.float32)

  def embed(self, content_BRD: jax.Array, place_BRD: jax.Array) -> jax.Array:
    """drop(LN(r + g + type)), of the type that travels between products."""
    return self._finish(self.norm, content_BRD + place_BRD)

  def feature_kernel(self) -> jax.Array:
    """W of `contents`, (P, D); there once they have been asked for."""
    return self.feature.get_variable("params", "kernel")

  def _finish(self, norm: layers.LayerNorm, x_BRD: jax.Array) -> jax.Array:
    dtype = products.activation_dtype(self.config.compute_dtype)
    return self.drop(norm(x_BRD).astype(dtype))
