"""Layers shared by all towers: linear, norm, dropout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from glscl_jax import draws, types
from glscl_jax.models import products

Initializer = Callable[..., jax.Array]


def quick_gelu(x: jax.Array) -> jax.Array:
  """CLIP's u * sigmoid(1.702 u)."""
  return x * jax.nn.sigmoid(1.702 * x)


def gelu(x: jax.Array) -> jax.Array:
  """The exact (erf) GELU."""
  return jax.nn.gelu(x, approximate=False)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": gelu}


def uniform_fan_in(key: jax.Array, shape, dtype=jnp.float32) -> jax.Array:
  """U(-1/sqrt(fan_in), 1/sqrt(fan_in)) for a (fan_in, features) kernel."""
  bound = shape[0] ** -0.5
  return jax.random.uniform(key, shape, dtype, -bound, bound)


def keep_samples(states: Any) -> Any:
  """Says, at the border of a block or embedding, that samples lie apart.

  On a mesh each device keeps whole states of its own samples. Without this XLA
  may spread widths over `fsdp` as parameters are, and then sums and exchanges
  states where only parameters should be gathered. Outside of a mesh (jax's
  context) nothing happens, nor where the devices do not divide the samples.

  Args:
    states: arrays (B, ...), or a tree of them.
  """
  axes, num_devices = types.sample_axes()
  if num_devices == 1:
    return states
  return jax.tree.map(
    lambda x: (
      x
      if x.shape[0] % num_devices
      else jax.lax.with_sharding_constraint(x, P(axes))
    ),
    states,
  )


def last_axis(x_D: jax.Array, rank: int) -> jax.Array:
  """(D,) as (1, .., 1, D), to act along the last axis."""
  return jnp.expand_dims(x_D, tuple(range(rank - 1)))


class Dense(nn.Module):
  """y = x W + b over the last axis; `kernel` is (in, features)."""

  features: int
  dtype: str = "float32"
  use_bias: bool = True
  kernel_init: Initializer = nn.initializers.normal(0.02)
  bias_init: Initializer = nn.initializers.zeros
  out_dtype: str | None = None  # None: the type that travels between products

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    shape = (x.shape[-1], self.features)
    y = products.dot(
      x,
      self.param("kernel", self.kernel_init, shape),
      dtype=self.dtype,
      out_dtype=self.out_dtype,
    )
    if not self.use_bias:
      return y
    bias = self.param("bias", self.bias_init, (self.features,))
    return y + last_axis(bias.astype(y.dtype), y.ndim)


class LayerNorm(nn.Module):
  """Layer norm over the last axis, computed in float32."""

  eps: float

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    width = x.shape[-1]
    scale_D = self.param("scale", nn.initializers.ones, (width,))
    bias_D = self.param("bias", nn.initializers.zeros, (width,))
    wide = x.astype(jnp.float32)
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    unit = centred * jax.lax.rsqrt(variance + self.eps)
    y = unit * last_axis(scale_D, x.ndim) + last_axis(bias_D, x.ndim)
    return y.astype(x.dtype)


class Dropout(nn.Module):
  """Zeroes a share `rate` where the caller gave a `dropout` key."""

  rate: float

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    if self.rate == 0.0 or not self.has_rng("dropout"):
      return x
    kept = draws.keep(self.make_rng("dropout"), self.rate, x.shape)
    return jnp.where(kept, x / (1.0 - self.rate), jnp.zeros_like(x))


class Values(nn.Module):
  """A learned array, created only if some objective reads it."""

  shape: tuple[int, ...]
  init: Initializer

  @nn.compact
  def __call__(self) -> jax.Array:
    return self.param("value", self.init, self.shape)


class Mlp(nn.Module):
  """W2 act(W1 x) with hidden width 4 D."""

  dtype: str
  activation: str = "gelu"
  kernel_init: Initializer = nn.initializers.normal(0.02)
  out_init: Initializer | None = None  # of W2; None: as W1

  @nn.compact
  def __call__(self, x_BLD: jax.Array) -> jax.Array:
    width = x_BLD.shape[-1]
    out_init = self.out_init or self.kernel_init
    h_BLF = Dense(
      4 * width, self.dtype, kernel_init=self.kernel_init, name="fc1"
    )(x_BLD)
    h_BLF = ACTIVATIONS[self.activation](h_BLF)
    return Dense(width, self.dtype, kernel_init=out_init, name="fc2")(h_BLF)


def put_mean_first(
  x_BLD: jax.Array, valid_BL: jax.Array | None = None
) -> jax.Array:
  """Puts the float32 mean of the other (valid) rows in place of row 0."""
  rest_BMD = x_BLD[:, 1:]
  weight_BM = jnp.ones(rest_BMD.shape[:2], jnp.float32)
  if valid_BL is not None:
    weight_BM = valid_BL[:, 1:].astype(jnp.float32)
  count_B1 = jnp.maximum(jnp.sum(weight_BM, axis=1, keepdims=True), 1)
  weight_BM1 = (weight_BM / count_B1)[:, :, None]
  mean_BD = jnp.sum(rest_BMD.astype(jnp.float32) * weight_BM1, axis=1)
  return jnp.concatenate(
    [mean_BD[:, None].astype(x_BLD.dtype), rest_BMD], axis=1
  )


def take_rows(x_BLD: jax.Array, rows_BQ: jax.Array) -> jax.Array:
  """Rows `rows_BQ` of each sample, (B, Q, D)."""
  return jnp.take_along_axis(x_BLD, rows_BQ[:, :, None], axis=1)
