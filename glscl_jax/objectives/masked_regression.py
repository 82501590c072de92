"""Masked image modelling: regression of the pixels of hidden patches.

    MIM = sum ok mean_c |prediction - target|^p / max(1, sum ok)

p = 1 (MaskVLM, 2208.02131) or 2 (MAE, 2111.06377); c runs over the values of a
patch, the sums over the hidden patches of the global batch.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp


def masked_regression(
  prediction_BJP: jax.Array,
  target_BIP: jax.Array,
  index_BJ: jax.Array,
  ok_BJ: jax.Array | None = None,
  *,
  loss: Literal["l1", "l2"],
  patch_norm: bool,
) -> jax.Array:
  """Mean error of the values of hidden patches; 0 where none is hidden.

  Args:
    prediction_BJP: one row a hidden patch.
    target_BIP: all patches, on the scale of the model's input. They carry no
      gradient.
    index_BJ: which patches are hidden.
    ok_BJ: slots that count; None: all.
    loss: the power, |.|^1 or |.|^2.
    patch_norm: give each target patch mean 0 and variance 1 first.
  """
  target_BJP = jnp.take_along_axis(target_BIP, index_BJ[:, :, None], axis=1)
  target_BJP = jax.lax.stop_gradient(target_BJP.astype(jnp.float32))
  if patch_norm:
    target_BJP = normalize_patches(target_BJP)
  error_BJP = jnp.abs(prediction_BJP.astype(jnp.float32) - target_BJP)
  if loss == "l2":
    error_BJP = jnp.square(error_BJP)
  error_BJ = jnp.mean(error_BJP, axis=-1)
  if ok_BJ is None:
    ok_BJ = jnp.ones(index_BJ.shape, bool)
  total = jnp.sum(jnp.where(ok_BJ, error_BJ, 0.0))
  return total / jnp.maximum(jnp.sum(ok_BJ, dtype=jnp.float32), 1.0)


def normalize_patches(patches_BJP: jax.Array) -> jax.Array:
  """(x - mean) / sqrt(var + 1e-6) a patch, with unbiased variance (MAE)."""
  mean_BJ1 = jnp.mean(patches_BJP, axis=-1, keepdims=True)
  variance_BJ1 = jnp.var(patches_BJP, axis=-1, keepdims=True, ddof=1)
  return (patches_BJP - mean_BJ1) * jax.lax.rsqrt(variance_BJ1 + 1e-6)
