"""Pre-training heads; their results are float32."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from glscl_jax.models import layers


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
    h_BJD = layers.LayerNorm(1e-12, name="norm")(layers.gelu(h_BJD))
    return layers.Dense(
      self.vocab_size,
      self.dtype,
      kernel_init=normal,
      out_dtype="float32",
      name="fc2",
    )(h_BJD)


class MatchHead(nn.Module):
  """ITM: Linear(2D, 2) on cls_feats; class 1 is a match."""

  dtype: str
  init_std: float

  @nn.compact
  def __call__(self, features_BD: jax.Array) -> jax.Array:
    dense = layers.Dense(
      2,
      self.dtype,
      kernel_init=nn.initializers.normal(self.init_std),
      out_dtype="float32",
      name="fc",
    )
    return dense(features_BD)
