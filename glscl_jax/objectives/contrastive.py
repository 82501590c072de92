"""InfoNCE over the global batch: ITC and the core of the completion losses.

    s_ij = n(q_i) . n(k_j) / tau
    rows = mean_i -log softmax_j(s_ij)|_{j=i}      cols = the same on s^T
    info_nce = rows + cols  ("sum")  or half of it  ("mean")

Means run over valid items of the whole batch, so the value does not depend on
how the batch is spread over devices. Similarities are never held as a whole:
one pass over their blocks serves rows and columns (`objectives/blocks.py`), and
a second one, written by hand, the gradients.
"""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from glscl_jax.objectives import blocks

SameImage = Literal["none", "ignore", "positive"]
_NEVER = -1e30  # float32 logit of a pair that is not in the denominator


def normalize(x: jax.Array) -> jax.Array:
  """n(u) = u / max(|u|_2, 1e-8) over the last axis, in float32."""
  x = x.astype(jnp.float32)
  # The square root of zero has no gradient: shift inside the maximum.
  square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
  return x * jax.lax.rsqrt(jnp.maximum(square, 1e-16))


def show_the_same(
  identity_AM: jax.Array, other_AM: jax.Array | None = None
) -> jax.Array:
  """(A, A) bool: which rows of ids agree in any column.

  With as many `other` ids, the second A are those.
  """
  other_AM = identity_AM if other_AM is None else other_AM
  # Column by column: an array (A, A, M) is never needed as a whole.
  columns = zip(identity_AM.T, other_AM.T, strict=True)
  return functools.reduce(
    jnp.logical_or, (a[:, None] == b[None, :] for a, b in columns)
  )


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
  block: int | None = None,
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
    block: rows and columns of the similarities that a device holds at once;
      see `blocks.sweep`. None: all.

  Returns:
    A scalar; 0 when nothing is valid.
  """
  num_rows = query_AE.shape[0]
  if num_rows == 0:
    return jnp.zeros(())
  size = num_rows if group is None else min(group, num_rows)
  valid_A = jnp.ones(num_rows, bool) if valid_A is None else valid_A
  index_A = jnp.arange(num_rows, dtype=jnp.int32)
  twins = identity_AM is not None and same_image != "none"
  marks = _Marks(
    index=index_A,
    label=jnp.where(valid_A, 1 + index_A // size, 0),
    identity=identity_AM if twins else None,
    sample=(index_A if sample_A is None else sample_A) if twins else None,
  )
  losses_A = _losses(
    _Options(same_image, size, block),
    normalize(query_AE),
    normalize(key_AE),
    jnp.asarray(temperature, jnp.float32),
    marks,
  )
  count_G = jnp.sum(valid_A.reshape(-1, size), axis=1, dtype=jnp.float32)
  losses_G = jnp.sum(losses_A.reshape(-1, size), axis=1)
  total = jnp.mean(losses_G / jnp.maximum(count_G, 1.0))
  return total if reduce == "sum" else 0.5 * total


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
  return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


class _Options(NamedTuple):
  """What is fixed when the program is made."""

  same_image: SameImage
  group: int
  block: int | None


class _Marks(NamedTuple):
  """What decides which pairs count and which are positive, a row."""

  index: jax.Array  # (A,) place among all rows
  label: jax.Array  # (A,) 1 + its group; 0: counts for nothing
  identity: jax.Array | None  # (A, M); None: all distinct
  sample: jax.Array | None  # (A,)


class _Sums(NamedTuple):
  """Sums over the pairs of a row, or of a column, that were seen so far."""

  top: jax.Array  # (A,) the largest logit
  total: jax.Array  # (A,) of exp(logit - top)
  positive: jax.Array  # (A,) of the logits of the positives


class _Row(NamedTuple):
  """A query or a key, with what the backward pass knows of its softmax."""

  vector: jax.Array  # (A, E) of unit length
  marks: _Marks
  top: jax.Array | None = None  # (A,) the largest logit
  log_total: jax.Array | None = None  # (A,) log of the sum of exp(logit - top)
  weight: jax.Array | None = None  # (A,) dL / its loss
  target: jax.Array | None = None  # (A,) that of each of its positives


def _logits(temperature, query: _Row, key: _Row, same_image: SameImage):
  """Logits of a block, and which of its pairs are positive."""
  logits_AA = _product(query.vector, key.vector.T) / temperature
  ours, theirs = query.marks, key.marks
  allowed_AA = (ours.label[:, None] == theirs.label[None, :]) & (
    ours.label[:, None] > 0
  )
  positive_AA = allowed_AA & (ours.index[:, None] == theirs.index[None, :])
  if ours.identity is not None:
    twin_AA = show_the_same(ours.identity, theirs.identity) & (
      ours.sample[:, None] != theirs.sample[None, :]
    )
    if same_image == "positive":
      positive_AA |= allowed_AA & twin_AA
    else:
      allowed_AA &= ~twin_AA
  return jnp.where(allowed_AA, logits_AA, _NEVER), positive_AA


def _add(sums: _Sums, logits_AA, positive_AA, axis: int) -> _Sums:
  """Sums over one more block, along its columns (1) or rows (0)."""
  top_A = jnp.maximum(sums.top, jnp.max(logits_AA, axis=axis))
  shifted_AA = logits_AA - jnp.expand_dims(top_A, axis)
  positives_AA = jnp.where(positive_AA, logits_AA, 0.0)
  return _Sums(
    top=top_A,
    total=sums.total * jnp.exp(sums.top - top_A)
    + jnp.sum(jnp.exp(shifted_AA), axis=axis),
    positive=sums.positive + jnp.sum(positives_AA, axis=axis),
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _losses(options: _Options, query_AE, key_AE, temperature, marks: _Marks):
  """-mean_{positives} log softmax of each row plus that of its column, (A,).

  Backward, blocks are computed again from the sums of rows and columns:

    dL/ds_ij = g_i (p_ij - t_ij) + g_j (p'_ij - t'_ij)

  with p and p' the softmax along rows and columns, t and t' the targets, and g
  the gradients of the losses.
  """
  return _losses_forward(options, query_AE, key_AE, temperature, marks)[0]


def _losses_forward(options, query_AE, key_AE, temperature, marks):
  def tile(temperature, query, query_state, key, key_sums):
    logits_AA, positive_AA = _logits(
      temperature, query, key, options.same_image
    )
    query_sums, number_A = query_state
    number_A += jnp.sum(positive_AA, axis=1, dtype=jnp.float32)
    query_sums = _add(query_sums, logits_AA, positive_AA, axis=1)
    key_sums = _add(key_sums, logits_AA, positive_AA, axis=0)
    return (query_sums, number_A), key_sums

  zeros_A = jnp.zeros(query_AE.shape[0])
  nothing = _Sums(top=zeros_A + _NEVER, total=zeros_A, positive=zeros_A)
  (query_sums, number_A), key_sums = blocks.sweep(
    tile,
    temperature,
    _Row(query_AE, marks),
    (nothing, zeros_A),
    _Row(key_AE, marks),
    nothing,
    group=options.group,
    block=options.block,
  )
  # Who is whose positive is mutual: one number for a row and its column.
  number_A = jnp.maximum(number_A, 1.0)
  # The difference of the large ones first: exact where the positive is the top.
  losses_A = sum(
    (sums.top - sums.positive / number_A) + jnp.log(sums.total)
    for sums in (query_sums, key_sums)
  )
  query, key = (
    _Row(vector_AE, marks, sums.top, jnp.log(sums.total))
    for vector_AE, sums in ((query_AE, query_sums), (key_AE, key_sums))
  )
  losses_A = jnp.where(marks.label > 0, losses_A, 0.0)
  return losses_A, (query, key, temperature, number_A)


def _losses_backward(options, saved, gradient_A):
  query, key, temperature, number_A = saved
  weight_A = jnp.where(query.marks.label > 0, gradient_A, 0.0)
  query, key = (
    row._replace(weight=weight_A, target=weight_A / number_A)
    for row in (query, key)
  )

  def tile(temperature, query, d_query_AE, key, d_key_AE):
    logits_AA, positive_AA = _logits(
      temperature, query, key, options.same_image
    )
    # The logarithm last: subtracted from the top, it would lose digits.
    rows_AA = jnp.exp(logits_AA - query.top[:, None] - query.log_total[:, None])
    columns_AA = jnp.exp(logits_AA - key.top[None, :] - key.log_total[None, :])
    target_AA = query.target[:, None] + key.target[None, :]
    d_logits_AA = (
      query.weight[:, None] * rows_AA
      + key.weight[None, :] * columns_AA
      - jnp.where(positive_AA, target_AA, 0.0)
    )
    return (
      d_query_AE + _product(d_logits_AA, key.vector),
      d_key_AE + _product(d_logits_AA.T, query.vector),
    )

  d_query_AE, d_key_AE = blocks.sweep(
    tile,
    temperature,
    query,
    jnp.zeros_like(query.vector),
    key,
    jnp.zeros_like(key.vector),
    group=options.group,
    block=options.block,
  )
  # - sum_ij dL/ds_ij s_ij / tau, summed by rows.
  d_temperature = -jnp.sum(query.vector * d_query_AE) / jnp.square(temperature)
  return d_query_AE / temperature, d_key_AE / temperature, d_temperature, None


_losses.defvjp(_losses_forward, _losses_backward)


def image_text_contrast(
  image_BE: jax.Array,
  text_BE: jax.Array,
  temperature: jax.Array,
  *,
  identity_BM: jax.Array,
  same_image: SameImage,
  block: int | None = None,
) -> jax.Array:
  """ITC = symmetric mean of info_nce on projected global tokens."""
  return info_nce(
    image_BE,
    text_BE,
    temperature,
    identity_AM=identity_BM,
    same_image=same_image,
    reduce="mean",
    block=block,
  )


class _Best(NamedTuple):
  """The most similar key so far; of equal ones the first."""

  similarity: jax.Array  # (B,)
  index: jax.Array  # (B,) its place
  hit: jax.Array  # (B,) whether it shows the same


def accuracy(
  query_BE: jax.Array,
  key_BE: jax.Array,
  identity_BM: jax.Array,
  *,
  block: int | None = None,
) -> jax.Array:
  """Share of queries whose most similar key shows the same as they do.

  No gradient. `block` as in `info_nce`.
  """
  batch = query_BE.shape[0]
  index_B = jnp.arange(batch, dtype=jnp.int32)

  def tile(shared, query, best, key, key_state):
    similarity_BB = query[0] @ key[0].T
    # Padding has place 0; the others count from 1.
    similarity_BB = jnp.where(key[2][None, :] > 0, similarity_BB, -jnp.inf)
    place_B1 = jnp.argmax(similarity_BB, axis=1, keepdims=True)
    same_BB = show_the_same(query[1], key[1])
    found = _Best(
      jnp.take_along_axis(similarity_BB, place_B1, axis=1)[:, 0],
      key[2][place_B1[:, 0]],
      jnp.take_along_axis(same_BB, place_B1, axis=1)[:, 0],
    )
    better_B = (found.similarity > best.similarity) | (
      (found.similarity == best.similarity) & (found.index < best.index)
    )
    return jax.tree.map(
      lambda new_B, old_B: jnp.where(better_B, new_B, old_B), found, best
    ), key_state

  query_BE, key_BE = (
    normalize(jax.lax.stop_gradient(v_BE)) for v_BE in (query_BE, key_BE)
  )
  nothing = _Best(
    jnp.full(batch, -jnp.inf), index_B, jnp.zeros(batch, dtype=bool)
  )
  best, _ = blocks.sweep(
    tile,
    (),
    (query_BE, identity_BM),
    nothing,
    (key_BE, identity_BM, index_B + 1),
    (),
    group=batch,
    block=block,
  )
  return jnp.mean(best.hit)
