import jax
import numpy as np
import pytest

from glscl_jax import sharding
from glscl_jax.config import MeshConfig
from glscl_jax.train import state as state_lib
from tests import random_pairs

CONFIG = random_pairs.config(objectives=random_pairs.only("itc"))


@pytest.fixture(scope="module")
def mesh():
  return sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))


@pytest.fixture(scope="module")
def state(mesh):
  return state_lib.make_state(CONFIG, mesh)


def test_the_abstract_state_is_the_state(mesh, state):
  abstract = state_lib.abstract_state(CONFIG, mesh)

  def same(leaf, expected):
    assert leaf.shape == expected.shape
    assert leaf.dtype == expected.dtype
    assert leaf.sharding.is_equivalent_to(expected.sharding, leaf.ndim)

  jax.tree.map(same, state, abstract)


def test_moments_lie_where_their_parameter_lies(state):
  moments = random_pairs.moments(state.opt_state)
  for tree in (moments.mu, moments.nu):
    same = jax.tree.map(
      lambda m, p: m.sharding.is_equivalent_to(p.sharding, p.ndim),
      tree,
      state.params,
    )
    assert all(jax.tree.leaves(same))
  kernel = moments.mu["text"]["blocks"]["layers"]["mlp"]["fc1"]["kernel"]
  assert kernel.sharding.shard_shape(kernel.shape) == (1, 32, 128)


def test_a_fresh_state_has_done_nothing(state):
  assert int(state.step) == int(state.num_skipped) == 0
  assert all(
    np.all(np.asarray(x) == 0) for x in jax.tree.leaves(state.opt_state)
  )


def test_parameters_follow_from_the_seed_and_not_from_the_mesh(state):
  one = sharding.make_mesh(MeshConfig(), devices=jax.devices()[:1])
  again = state_lib.make_state(CONFIG, one)
  jax.tree.map(np.testing.assert_array_equal, state.params, again.params)


def test_another_seed_gives_other_parameters_and_another_stream():
  keys = [
    tuple(np.asarray(jax.random.key_data(state_lib.stream_key(seed, stream))))
    for seed in (0, 1)
    for stream in state_lib.STREAMS
  ]
  assert len(set(keys)) == 4
