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
  error_BJ = patch_errors(
    prediction_BJP, target_BIP, index_BJ, loss=loss, patch_norm=patch_norm
  )
  if ok_BJ is None:
    ok_BJ = jnp.ones(index_BJ.shape, bool)
  total = jnp.sum(jnp.where(ok_BJ, error_BJ, 0.0))
  return total / jnp.maximum(jnp.sum(ok_BJ, dtype=jnp.float32), 1.0)


def patch_errors(
  prediction_BJP: jax.Array,
  target_BIP: jax.Array,
  index_BJ: jax.Array,
  *,
  loss: Literal["l1", "l2"],
  patch_norm: bool,
) -> jax.Array:
  """The error of each hidden patch, (B, J); see `masked_regression`."""
  target_BJP = _targets(target_BIP, index_BJ)
  if patch_norm:
    target_BJP = normalize_patches(target_BJP)
  error_BJP = jnp.abs(prediction_BJP.astype(jnp.float32) - target_BJP)
  if loss == "l2":
    error_BJP = jnp.square(error_BJP)
  return jnp.mean(error_BJP, axis=-1)


def _targets(target_BIP: jax.Array, index_BJ: jax.Array) -> jax.Array:
  target_BJP = jnp.take_along_axis(target_BIP, index_BJ[:, :, None], axis=1)
  return jax.lax.stop_gradient(target_BJP.astype(jnp.float32))


def restore_patches(
  prediction_BJP: jax.Array, target_BIP: jax.Array, index_BJ: jax.Array
) -> jax.Array:
  """Undoes `normalize_patches` by the statistics of the original patches."""
  target_BJP = _targets(target_BIP, index_BJ)
  mean_BJ1 = jnp.mean(target_BJP, axis=-1, keepdims=True)
  variance_BJ1 = jnp.var(target_BJP, axis=-1, keepdims=True, ddof=1)
  return prediction_BJP * jnp.sqrt(variance_BJ1 + 1e-6) + mean_BJ1


def normalize_patches(patches_BJP: jax.Array) -> jax.Array:
  """(x - mean) / sqrt(var + 1e-6) a patch, with unbiased variance (MAE)."""
  mean_BJ1 = jnp.mean(patches_BJP, axis=-1, keepdims=True)
  variance_BJ1 = jnp.var(patches_BJP, axis=-1, keepdims=True, ddof=1)
  return (patches_BJP - mean_BJ1) * jax.lax.rsqrt(variance_BJ1 + 1e-6)
