"""The model of SCL and GLSCL: two encoders, co-attention fusion, heads.

Parameters are created by the methods that are called at initialisation, so
an objective that is switched off leaves no parameters behind.
"""

from __future__ import annotations

import flax.linen as nn
import jax

from glscl_jax.config import ModelConfig
from glscl_jax.models import fusion, heads, layers, text, vision


class Towers(nn.Module):
  """Every learned part of SCL/GLSCL; systems/glscl.py says what is computed."""

  config: ModelConfig

  def setup(self):
    config = self.config
    self.vision = vision.VisionEncoder(config)
    self.text = text.TextEncoder(config)
    self.fusion = fusion.Fusion(config)
    self.image_projection = heads.make_projection(config)
    self.text_projection = heads.make_projection(config)
    self.temperature = layers.Values(
      (), nn.initializers.constant(config.itc_temperature)
    )
    self.mlm_head = heads.VocabularyHead(
      config.text.vocab_size, config.compute_dtype, config.init_std
    )
    self.match_head = heads.make_match_head(config)

  def project_text(self, text_BD: jax.Array) -> jax.Array:
    """float32 ITC vectors of transformed class tokens, not yet normalised."""
    return self.text_projection(text_BD)

  def project_image(self, image_BD: jax.Array) -> jax.Array:
    """As `project_text`."""
    return self.image_projection(image_BD)

  def match_logits(self, text_BD: jax.Array, image_BD: jax.Array) -> jax.Array:
    """(B, 2) float32; class 1 = the pair belongs together."""
    return self.match_head(self.fusion.pool(text_BD, image_BD))
