"""Masked language modelling: cross-entropy at masked positions."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def masked_cross_entropy(
  logits_BJV: jax.Array, labels_BJ: jax.Array, ok_BJ: jax.Array
) -> jax.Array:
  """MLM = sum ok * CE / max(1, sum ok), sums over the global batch."""
  log_p_BJV = jax.nn.log_softmax(logits_BJV.astype(jnp.float32), axis=-1)
  losses_BJ = -jnp.take_along_axis(log_p_BJV, labels_BJ[:, :, None], axis=-1)[
    :, :, 0
  ]
  total = jnp.sum(jnp.where(ok_BJ, losses_BJ, 0.0))
  return total / _count(ok_BJ)


def accuracy(
  logits_BJV: jax.Array, labels_BJ: jax.Array, ok_BJ: jax.Array
) -> jax.Array:
  """Share of masked positions whose token is the most likely one."""
  hits_BJ = (jnp.argmax(logits_BJV, axis=-1) == labels_BJ) & ok_BJ
  return jnp.sum(hits_BJ, dtype=jnp.float32) / _count(ok_BJ)


def _count(ok_BJ: jax.Array) -> jax.Array:
  return jnp.maximum(jnp.sum(ok_BJ, dtype=jnp.float32), 1.0)
