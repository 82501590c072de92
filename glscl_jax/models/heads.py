"""Pre-training heads; their results are float32."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from glscl_jax.config import ModelConfig
from glscl_jax.models import layers, products


class JointProjection(nn.Module):
  """ITC projection: Linear(D,D), LN, GELU, Linear(D,E)."""

  joint_width: int
  dtype: str

  @nn.compact
  def __call__(self, x_BD: jax.Array) -> jax.Array:
    uniform = layers.uniform_fan_in
    width = x_BD.shape[-1]

    def dense(features: int, name: str, **options) -> layers.Dense:
      # Framework default: bias from the same interval as the kernel.
      bias_init = lambda key, shape: jax.random.uniform(  # noqa: E731
        key, shape, jnp.float32, -(width**-0.5), width**-0.5
      )
      return layers.Dense(
        features,
        self.dtype,
        kernel_init=uniform,
        bias_init=bias_init,
        name=name,
        **options,
      )

    h_BD = layers.LayerNorm(1e-5, name="norm")(dense(width, "fc1")(x_BD))
    return dense(self.joint_width, "fc2", out_dtype="float32")(
      layers.gelu(h_BD)
    )


def make_projection(config: ModelConfig) -> Callable[[jax.Array], jax.Array]:
  """From class states to float32 ITC vectors, not yet normalised.

  For `setup` of a module: with `joint_projection="none"` it has no parameters.
  """
  if config.joint_projection == "mlp":
    return JointProjection(config.joint_width, config.compute_dtype)
  if config.joint_projection == "matrix":
    return layers.Dense(
      config.joint_width,
      config.compute_dtype,
      use_bias=False,
      kernel_init=nn.initializers.normal(config.fusion.width**-0.5),
      out_dtype="float32",
    )
  if config.joint_projection == "linear":
    return layers.Dense(
      config.joint_width,
      config.compute_dtype,
      kernel_init=nn.initializers.normal(config.init_std),
      out_dtype="float32",
    )
  return lambda x_BD: x_BD.astype(jnp.float32)


class VocabularyHead(nn.Module):
  """Linear, GELU, LN, Linear to the vocabulary; untied."""

  vocab_size: int
  dtype: str
  init_std: float

  @nn.compact
  def __call__(self, x_BJD: jax.Array) -> jax.Array:
    normal = nn.initializers.normal(self.init_std)
    h_BJD = layers.Dense(
      x_BJD.shape[-1], self.dtype, kernel_init=normal, name="fc1"
    )(x_BJD)
    h_BJD = layers.keep_samples(layers.gelu(h_BJD))
    h_BJD = layers.LayerNorm(1e-12, name="norm")(h_BJD)
    return layers.Dense(
      self.vocab_size,
      self.dtype,
      kernel_init=normal,
      out_dtype="float32",
      name="fc2",
    )(h_BJD)


class TiedHead(nn.Module):
  """Linear, GELU, LN, and a matrix that is learned elsewhere, with a bias."""

  features: int
  dtype: str
  init_std: float

  @nn.compact
  def __call__(self, x_BJD: jax.Array, kernel_DF: jax.Array) -> jax.Array:
    normal = nn.initializers.normal(self.init_std)
    h_BJD = layers.Dense(
      x_BJD.shape[-1], self.dtype, kernel_init=normal, name="fc1"
    )(x_BJD)
    h_BJD = layers.keep_samples(layers.gelu(h_BJD))
    h_BJD = layers.LayerNorm(1e-12, name="norm")(h_BJD)
    bias_F = self.param("bias", nn.initializers.zeros, (self.features,))
    y_BJF = products.dot(
      h_BJD, kernel_DF, dtype=self.dtype, out_dtype="float32"
    )
    return y_BJF + bias_F[None, None]


class LinearHead(nn.Module):
  """One Linear to `features` values."""

  features: int
  dtype: str
  init_std: float

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    dense = layers.Dense(
      self.features,
      self.dtype,
      kernel_init=nn.initializers.normal(self.init_std),
      out_dtype="float32",
      name="fc",
    )
    return dense(x)


class NormHead(nn.Module):
  """LN, then one matrix to `features` values: a decoder's end (SyCoCa)."""

  features: int
  dtype: str
  init_std: float
  eps: float
  use_bias: bool

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    dense = layers.Dense(
      self.features,
      self.dtype,
      self.use_bias,
      kernel_init=nn.initializers.normal(self.init_std),
      out_dtype="float32",
      name="fc",
    )
    return dense(layers.LayerNorm(self.eps, name="norm")(x))


def make_match_head(config: ModelConfig) -> LinearHead:
  """ITM: two logits of a pair's features; class 1 is a match."""
  return LinearHead(2, config.compute_dtype, config.init_std)


def make_pixel_head(config: ModelConfig) -> LinearHead:
  """MIM: the values of a patch, (row, column, channel) as `patchify`."""
  values = 3 * config.vision.patch_size**2
  return LinearHead(values, config.compute_dtype, config.init_std)
