"""All pairs of queries and keys, block by block and device by device.

A contrastive loss over A rows reads A x A similarities. Here none of them
outlives its block: `sweep` carries a small state for each query and each key
from block to block. Where the rows are spread over a mesh, queries stay, and
keys travel around the devices with their state; after one round both are
complete and at home. A device holds A / devices rows and one block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from glscl_jax import types

Tree = Any  # of arrays whose leading axis counts rows
# (shared, queries, their state, keys, their state) -> both states
Tile = Callable[[Tree, Tree, Tree, Tree, Tree], tuple[Tree, Tree]]


def sweep(
  tile: Tile,
  shared: Tree,
  queries: Tree,
  query_state: Tree,
  keys: Tree,
  key_state: Tree,
  *,
  group: int,
  block: int | None,
) -> tuple[Tree, Tree]:
  """Folds `tile` over every pair of a query and a key of one group.

  Which axes of the mesh hold the rows: `types.sample_axes` of the mesh in
  jax's context (`jax.set_mesh`, `jax.sharding.use_abstract_mesh`).

  Args:
    tile: sees one block. Blocks come in no fixed order, and may have pairs of
      two groups and rows of padding, which hold zeros: it must know them.
    shared: arrays that every block reads whole.
    queries: arrays with a leading axis of all rows, which groups divide.
    query_state: the same; what is known before the first block.
    keys: as queries.
    key_state: as query_state.
    group: consecutive rows that meet.
    block: rows of a block at most, of queries and of keys. None: all.

  Returns:
    Both states after all blocks.

  Raises:
    ValueError: the devices, or groups, do not divide the rows.
  """
  num_rows = jax.tree.leaves(queries)[0].shape[0]
  axes, num_devices = types.sample_axes()
  if num_rows % num_devices:
    raise ValueError(
      f"{num_rows} rows do not divide over {num_devices} devices of {axes}"
    )
  if num_rows % group:
    raise ValueError(f"groups of {group} do not divide {num_rows} rows")
  ring = _ring_size(num_rows // num_devices, num_devices, group)

  def on_one_device(*trees):
    if ring == 1:
      return _groups(tile, *trees, group=group, block=block)
    return _around(tile, *trees, ring=ring, axes=axes, block=block)

  trees = shared, queries, query_state, keys, key_state
  if num_devices == 1:
    return on_one_device(*trees)
  rows = P(axes)
  # Nobody differentiates through this, so what varies need not be tracked.
  return jax.shard_map(
    on_one_device,
    mesh=jax.sharding.get_abstract_mesh(),
    in_specs=(P(), rows, rows, rows, rows),
    out_specs=(rows, rows),
    check_vma=False,
  )(*trees)


def _ring_size(rows: int, num_devices: int, group: int) -> int:
  """The fewest consecutive devices, of `rows` each, that hold whole groups."""
  return next(
    size
    for size in range(1, num_devices + 1)
    if num_devices % size == 0 and size * rows % group == 0
  )


def _sides(rows: int, block: int | None) -> tuple[int, int]:
  """How many blocks of which length: equal ones, of `block` at most."""
  number = 1 if block is None else -(-rows // block)
  return number, -(-rows // number)


def _cut(tree: Tree, block: int | None) -> Tree:
  """Rows as (blocks, rows of a block), the last ones filled up with zeros."""

  def cut(x):
    number, side = _sides(x.shape[0], block)
    ends = ((0, number * side - x.shape[0]),) + ((0, 0),) * (x.ndim - 1)
    return jnp.pad(x, ends).reshape(number, side, *x.shape[1:])

  return jax.tree.map(cut, tree)


def _join(tree: Tree, rows: int) -> Tree:
  """Undoes `_cut`."""
  return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:rows], tree)


def _tiles(tile: Tile, shared, queries, query_state, keys, key_state):
  """Every block of queries against every block of keys."""

  def against_keys(key_state, query):
    def one(state, key):
      return tile(shared, query[0], state, *key)

    state, key_state = jax.lax.scan(one, query[1], (keys, key_state))
    return key_state, state

  key_state, query_state = jax.lax.scan(
    against_keys, key_state, (queries, query_state)
  )
  return query_state, key_state


def _around(
  tile: Tile,
  shared,
  queries,
  query_state,
  keys,
  key_state,
  *,
  ring,
  axes,
  block,
):
  """Keys go once around `ring` consecutive devices."""
  rows = jax.tree.leaves(queries)[0].shape[0]
  queries, *carry = (
    _cut(tree, block) for tree in (queries, query_state, keys, key_state)
  )
  devices = range(jax.lax.axis_size(axes))
  onwards = [(d, d - d % ring + (d + 1) % ring) for d in devices]

  def visit(carry, _):
    query_state, keys, key_state = carry
    query_state, key_state = _tiles(
      tile, shared, queries, query_state, keys, key_state
    )
    travellers = keys, key_state
    return (
      query_state,
      *jax.tree.map(lambda x: jax.lax.ppermute(x, axes, onwards), travellers),
    ), None

  (query_state, _, key_state), _ = jax.lax.scan(
    visit, tuple(carry), length=ring
  )
  return _join(query_state, rows), _join(key_state, rows)


def _groups(
  tile: Tile, shared, queries, query_state, keys, key_state, *, group, block
):
  """Groups that lie on one device: as many at once as a block has room for."""
  number = jax.tree.leaves(queries)[0].shape[0] // group
  _, side = _sides(group, block)
  room = number if block is None else max(1, block**2 // side**2)
  together = max(n for n in range(1, room + 1) if number % n == 0)

  def one(trees):
    trees = (_cut(tree, block) for tree in trees)
    return tuple(_join(s, group) for s in _tiles(tile, shared, *trees))

  split = jax.tree.map(
    lambda x: x.reshape(number // together, together, group, *x.shape[1:]),
    (queries, query_state, keys, key_state),
  )
  return jax.tree.map(
    lambda x: x.reshape(-1, *x.shape[3:]), jax.lax.map(jax.vmap(one), split)
  )
