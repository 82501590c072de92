"""The model of SyCoCa (2401.02137), and with it of CoCa and CLIP.

Parameters are created by the methods that are called at initialisation, so
an objective that is switched off leaves no parameters behind.
"""

from __future__ import annotations

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from glscl_jax.config import ModelConfig
from glscl_jax.models import (
  cross_stack,
  heads,
  layers,
  text,
  transformer,
  vision,
)


class SyCoCa(nn.Module):
  """Every learned part; systems/sycoca.py says what is computed."""

  config: ModelConfig

  def setup(self):
    config, fusion = self.config, self.config.fusion
    self.vision = vision.VisionEncoder(config)
    self.text = text.CausalTextEncoder(config)
    self.image_projection = heads.make_projection(config)
    self.text_projection = heads.make_projection(config)
    self.logit_scale = layers.Values(
      (), nn.initializers.constant(-math.log(config.itc_temperature))
    )

    def make_stack(block: type, depth: int, **options) -> nn.Module:
      make_block = functools.partial(
        block,
        fusion.width,
        config.compute_dtype,
        fusion.norm_eps,
        fused=config.fused_attention,
        **transformer.coca_initializers(fusion.width, depth),
        **options,
      )
      return cross_stack.CrossStack(config, depth, make_block)

    self.caption_decoder = make_stack(transformer.CocaBlock, fusion.text_depth)
    self.image_decoder = make_stack(
      transformer.PreCrossBlock, fusion.image_depth, cross=fusion.mim_text
    )
    # Beside those of the encoder, which the decoder sees through its blocks.
    self.image_positions = layers.Values(
      (config.vision.num_patches, fusion.width),
      nn.initializers.normal(config.init_std),
    )
    make_head = functools.partial(
      heads.NormHead,
      dtype=config.compute_dtype,
      init_std=config.init_std,
      eps=fusion.norm_eps,
    )
    self.caption_head = make_head(config.text.vocab_size, use_bias=False)
    self.pixel_head = make_head(3 * config.vision.patch_size**2, use_bias=True)

  def temperature(self) -> jax.Array:
    """The divisor of ITC, exp(-theta); theta is `logit_scale`."""
    return jnp.exp(-self.logit_scale())
