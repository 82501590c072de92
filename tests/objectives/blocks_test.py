"""Every pair of a group is seen once, in whatever blocks and on whatever mesh.

The tile of these tests adds up keys for queries and queries for keys.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glscl_jax import sharding
from glscl_jax.config import MeshConfig
from glscl_jax.objectives import blocks

ROWS = 24


def add_up(scale, query, of_query, key, of_key):
  """Each side is (value, 1 + its group)."""
  same = query[1][:, None] == key[1][None, :]
  return (
    of_query + scale * jnp.sum(jnp.where(same, key[0][None, :], 0), axis=1),
    of_key + scale * jnp.sum(jnp.where(same, query[0][:, None], 0), axis=0),
  )


def totals(group, block, mesh=None):
  rng = np.random.default_rng(0)
  query, key = rng.integers(1, 1000, (2, ROWS))
  group_of = 1 + np.arange(ROWS) // group
  nothing = np.zeros(ROWS, int)

  def run(query, key):
    return blocks.sweep(
      add_up,
      jnp.asarray(2),
      (query, group_of),
      nothing,
      (key, group_of),
      nothing,
      group=group,
      block=block,
    )

  if mesh is None:
    found = jax.jit(run)(query, key)
  else:
    with jax.set_mesh(mesh):
      found = jax.jit(run)(query, key)
  sums = [
    2 * v.reshape(-1, group).sum(axis=1)[group_of - 1] for v in (key, query)
  ]
  return found, sums


@pytest.mark.parametrize("group", [24, 12, 8, 4, 1])
@pytest.mark.parametrize("block", [None, 24, 7, 5, 4, 1])
def test_each_pair_of_a_group_is_seen_once(group, block):
  found, wanted = totals(group, block)
  np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(
  "shape", [(2, 1, 1), (4, 1, 1), (8, 1, 1), (2, 4, 1), (2, 2, 2)], ids=str
)
@pytest.mark.parametrize(
  ("group", "block"),
  [
    (24, None),  # around all devices
    (24, 2),
    (12, 2),  # around some of them
    (3, 2),  # within each of eight
    (4, None),  # across borders: of eight, four hold three groups
  ],
)
def test_each_pair_is_seen_once_on_a_mesh(shape, group, block):
  mesh = sharding.make_mesh(
    MeshConfig(**dict(zip(sharding.AXES, shape, strict=True))),
    devices=jax.devices()[: np.prod(shape)],
  )
  found, wanted = totals(group, block, mesh)
  np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(
  ("rows", "devices", "group", "wanted"),
  [
    (3, 8, 3, 1),
    (3, 8, 1, 1),
    (3, 8, 6, 2),
    (3, 8, 12, 4),
    (3, 8, 24, 8),
    (3, 8, 4, 4),
    (3, 8, 8, 8),
    (2, 6, 6, 3),
    (2, 6, 12, 6),
    (5, 1, 5, 1),
  ],
)
def test_a_ring_is_as_small_as_groups_allow(rows, devices, group, wanted):
  assert blocks._ring_size(rows, devices, group) == wanted


def test_groups_share_a_block_as_long_as_it_has_room():
  def trips(block):
    """Turns of the outermost loop."""
    x = np.zeros(32, np.float32)

    def run(x):
      pair = x, np.zeros(32, int)
      return blocks.sweep(add_up, 1.0, pair, x, pair, x, group=4, block=block)

    equations = jax.make_jaxpr(run)(x).jaxpr.eqns
    return [e.params["length"] for e in equations if e.primitive.name == "scan"]

  assert trips(None) == [1]
  assert trips(12) == [1]
  assert trips(11) == [2]  # 8 groups of 4 x 4 pairs; room for 7, 4 divide 8
  assert trips(8) == [2]
  assert trips(4) == [8]
  assert trips(3) == [4]  # cut in two, and room for two such parts


def test_rows_that_devices_do_not_divide_are_an_error():
  mesh = sharding.make_mesh(MeshConfig(data=8, fsdp=1, tensor=1))
  x = np.zeros(12, np.float32)
  with jax.set_mesh(mesh), pytest.raises(ValueError, match="12 rows .* 8 dev"):
    blocks.sweep(add_up, 1, x, x, x, x, group=12, block=None)


def test_rows_that_groups_do_not_divide_are_an_error():
  x = np.zeros(12, np.float32)
  with pytest.raises(ValueError, match="groups of 5 do not divide 12 rows"):
    blocks.sweep(add_up, 1, x, x, x, x, group=5, block=None)
