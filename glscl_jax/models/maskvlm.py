"""The model of MaskVLM (2208.02131): two encoders, three stacks, heads.

Parameters are created by the methods that are called at initialisation, so
an objective that is switched off leaves no parameters behind.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from glscl_jax.config import ModelConfig
from glscl_jax.models import cross_stack, heads, layers, text, vision


class MaskVLM(nn.Module):
  """Every learned part; systems/maskvlm.py says what is computed."""

  config: ModelConfig

  def setup(self):
    config = self.config
    self.vision = vision.VisionEncoder(config)
    self.text = text.TextEncoder(config)
    self.image_cross = cross_stack.CrossStack(config, config.fusion.image_depth)
    self.text_cross = cross_stack.CrossStack(config, config.fusion.text_depth)
    self.decoder = cross_stack.CrossStack(config, config.fusion.decoder_depth)
    self.image_projection = heads.make_projection(config)
    self.text_projection = heads.make_projection(config)
    self.temperature = layers.Values(
      (), nn.initializers.constant(config.itc_temperature)
    )
    self.mlm_head = heads.VocabularyHead(
      config.text.vocab_size, config.compute_dtype, config.init_std
    )
    self.match_head = heads.make_match_head(config)
    self.pixel_head = heads.make_pixel_head(config)

  def match_logits(self, text_BD: jax.Array, image_BD: jax.Array) -> jax.Array:
    """(B, 2) float32 of fused class states; class 1 = a true pair."""
    if self.config.match_features == "product":
      return self.match_head(text_BD * image_BD)
    return self.match_head(jnp.concatenate([text_BD, image_BD], axis=-1))
