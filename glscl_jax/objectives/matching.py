"""Image-text matching: which pairs are shown, and the loss on them.

Negatives are drawn inside groups of `group` consecutive samples of the global
batch, so the draw does not depend on how the batch is spread over devices.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from glscl_jax import draws
from glscl_jax.objectives import contrastive


def match_cross_entropy(
  logits_B2: jax.Array, labels_B: jax.Array, ok_B: jax.Array | None = None
) -> jax.Array:
  """ITM = sum ok * CE(logits, label) / max(1, sum ok); 1 = a true pair.

  `ok_B` marks the pairs that count; None: all.
  """
  log_p_B2 = jax.nn.log_softmax(logits_B2.astype(jnp.float32), axis=-1)
  losses_B = -jnp.take_along_axis(log_p_B2, labels_B[:, None], axis=1)[:, 0]
  return _masked_mean(losses_B, ok_B)


def accuracy(
  logits_B2: jax.Array, labels_B: jax.Array, ok_B: jax.Array | None = None
) -> jax.Array:
  """Share of the pairs that count whose label is the likelier one."""
  hits_B = jnp.argmax(logits_B2, axis=-1) == labels_B
  return _masked_mean(hits_B.astype(jnp.float32), ok_B)


def _masked_mean(values_B: jax.Array, ok_B: jax.Array | None) -> jax.Array:
  if ok_B is None:
    return jnp.mean(values_B)
  total = jnp.sum(jnp.where(ok_B, values_B, 0.0))
  return total / jnp.maximum(jnp.sum(ok_B, dtype=jnp.float32), 1.0)


def half_labels(
  key: jax.Array, batch: int, group: int, *, round_up: bool = False
) -> jax.Array:
  """(B,) int32 with exactly floor(group / 2) ones in each group, permuted.

  `round_up`: where a group is odd, one more.
  """
  order_GA = jnp.argsort(draws.uniform(key, (batch // group, group)), axis=1)
  return (order_GA < (group + round_up) // 2).astype(jnp.int32).reshape(batch)


def same_in_groups(identity_BM: jax.Array, group: int) -> jax.Array:
  """(G, A, A) bool: which samples of a group show the same."""
  identity_GAM = identity_BM.reshape(-1, group, identity_BM.shape[1])
  return jax.vmap(contrastive.show_the_same)(identity_GAM)


def random_negatives(
  identity_BM: jax.Array, key: jax.Array, group: int
) -> tuple[jax.Array, jax.Array]:
  """For each sample a uniformly drawn image of its group that is no true one.

  Returns:
    index_B: position inside the group, of a sample that shows something else.
    ok_B: False where the group holds no such sample.
  """
  same_GAA = same_in_groups(identity_BM, group)
  return _draw(jnp.zeros(same_GAA.shape), same_GAA, key)


def hard_negatives(
  similarity_GAA: jax.Array, same_GAA: jax.Array, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """For each row a column drawn with probability softmax(similarity).

  Drawn as argmax(similarity + Gumbel noise), which stays finite at any
  temperature. `same_GAA` marks pairs that must never be drawn, the diagonal
  among them. Similarities carry no gradient.

  Returns:
    index_B: column inside the group.
    ok_B: False where no column is allowed; such a pair must be dropped.
  """
  return _draw(jax.lax.stop_gradient(similarity_GAA), same_GAA, key)


def similarity_in_groups(
  text_BE: jax.Array, image_BE: jax.Array, group: int
) -> jax.Array:
  """(G, A, A) cosines of the texts (rows) and images (columns) of a group."""
  text_GAE, image_GAE = (
    contrastive.normalize(v).reshape(-1, group, v.shape[-1])
    for v in (text_BE, image_BE)
  )
  return jnp.einsum(
    "GAE,GBE->GAB", text_GAE, image_GAE, precision=jax.lax.Precision.HIGHEST
  )


# For each text an image, for each image a text: index in the group, and ok.
BothSides = tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def negatives_of_both(
  similarity_GAA: jax.Array, same_GAA: jax.Array, key: jax.Array
) -> BothSides:
  """`hard_negatives` of the rows (texts) and of the columns (images).

  Equal similarities make all allowed ones alike.
  """
  text_key, image_key = jax.random.split(key)
  return (
    hard_negatives(similarity_GAA, same_GAA, text_key),
    hard_negatives(
      similarity_GAA.swapaxes(1, 2), same_GAA.swapaxes(1, 2), image_key
    ),
  )


def _draw(logits_GAA, forbidden_GAA, key):
  noise_GAA = draws.gumbel(key, logits_GAA.shape)
  scores_GAA = jnp.where(forbidden_GAA, -jnp.inf, logits_GAA + noise_GAA)
  index_B = jnp.argmax(scores_GAA, axis=2).astype(jnp.int32).reshape(-1)
  return index_B, ~jnp.all(forbidden_GAA, axis=2).reshape(-1)


def take_from_group(
  items: jax.Array, index_A: jax.Array, group: int
) -> jax.Array:
  """Items of each sample's own group, (A, ..) of `items` (B, ..).

  `index_A`: positions inside the group, equally many of each, group by group.
  """
  grouped = items.reshape(-1, group, *items.shape[1:])
  taken = jax.vmap(lambda own, index: own[index])(
    grouped, index_A.reshape(grouped.shape[0], -1)
  )
  return taken.reshape(-1, *items.shape[1:])


def false_rows(labels_B: jax.Array, group: int) -> jax.Array:
  """(A,) positions inside each group of its false pairs, floor(group / 2).

  Of labels that `half_labels` has rounded up, group by group. Where some of
  them became true since, true pairs stand behind the false ones.
  """
  labels_GA = labels_B.reshape(-1, group)
  order_GA = jnp.argsort(labels_GA, axis=1, stable=True).astype(jnp.int32)
  return order_GA[:, : group // 2].reshape(-1)
