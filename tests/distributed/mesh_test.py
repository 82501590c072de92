"""The same training on every mesh: losses, gradients, three steps.

Dropout is on: its draws must not depend on the mesh either.
"""

import dataclasses
import functools
import math
import re

import jax
import numpy as np
import pytest

from glscl_jax import sharding
from glscl_jax.config import MeshConfig
from glscl_jax.train import state as state_lib
from glscl_jax.train import step as step_lib
from tests import random_pairs

ONE = (1, 1, 1)
MESHES = [(2, 1, 1), (4, 1, 1), (8, 1, 1), (2, 4, 1), (2, 2, 2)]
BATCH, GROUP, IMAGE_TOKENS, WIDTH = 16, 4, 17, 128
CONFIG = random_pairs.config(
  width=WIDTH,  # two heads, so that `tensor` has something to split
  dropout=0.1,
  batch_size=BATCH,
  # Groups of samples that lie on two devices of eight.
  objectives={
    "neg_group": GROUP,
    "mltc_image_group": 8,
    "mltc_text_group": 8,
  },
  # A large eps: AdamW otherwise turns the rounding of a gradient that is zero
  # on paper into a whole step.
  optimizer={"learning_rate": 1e-3, "eps": 1e-2, "warmup_fraction": 0.0},
)


@dataclasses.dataclass(frozen=True)
class Run:
  """Three steps on one mesh."""

  metrics: list[dict[str, float]]
  gradients: dict  # of the first step
  state: state_lib.TrainState
  abstract: state_lib.TrainState
  program: str


@functools.cache
def fresh():
  """The state every mesh starts from, on the host."""
  create = functools.partial(state_lib.create, CONFIG)
  return jax.tree.map(np.asarray, random_pairs.once(create)())


@functools.cache
def train(shape):
  data, fsdp, tensor = shape
  mesh = sharding.make_mesh(
    MeshConfig(data=data, fsdp=fsdp, tensor=tensor),
    devices=jax.devices()[: math.prod(shape)],
  )
  abstract = state_lib.abstract_state(CONFIG, mesh)
  batch = jax.device_put(
    random_pairs.batch(CONFIG), sharding.batch_sharding(mesh)
  )
  step = (
    step_lib.make_train_step(CONFIG, mesh)
    .lower(abstract, batch)
    .compile(compiler_options=random_pairs.QUICK)
  )
  state = jax.device_put(fresh(), jax.tree.map(lambda s: s.sharding, abstract))
  metrics, gradients = [], None
  for _ in range(3):
    state, found = step(state, batch)
    metrics.append({name: float(value) for name, value in found.items()})
    if gradients is None:
      # The first moment after one step is (1 - beta1) times the gradient.
      gradients = jax.tree.map(
        lambda m: np.asarray(m) / (1 - CONFIG.optimizer.beta1),
        random_pairs.moments(state.opt_state).mu,
      )
  return Run(metrics, gradients, state, abstract, step.as_text())


def assert_trees_close(found, expected, *, atol):
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(found),
    jax.tree.leaves(expected),
    strict=True,
  ):
    np.testing.assert_allclose(
      a,
      b,
      rtol=0,
      atol=atol * max(1.0, np.abs(b).max()),
      err_msg=sharding.path_name(path),
    )


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_three_steps_have_the_same_metrics_on_every_mesh(shape):
  for found, expected in zip(
    train(shape).metrics, train(ONE).metrics, strict=True
  ):
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_gradients_are_the_same_on_every_mesh(shape):
  assert_trees_close(train(shape).gradients, train(ONE).gradients, atol=1e-5)


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_three_steps_end_at_the_same_parameters_on_every_mesh(shape):
  found, expected = train(shape).state.params, train(ONE).state.params
  assert_trees_close(
    jax.tree.map(np.asarray, found),
    jax.tree.map(np.asarray, expected),
    atol=1e-5,
  )


def test_three_steps_move_the_parameters_by_much_more_than_the_tolerance():
  before, after = fresh().params, train(ONE).state.params
  moved = jax.tree.map(
    lambda a, b: np.abs(np.asarray(a) - b).max(), after, before
  )
  assert np.median(jax.tree.leaves(moved)) > 1e-4


@pytest.mark.parametrize("shape", [(2, 4, 1), (2, 2, 2)], ids=str)
def test_parameters_and_moments_stay_sharded(shape):
  run = train(shape)

  def same(leaf, expected):
    return leaf.sharding.is_equivalent_to(expected.sharding, leaf.ndim)

  assert all(jax.tree.leaves(jax.tree.map(same, run.state, run.abstract)))
  for tree in (
    run.state.params,
    random_pairs.moments(run.state.opt_state).mu,
    random_pairs.moments(run.state.opt_state).nu,
  ):
    leaves = jax.tree.leaves(tree)
    held = sum(leaf.addressable_shards[0].data.size for leaf in leaves)
    assert held < 0.3 * sum(leaf.size for leaf in leaves)


def gathered(program):
  """Shapes of the floating-point results of all gathers of a program."""
  shapes = re.findall(r"= (?:f32|bf16)\[([\d,]*)\]\S* all-gather\(", program)
  return [tuple(int(n) for n in shape.split(",")) for shape in shapes]


def test_data_parallel_training_gathers_only_what_losses_contrast():
  shapes = gathered(train((8, 1, 1)).program)
  # A group of ITM that lies on two devices shows images of the other one.
  shared_images = (1, GROUP, IMAGE_TOKENS, WIDTH)
  assert shapes.count(shared_images) == 1
  shapes.remove(shared_images)
  # Local completion contrasts 8 samples with 4 masked patches each.
  assert shapes
  assert max(map(math.prod, shapes)) <= 8 * 4 * WIDTH


def test_the_gather_test_sees_gathers():
  # Weights of fsdp are gathered before use.
  shapes = gathered(train((2, 4, 1)).program)
  assert any(math.prod(shape) >= WIDTH * WIDTH for shape in shapes)


def test_data_parallel_training_moves_no_tokens_between_devices():
  program = train((8, 1, 1)).program
  assert "all-to-all" not in program
  assert "collective-permute" not in program
