"""What the report shows: which splits, under which titles, how much."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from glscl_jax.data import sources

CELL_TITLES = {
  "train": "seen studios, seen concepts (training pairs)",
  "test_seen_studio_unseen_concept": "seen studios, unseen concepts",
  "test_unseen_studio_seen_concept": "unseen studio, seen concepts",
  "test_unseen_studio_unseen_concept": "unseen studio, unseen concepts",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """How much is shown."""

  num_queries: int = 6  # a split and direction
  num_maps: int = 6  # drawings whose attention, patches, words are shown
  num_measured: int = 256  # drawings whose patches and words are measured
  splits: tuple[str, ...] = ()  # of the examples; empty: the held-out ones
  seed: int = 0  # of the choice of examples


def cell_title(split: str) -> str:
  """The name of a split for people."""
  return CELL_TITLES[split] if split in CELL_TITLES else split


def in_order(splits: Iterable[str]) -> list[str]:
  """The cells of the emoji data as in their table, the others by name."""
  known = [split for split in CELL_TITLES if split in splits]
  return known + sorted(set(splits) - set(known))


def held_out(own: Mapping[str, Any]) -> tuple[str, ...]:
  """At most two splits, the hardest first, never the training one."""
  rest = [split for split in in_order(own) if split != "train"]
  return tuple(rest[::-1][:2])


def choose_split(data_dir: str, splits: Sequence[str]) -> str:
  """The first of those asked for, else the hardest held-out one."""
  if splits:
    return splits[0]
  there = sources.splits(data_dir)
  held_out = [split for split in in_order(there) if split != "train"]
  return (held_out or list(there))[-1]
