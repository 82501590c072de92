"""Attentive masking (SyCoCa, 2401.02137): which patches a caption speaks of.

    s_n = max over content words j of cos(patch_n, word_j)

The patches of the largest scores, `high`, are hidden where the text has to
supply them (TG-MIM); those of the smallest, `low`, where the image has to
supply the text (IC). Scores and indices carry no gradient.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from glscl_jax.objectives import contrastive


def content_words(valid_BT: jax.Array) -> jax.Array:
  """(B, T) bool: valid tokens without the first and the last one.

  These two are the start and the end of a text, whatever their ids: tokenizers
  write them around every text, and cut a long one before its end.
  """
  inner_BL = valid_BT[:, 1:-1] & valid_BT[:, 2:]
  return jnp.pad(inner_BL, ((0, 0), (1, 1)))


def scores(
  patch_BIE: jax.Array, word_BTE: jax.Array, content_BT: jax.Array
) -> jax.Array:
  """Similarity of each patch to its nearest word, (B, I), no gradient.

  Args:
    patch_BIE: vectors of the contrastive space, not yet normalised.
    word_BTE: as `patch_BIE`.
    content_BT: which words count. A text without one scores 0 everywhere.
  """
  cosine_BIT = jnp.einsum(
    "BIE,BTE->BIT",
    contrastive.normalize(patch_BIE),
    contrastive.normalize(word_BTE),
    precision=jax.lax.Precision.HIGHEST,
  )
  best_BI = jnp.max(
    jnp.where(content_BT[:, None, :], cosine_BIT, -jnp.inf), axis=2
  )
  any_B1 = jnp.any(content_BT, axis=1, keepdims=True)
  return jax.lax.stop_gradient(jnp.where(any_B1, best_BI, 0.0))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
  """Patch numbers, int32, the highest score first."""

  high_BJ: jax.Array  # those of the largest scores
  keep_BM: jax.Array  # all but those of the smallest scores


def split(scores_BI: jax.Array, *, num_high: int, num_low: int) -> Split:
  """The patches of the `num_high` largest scores, all but `num_low` smallest.

  Of equal scores that of the lower number counts as the larger one: where
  num_high + num_low = I, `high` and `low` are complements, so that `keep` is
  `high`. Halves of an odd I share the patch in the middle: it is hidden from
  the one and left out by the other.
  """
  order_BI = jnp.argsort(-scores_BI, axis=1, stable=True).astype(jnp.int32)
  num_kept = scores_BI.shape[1] - num_low
  return Split(high_BJ=order_BI[:, :num_high], keep_BM=order_BI[:, :num_kept])
