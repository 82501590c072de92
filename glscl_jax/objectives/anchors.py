"""Anchors: a word and a region that name the same thing (CMAL, 2410.12595).

    WRC_b = - sum_{(t, r) in A_b} log softmax(S_b)|_{t, r} / |A_b|
    S_b[t, r] = n(H_t) . n(H_r) / tau

One softmax over all pairs of a valid token and a valid region of the sample;
the mean over samples that have a pair. The published code divides by all cells
and lets padding into the softmax; that is not reproduced.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from glscl_jax.objectives import contrastive

_NEVER = -1e30  # float32 logit of a cell with padding


def cells(
  text_BTD: jax.Array,
  region_BRD: jax.Array,
  text_valid_BT: jax.Array,
  region_valid_BR: jax.Array,
) -> jax.Array:
  """Cosines of each token and region of a sample, (B, T, R) float32.

  Cells with padding hold -1e30.
  """
  cosine_BTR = jnp.einsum(
    "BTD,BRD->BTR",
    contrastive.normalize(text_BTD),
    contrastive.normalize(region_BRD),
    precision=jax.lax.Precision.HIGHEST,
  )
  valid_BTR = text_valid_BT[:, :, None] & region_valid_BR[:, None, :]
  return jnp.where(valid_BTR, cosine_BTR, _NEVER)


def word_region_contrast(
  cosine_BTR: jax.Array,
  temperature: jax.Array | float,
  pos_BA: jax.Array,
  region_BA: jax.Array,
  ok_BA: jax.Array,
) -> jax.Array:
  """WRC; 0 where no sample has a pair.

  Args:
    cosine_BTR: of `cells`.
    temperature: tau, a divisor.
    pos_BA: token of each pair that matches.
    region_BA: its region.
    ok_BA: slots that hold a pair. One with padding does not count.
  """
  batch, _, num_regions = cosine_BTR.shape
  logits_BM = cosine_BTR.reshape(batch, -1) / temperature
  log_p_BM = jax.nn.log_softmax(logits_BM, axis=-1)
  cell_BA = pos_BA * num_regions + region_BA
  log_p_BA = jnp.take_along_axis(log_p_BM, cell_BA, axis=1)
  ok_BA = _find_pairs(cosine_BTR, pos_BA, region_BA, ok_BA)
  count_B = jnp.sum(ok_BA, axis=1, dtype=jnp.float32)
  total_B = -jnp.sum(jnp.where(ok_BA, log_p_BA, 0.0), axis=1)
  losses_B = total_B / jnp.maximum(count_B, 1.0)
  num_samples = jnp.sum(count_B > 0, dtype=jnp.float32)
  return jnp.sum(losses_B) / jnp.maximum(num_samples, 1.0)


def accuracy(
  cosine_BTR: jax.Array,
  pos_BA: jax.Array,
  region_BA: jax.Array,
  ok_BA: jax.Array,
) -> jax.Array:
  """Share of the pairs whose token's most similar region matches it."""
  ok_BA = _find_pairs(cosine_BTR, pos_BA, region_BA, ok_BA)
  best_BT = jnp.argmax(cosine_BTR, axis=2)
  best_BA = jnp.take_along_axis(best_BT, pos_BA, axis=1)
  # A word that names several regions may choose any of them.
  matches_BAM = (
    (pos_BA[:, :, None] == pos_BA[:, None, :])
    & (best_BA[:, :, None] == region_BA[:, None, :])
    & ok_BA[:, None, :]
  )
  hits_BA = jnp.any(matches_BAM, axis=2) & ok_BA
  count = jnp.sum(ok_BA, dtype=jnp.float32)
  return jnp.sum(hits_BA, dtype=jnp.float32) / jnp.maximum(count, 1.0)


def _find_pairs(
  cosine_BTR: jax.Array,
  pos_BA: jax.Array,
  region_BA: jax.Array,
  ok_BA: jax.Array,
) -> jax.Array:
  """(B, A) bool: the pairs that count, those whose cell has no padding."""
  cosine_BM = cosine_BTR.reshape(cosine_BTR.shape[0], -1)
  cell_BA = pos_BA * cosine_BTR.shape[2] + region_BA
  return ok_BA & (jnp.take_along_axis(cosine_BM, cell_BA, axis=1) > _NEVER)


def pair_contrast(
  word_BAD: jax.Array,
  region_BAD: jax.Array,
  ok_BA: jax.Array,
  class_BA: jax.Array,
  temperature: jax.Array | float,
  *,
  group: int,
  block: int | None = None,
) -> jax.Array:
  """InfoNCE of anchors, their word slots against their region slots.

  The mean of both directions. Anchors of one class are not each other's
  negatives.

  Args:
    word_BAD: states at the anchors' words.
    region_BAD: states at their regions.
    ok_BA: slots that hold an anchor.
    class_BA: of the region.
    temperature: a divisor.
    group: samples whose anchors are contrasted.
    block: as in `contrastive.info_nce`.
  """
  _, items, width = word_BAD.shape
  return contrastive.info_nce(
    word_BAD.reshape(-1, width),
    region_BAD.reshape(-1, width),
    temperature,
    valid_A=ok_BA.reshape(-1),
    identity_AM=class_BA.reshape(-1, 1),
    same_image="ignore",
    group=group * items,
    reduce="mean",
    block=block,
  )
