"""What a system says of words and regions that name each other."""

from __future__ import annotations

import dataclasses

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Slots:
  """Slots whose content is another's or hidden, and what is said of them."""

  index_BJ: jax.Array  # tokens of the text, or regions
  labels_BJ: jax.Array  # ids of tokens, or classes
  ok_BJ: jax.Array
  anchor_BJ: jax.Array  # bool: swapped, or hidden where nothing is; of those ok
  logits_BJV: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Answers:
  """None: no objective trains it."""

  words: Slots | None
  classes: Slots | None
  cosine_BTR: jax.Array | None  # tokens with regions; -1e30 at padding
