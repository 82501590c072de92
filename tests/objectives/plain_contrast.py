"""InfoNCE as one matrix of all similarities, with jax's own gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def normalize(x):
  square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
  return x * jax.lax.rsqrt(jnp.maximum(square, 1e-16))


def info_nce(
  query,
  key,
  tau,
  *,
  valid_A=None,
  identity_AM=None,
  sample_A=None,
  same_image="ignore",
  group=None,
  reduce="sum",
):
  """The arguments of `contrastive.info_nce`."""
  rows = len(query)
  size = group or rows
  index = jnp.arange(rows)
  columns = (
    normalize(query),
    normalize(key),
    jnp.ones(rows, bool) if valid_A is None else valid_A,
    index[:, None] if identity_AM is None else identity_AM,
    index if sample_A is None else sample_A,
  )
  grouped = [c.reshape(rows // size, size, *c.shape[1:]) for c in columns]
  losses = jax.vmap(lambda *items: one_group(*items, tau, same_image))(*grouped)
  return jnp.mean(losses) * (1.0 if reduce == "sum" else 0.5)


def one_group(query, key, valid, identity, sample, tau, same_image):
  logits = jnp.matmul(query, key.T, precision="highest") / tau
  own = jnp.eye(len(query), dtype=bool)
  twin = jnp.any(identity[:, None, :] == identity[None, :, :], axis=-1)
  twin = twin & (sample[:, None] != sample[None, :]) & ~own
  allowed = valid[:, None] & valid[None, :]
  positive = allowed & (own | twin if same_image == "positive" else own)
  if same_image == "ignore":
    allowed = allowed & ~twin
  return direction(logits, positive, allowed, valid) + direction(
    logits.T, positive.T, allowed.T, valid
  )


def direction(logits, positive, allowed, valid):
  log_p = jax.nn.log_softmax(jnp.where(allowed, logits, -1e30), axis=-1)
  share = positive / jnp.maximum(positive.sum(-1, keepdims=True), 1)
  losses = -jnp.sum(jnp.where(positive, share * log_p, 0.0), -1)
  return jnp.sum(losses * valid) / jnp.maximum(jnp.sum(valid), 1)
