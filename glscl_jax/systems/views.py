"""Views: every version of an input is encoded once and shared by all readers.

An objective declares the fusion passes it reads and the rows of each. The
union over the active objectives is the plan of a step: an objective of weight
0 adds nothing to it. Versions of equal length are encoded in one call, passes
of equal shape are fused in one call; only rows that somebody reads go through
the last fusion layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Pass:
  """A fused pair of versions, such as ("drop", "full")."""

  image: str
  text: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reads:
  """What one objective reads: passes, and named rows of each stream."""

  fused: Pass
  text_rows: tuple[str, ...] = ()
  image_rows: tuple[str, ...] = ()
  target: bool = False  # read under stop-gradient: no backward pass


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """The passes of a step and the rows that are read from each."""

  text_rows: Mapping[Pass, tuple[str, ...]]
  image_rows: Mapping[Pass, tuple[str, ...]]
  image_versions: tuple[str, ...]
  text_versions: tuple[str, ...]

  @property
  def passes(self) -> tuple[Pass, ...]:
    return tuple(self.text_rows)


def make_plan(
  reads: Iterable[Reads], *, images: Iterable[str], texts: Iterable[str]
) -> Plan:
  """The union of `reads`; `images`, `texts` are read without fusion."""
  reads = tuple(reads)
  # dicts keep the order of first mention: the plan must not depend on hashes.
  text_rows: dict[Pass, dict[str, None]] = {}
  image_rows: dict[Pass, dict[str, None]] = {}
  for read in reads:
    text_rows.setdefault(read.fused, {}).update(dict.fromkeys(read.text_rows))
    image_rows.setdefault(read.fused, {}).update(dict.fromkeys(read.image_rows))
  fused_images = [fused.image for fused in text_rows]
  fused_texts = [fused.text for fused in text_rows]
  return Plan(
    text_rows={fused: tuple(rows) for fused, rows in text_rows.items()},
    image_rows={fused: tuple(rows) for fused, rows in image_rows.items()},
    image_versions=tuple(dict.fromkeys([*images, *fused_images])),
    text_versions=tuple(dict.fromkeys([*texts, *fused_texts])),
  )


def stack_rows(items: list[jax.Array]) -> jax.Array:
  """Joins equal-shape (B, ...) arrays along the batch, sample by sample.

  Interleaved, not concatenated: each device keeps the samples it holds.
  """
  stacked = jnp.stack(items, axis=1)
  return stacked.reshape(-1, *stacked.shape[2:])


def unstack_rows(joined: jax.Array, count: int) -> list[jax.Array]:
  """Undoes `stack_rows`."""
  split = joined.reshape(-1, count, *joined.shape[1:])
  return [split[:, i] for i in range(count)]


def join_groups(items: Sequence[jax.Array], num_groups: int) -> jax.Array:
  """Joins (A, ..) arrays of different length along the batch.

  Group by group: each holds as many equal parts, and those that belong
  together stay together, for devices as for `stack_rows`.
  """
  parts = [a.reshape(num_groups, -1, *a.shape[1:]) for a in items]
  joined = jnp.concatenate(parts, axis=1)
  return joined.reshape(-1, *joined.shape[2:])


def split_groups(
  joined: jax.Array, num_groups: int, lengths: Sequence[int]
) -> list[jax.Array]:
  """Undoes `join_groups`; `lengths` are those of the arrays."""
  grouped = joined.reshape(num_groups, -1, *joined.shape[1:])
  found, start = [], 0
  for length in lengths:
    stop = start + length // num_groups
    found.append(grouped[:, start:stop].reshape(length, *joined.shape[1:]))
    start = stop
  return found


def batch_by_shape(function, items: Mapping) -> dict:
  """Applies `function` once to all items (tuples of arrays) of equal shape."""
  groups: dict[tuple, list] = {}
  for name, arrays in items.items():
    groups.setdefault(tuple(a.shape for a in arrays), []).append(name)
  results = {}
  for names in groups.values():
    joined = [
      stack_rows(list(column))
      for column in zip(*(items[n] for n in names), strict=True)
    ]
    leaves, structure = jax.tree.flatten(function(*joined))
    columns = [unstack_rows(leaf, len(names)) for leaf in leaves]
    for name, own in zip(names, zip(*columns, strict=True), strict=True):
      results[name] = jax.tree.unflatten(structure, own)
  return {name: results[name] for name in items}


@dataclasses.dataclass(frozen=True)
class Rows:
  """Rows computed by a fused pass, found again by name."""

  states_BQD: jax.Array
  offsets: Mapping[str, tuple[int, int]]

  def __getitem__(self, name: str) -> jax.Array:
    start, stop = self.offsets[name]
    return self.states_BQD[:, start:stop]


def index_rows(
  names: tuple[str, ...], indices: Mapping[str, jax.Array], batch: int
) -> tuple[jax.Array, dict[str, tuple[int, int]]]:
  """Concatenated row indices (B, Q) and where each name's rows lie."""
  offsets, start = {}, 0
  for name in names:
    stop = start + indices[name].shape[1]
    offsets[name] = (start, stop)
    start = stop
  parts = [indices[name] for name in names]
  empty_B0 = jnp.zeros((batch, 0), jnp.int32)
  return jnp.concatenate([*parts, empty_B0], axis=1), offsets
