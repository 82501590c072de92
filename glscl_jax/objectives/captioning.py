"""Image captioning (CoCa, 2205.01917; IC of SyCoCa, 2401.02137).

    IC = sum ok CE(logits_l, id_{l+1}) / max(1, sum ok),   ok = valid_{l+1}

The first target is the token after the start, the end is a target, padding is
none. Which tokens are padding is told by validity: the id of the padding may
be that of a token.
"""

from __future__ import annotations

import jax

from glscl_jax.objectives import masked_lm


def captioning(
  logits_BLV: jax.Array, ids_BT: jax.Array, valid_BT: jax.Array
) -> jax.Array:
  """Cross-entropy of the next token, a mean over those of the whole batch.

  Args:
    logits_BLV: L = T - 1 rows; row l has seen the tokens up to l.
    ids_BT: the whole text.
    valid_BT: which tokens are there.

  Returns:
    A scalar; 0 where no text has a second token.
  """
  return masked_lm.masked_cross_entropy(
    logits_BLV, ids_BT[:, 1:], valid_BT[:, 1:]
  )


def accuracy(
  logits_BLV: jax.Array, ids_BT: jax.Array, valid_BT: jax.Array
) -> jax.Array:
  """Share of next tokens that are the most likely ones."""
  return masked_lm.accuracy(logits_BLV, ids_BT[:, 1:], valid_BT[:, 1:])
