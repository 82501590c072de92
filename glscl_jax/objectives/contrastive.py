"""InfoNCE over the global batch: ITC and the core of the completion losses.

    s_ij = n(q_i) . n(k_j) / tau
    rows = mean_i -log softmax_j(s_ij)|_{j=i}      cols = the same on s^T
    info_nce = rows + cols  ("sum")  or half of it  ("mean")

Means run over valid items of the whole batch, so the value does not depend on
how the batch is spread over devices.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

SameImage = Literal["none", "ignore", "positive"]
_NEVER = -1e30  # float32 logit of a pair that is not in the denominator


def normalize(x: jax.Array) -> jax.Array:
  """n(u) = u / max(|u|_2, 1e-8) over the last axis, in float32."""
  x = x.astype(jnp.float32)
  # The square root of zero has no gradient: shift inside the maximum.
  square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
  return x * jax.lax.rsqrt(jnp.maximum(square, 1e-16))


def show_the_same(identity_AM: jax.Array) -> jax.Array:
  """(A, A) bool: which rows of ids agree in any column."""
  equal_AAM = identity_AM[:, None, :] == identity_AM[None, :, :]
  return jnp.any(equal_AAM, axis=-1)


def scale_gradient(x: jax.Array, scale: float) -> jax.Array:
  """Identity whose gradient is multiplied by `scale` (published DDP code)."""
  if scale == 1.0:
    return x
  stopped = jax.lax.stop_gradient(x)
  return stopped + (x - stopped) * scale


def info_nce(
  query_AE: jax.Array,
  key_AE: jax.Array,
  temperature: jax.Array | float,
  *,
  valid_A: jax.Array | None = None,
  identity_AM: jax.Array | None = None,
  sample_A: jax.Array | None = None,
  same_image: SameImage = "ignore",
  group: int | None = None,
  reduce: Literal["sum", "mean"] = "sum",
) -> jax.Array:
  """InfoNCE of matching rows, both directions.

  Args:
    query_AE: not yet normalised.
    key_AE: row i is the positive of query i.
    temperature: a divisor.
    valid_A: rows that count; others leave both sums. None: all.
    identity_AM: ids; rows that agree in any column show the same, be it an
      image or what a name names. None: all distinct.
    sample_A: which sample a row (a token) comes from. Rows of one sample stay
      each other's negatives although they show the same.
    same_image: "none" keeps rows that show the same as negatives, "ignore"
      takes them out of the denominator, "positive" makes them targets of equal
      weight.
    group: consecutive rows contrasted with each other; losses of groups are
      averaged. None, or more than there are: all rows.
    reduce: "sum" of the two directions or their "mean".

  Returns:
    A scalar; 0 when nothing is valid.
  """
  num_rows = query_AE.shape[0]
  if num_rows == 0:
    return jnp.zeros(())
  size = num_rows if group is None else min(group, num_rows)
  ones_A = jnp.ones(num_rows, bool)
  ids_A = jnp.arange(num_rows, dtype=jnp.int32)
  columns = (
    normalize(query_AE),
    normalize(key_AE),
    ones_A if valid_A is None else valid_A,
    ids_A[:, None] if identity_AM is None else identity_AM,
    ids_A if sample_A is None else sample_A,
  )
  grouped = jax.tree.map(
    lambda a: a.reshape(num_rows // size, size, *a.shape[1:]), columns
  )
  losses_G = jax.vmap(
    lambda *items: _one_group(*items, temperature, same_image)
  )(*grouped)
  total = jnp.mean(losses_G)
  return total if reduce == "sum" else 0.5 * total


def _one_group(
  query_AE, key_AE, valid_A, identity_AM, sample_A, temperature, same_image
) -> jax.Array:
  similarity_AA = (
    jnp.matmul(query_AE, key_AE.T, precision=jax.lax.Precision.HIGHEST)
    / temperature
  )
  diagonal_AA = jnp.eye(query_AE.shape[0], dtype=bool)
  twin_AA = (
    show_the_same(identity_AM)
    & (sample_A[:, None] != sample_A[None, :])
    & ~diagonal_AA
  )
  both_AA = valid_A[:, None] & valid_A[None, :]
  positive_AA = diagonal_AA & both_AA
  allowed_AA = both_AA
  if same_image == "positive":
    positive_AA = (diagonal_AA | twin_AA) & both_AA
  elif same_image == "ignore":
    allowed_AA = both_AA & ~twin_AA
  rows = _cross_entropy(similarity_AA, positive_AA, allowed_AA, valid_A)
  columns = _cross_entropy(
    similarity_AA.T, positive_AA.T, allowed_AA.T, valid_A
  )
  return rows + columns


def _cross_entropy(logits_AA, positive_AA, allowed_AA, valid_A) -> jax.Array:
  """Mean over valid rows of -mean_{positives} log softmax."""
  # An invalid row keeps finite logits, so that its gradient is 0 and not NaN.
  logits_AA = jnp.where(allowed_AA, logits_AA, _NEVER)
  log_p_AA = jax.nn.log_softmax(logits_AA, axis=-1)
  share_AA = positive_AA.astype(jnp.float32)
  share_AA /= jnp.maximum(jnp.sum(share_AA, axis=-1, keepdims=True), 1.0)
  losses_A = -jnp.sum(jnp.where(positive_AA, share_AA * log_p_AA, 0.0), -1)
  count_A = valid_A.astype(jnp.float32)
  return jnp.sum(losses_A * count_A) / jnp.maximum(jnp.sum(count_A), 1.0)


def image_text_contrast(
  image_BE: jax.Array,
  text_BE: jax.Array,
  temperature: jax.Array,
  *,
  identity_BM: jax.Array,
  same_image: SameImage,
) -> jax.Array:
  """ITC = symmetric mean of info_nce on projected global tokens."""
  return info_nce(
    image_BE,
    text_BE,
    temperature,
    identity_AM=identity_BM,
    same_image=same_image,
    reduce="mean",
  )


def accuracy(
  query_BE: jax.Array, key_BE: jax.Array, identity_BM: jax.Array
) -> jax.Array:
  """Share of queries whose most similar key shows the same as they do."""
  similarity_BB = normalize(query_BE) @ normalize(key_BE).T
  best_B1 = jnp.argmax(similarity_BB, axis=1, keepdims=True)
  return jnp.mean(
    jnp.take_along_axis(show_the_same(identity_BM), best_B1, axis=1)
  )
