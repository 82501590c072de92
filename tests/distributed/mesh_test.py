"""The same training on every mesh: losses, gradients, three steps.

Dropout is on: its draws must not depend on the mesh either.
"""

import dataclasses
import functools
import math
import re

import jax
import numpy as np
import optax
import pytest

from glscl_jax import sharding
from glscl_jax.config import MeshConfig
from glscl_jax.train import state as state_lib
from glscl_jax.train import step as step_lib
from tests import random_pairs, random_regions

ONE = (1, 1, 1)
MESHES = [(8, 1, 1), (2, 2, 2)]
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
# The first stage of the quick start.
SMALL_DATA = random_pairs.config(
  batch_size=BATCH,
  objectives=random_pairs.only("itc"),
  optimizer={
    "variant": "muon",
    "learning_rate": 1e-3,
    "eps": 1e-2,
    "warmup_fraction": 0.0,
  },
  **random_pairs.SMALL_DATA,
)


MASKVLM = random_pairs.maskvlm(
  width=WIDTH,
  dropout=0.1,
  batch_size=BATCH,
  objectives={"neg_group": GROUP},
)


SYCOCA = random_pairs.sycoca(width=WIDTH, batch_size=8, scan=False)
CMAL = random_regions.config(
  width=WIDTH,
  dropout=0.1,
  batch_size=8,
  scan=False,
  objectives={"neg_group": GROUP, "amc_pair": 1.0, "amc_pair_group": GROUP},
)
CMAL_SAMPLE = random_regions.config(
  width=WIDTH, batch_size=8, scan=False, objectives={"task_mix": "sample"}
)


@dataclasses.dataclass(frozen=True)
class Run:
  """Some steps on one mesh."""

  metrics: list[dict[str, float]]
  gradients: dict[str, np.ndarray]  # of the first step
  state: state_lib.TrainState
  abstract: state_lib.TrainState
  program: str


@functools.cache
def fresh(config=CONFIG):
  """The state every mesh starts from, on the host."""
  one = sharding.make_mesh(MeshConfig(), devices=jax.devices()[:1])
  return jax.tree.map(np.asarray, state_lib.make_state(config, one))


def first_gradients(opt_state, config):
  """Gradients by name: the momentum after one step is 1 - beta of them."""
  found = {}
  for node in jax.tree.leaves(opt_state, is_leaf=lambda x: hasattr(x, "mu")):
    if hasattr(node, "mu"):
      is_adam = isinstance(node, optax.ScaleByAdamState)
      beta = config.beta1 if is_adam else config.muon_beta
      for path, leaf in jax.tree_util.tree_leaves_with_path(node.mu):
        found[sharding.path_name(path)] = np.asarray(leaf) / (1 - beta)
  return found


@functools.cache
def train(shape, config=CONFIG, num_steps=3):
  data, fsdp, tensor = shape
  mesh = sharding.make_mesh(
    MeshConfig(data=data, fsdp=fsdp, tensor=tensor),
    devices=jax.devices()[: math.prod(shape)],
  )
  abstract = state_lib.abstract_state(config, mesh)
  batch = jax.device_put(
    random_pairs.batch(config), sharding.batch_sharding(mesh)
  )
  key = state_lib.run_key(config, mesh, "step")
  step = (
    step_lib.make_train_step(config, mesh).lower(abstract, batch, key).compile()
  )
  state = jax.device_put(
    fresh(config), jax.tree.map(lambda s: s.sharding, abstract)
  )
  metrics, gradients = [], None
  for _ in range(num_steps):
    state, found = step(state, batch, key)
    metrics.append({name: float(value) for name, value in found.items()})
    if gradients is None:
      gradients = first_gradients(state.opt_state, config.optimizer)
  return Run(metrics, gradients, state, abstract, step.as_text())


def flat(tree):
  """Arrays by name."""
  return {
    sharding.path_name(path): np.asarray(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


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


def test_the_choices_for_little_data_run_the_same_on_every_mesh():
  # One step: Muon makes a whole step of the rounding of a gradient that is
  # zero on paper, as those behind a zero matrix are.
  one = train(ONE, SMALL_DATA, num_steps=1)
  found = train((2, 2, 2), SMALL_DATA, num_steps=1)
  assert found.metrics[0] == pytest.approx(one.metrics[0], rel=1e-5, abs=1e-5)
  assert len(one.gradients) == len(jax.tree.leaves(one.state.params))
  assert_trees_close(found.gradients, one.gradients, atol=1e-5)
  stem = "vision/stem/stage0/block0/conv2/kernel"
  np.testing.assert_allclose(
    flat(found.state.params)[stem], flat(one.state.params)[stem], atol=1e-5
  )
  assert np.abs(flat(one.state.params)[stem]).max() > 1e-4


@pytest.mark.parametrize(
  ("config", "make_batch"),
  [
    (MASKVLM, random_pairs.batch),
    (SYCOCA, random_pairs.batch),
    (CMAL, random_regions.batch),
    (CMAL_SAMPLE, random_regions.batch),
  ],
  ids=["maskvlm", "sycoca", "cmal", "cmal, one objective a step"],
)
def test_gradients_are_the_same_on_a_mesh_of_all_axes(config, make_batch):
  # The update of each parameter is that of the other systems.
  function = random_pairs.gradient_function(config)
  params = random_pairs.spread_params(config)
  batch, key = make_batch(config), jax.random.key(0)
  expected, metrics = function(params, batch, key)
  mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
  with jax.set_mesh(mesh):
    gradients, found = function(
      jax.device_put(params, sharding.param_shardings(params, mesh)),
      jax.device_put(batch, sharding.batch_sharding(mesh)),
      jax.device_put(key, sharding.replicated(mesh)),
    )
  for name, value in metrics.items():
    assert float(found[name]) == pytest.approx(
      float(value), rel=1e-5, abs=1e-5, nan_ok=True
    ), name
  assert_trees_close(flat(gradients), flat(expected), atol=1e-5)


def test_three_steps_move_the_parameters_by_much_more_than_the_tolerance():
  before, after = fresh().params, train(ONE).state.params
  moved = jax.tree.map(
    lambda a, b: np.abs(np.asarray(a) - b).max(), after, before
  )
  assert np.median(jax.tree.leaves(moved)) > 1e-4


def test_parameters_and_moments_stay_sharded():
  run = train((2, 2, 2))

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


def moved(program, collective):
  """Shapes of the floating-point results of one collective of a program."""
  results = re.findall(rf"= (.*?) {collective}(?:-start)?\(", program)
  shapes = re.findall(r"(?:f32|bf16)\[([\d,]*)\]", " ".join(results))
  return [tuple(int(n) for n in s.split(",") if n) for s in shapes]


def test_data_parallel_training_gathers_no_features():
  shapes = moved(train((8, 1, 1)).program, "all-gather")
  # A group of ITM that lies on two devices shows images of the other one.
  shared_images = (1, GROUP, IMAGE_TOKENS, WIDTH)
  assert shapes.count(shared_images) == 1
  shapes.remove(shared_images)
  # Losses, a row each: of local completion 4 masked patches a sample.
  assert max(map(math.prod, shapes), default=0) <= BATCH * 4


def test_the_gather_test_sees_gathers():
  # Weights of fsdp are gathered before use.
  shapes = moved(train((2, 2, 2)).program, "all-gather")
  assert any(math.prod(shape) >= WIDTH * WIDTH for shape in shapes)


def test_data_parallel_training_moves_only_what_losses_contrast():
  program = train((8, 1, 1)).program
  assert "all-to-all" not in program
  # Around the ring: of local completion 4 masked patches of each sample.
  sizes = list(map(math.prod, moved(program, "collective-permute")))
  assert max(sizes) == BATCH // 8 * 4 * WIDTH
