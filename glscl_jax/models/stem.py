"""Convolution stem: an image to patch embeddings, learned from little data.

A patch matrix has to learn from examples that a shape means the same wherever
it is drawn; convolutions start with it (Xiao et al., 2106.14881). Each stage
joins square cells of the grid before it to one and lets neighbours mix.

Neighbouring patches see each other's pixels here, so hidden patches are
blanked first: nothing of them travels.

Shape suffixes: L, M are rows and columns of a grid of joined cells.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from glscl_jax.config import ModelConfig
from glscl_jax.models import layers, products


def blank(
  image_BYXC: jax.Array, visible_BI: jax.Array, patch_size: int
) -> jax.Array:
  """Sets the pixels of patches that are not visible to 0 (the mean colour)."""
  batch, rows, columns, _ = image_BYXC.shape
  visible_BYX = visible_BI.reshape(
    batch, rows // patch_size, columns // patch_size
  )
  for axis in (1, 2):
    visible_BYX = jnp.repeat(visible_BYX, patch_size, axis=axis)
  return jnp.where(visible_BYX[..., None], image_BYXC, 0)


def join_cells(x_BYXD: jax.Array, side: int) -> jax.Array:
  """Joins side x side cells to one, values (row, column, channel)."""
  batch, rows, columns, width = x_BYXD.shape
  rows, columns = rows // side, columns // side
  grid = x_BYXD.reshape(batch, rows, side, columns, side, width)
  return grid.transpose(0, 1, 3, 2, 4, 5).reshape(
    batch, rows, columns, side * side * width
  )


class Convolution(nn.Module):
  """A 3 x 3 convolution with zeros around; `kernel` is (9 * in, features)."""

  dtype: str
  zero: bool = False

  @nn.compact
  def __call__(self, x_BYXD: jax.Array) -> jax.Array:
    width = x_BYXD.shape[-1]
    std = 0.0 if self.zero else (9 * width) ** -0.5
    kernel_AD = self.param(
      "kernel", nn.initializers.normal(std), (9 * width, width)
    )
    return products.convolve(
      x_BYXD, kernel_AD.reshape(3, 3, width, width), dtype=self.dtype
    )


class ResidualBlock(nn.Module):
  """x + conv(act(conv(LN x)))."""

  dtype: str
  eps: float
  activation: str
  zero: bool = False

  @nn.compact
  def __call__(self, x_BYXD: jax.Array) -> jax.Array:
    h_BYXD = layers.LayerNorm(self.eps, name="norm")(x_BYXD)
    h_BYXD = Convolution(self.dtype, name="conv1")(h_BYXD)
    h_BYXD = layers.ACTIVATIONS[self.activation](h_BYXD)
    return x_BYXD + Convolution(self.dtype, self.zero, name="conv2")(h_BYXD)


class Stage(nn.Module):
  """Joins side x side cells, then act(LN(W x)) and residual blocks."""

  config: ModelConfig
  side: int
  width: int
  blocks: int

  @nn.compact
  def __call__(self, x_BYXD: jax.Array) -> jax.Array:
    vision, dtype = self.config.vision, self.config.compute_dtype
    h_BLMF = layers.Dense(
      self.width,
      dtype,
      use_bias=False,
      kernel_init=nn.initializers.xavier_uniform(),
      name="join",
    )(join_cells(x_BYXD, self.side))
    h_BLMF = layers.LayerNorm(vision.norm_eps, name="norm")(h_BLMF)
    h_BLMF = layers.ACTIVATIONS[vision.activation](h_BLMF)
    for i in range(self.blocks):
      h_BLMF = ResidualBlock(
        dtype,
        vision.norm_eps,
        vision.activation,
        self.config.zero_residual,
        name=f"block{i}",
      )(h_BLMF)
    return h_BLMF


class Stem(nn.Module):
  """Images to patch embeddings before positions, (B, I, D)."""

  config: ModelConfig

  @nn.compact
  def __call__(self, image_BYXC: jax.Array) -> jax.Array:
    vision = self.config.vision
    side = vision.patch_size >> (len(vision.stem) - 1)
    grid = image_BYXC
    for i, stage in enumerate(
      zip(vision.stem, vision.stem_blocks, strict=True)
    ):
      grid = Stage(
        self.config, side if i == 0 else 2, *stage, name=f"stage{i}"
      )(grid)
    x_BID = grid.reshape(grid.shape[0], -1, grid.shape[-1])
    return layers.LayerNorm(vision.norm_eps, name="norm")(x_BID)
