import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glscl_jax import sharding
from glscl_jax.config import MeshConfig
from glscl_jax.train import state as state_lib
from glscl_jax.train import step as step_lib
from tests import random_pairs, random_regions

CONFIG = random_pairs.config(
  objectives=random_pairs.only("itc"),
  optimizer={"learning_rate": 0.01, "warmup_fraction": 0.0},
)


@pytest.fixture(scope="module")
def mesh():
  return sharding.make_mesh(MeshConfig(), devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def batch(mesh):
  return jax.device_put(
    random_pairs.batch(CONFIG), sharding.batch_sharding(mesh)
  )


@pytest.fixture(scope="module")
def train_step(mesh, batch):
  key = state_lib.run_key(CONFIG, mesh, "step")
  lowered = step_lib.make_train_step(CONFIG, mesh).lower(
    state_lib.abstract_state(CONFIG, mesh), batch, key
  )
  compiled = lowered.compile()
  return lambda state, batch: compiled(state, batch, key)


@pytest.fixture(scope="module")
def fresh(mesh):
  return host(state_lib.make_state(CONFIG, mesh))


@pytest.fixture
def state(mesh, fresh):
  return jax.device_put(fresh, sharding.replicated(mesh))


def host(tree):
  """A copy that outlives the donated arrays."""
  return jax.tree.map(np.array, tree)


def set_temperature(state, value):
  params = state.params | {
    "temperature": {
      "value": jax.device_put(
        np.float32(value), state.params["temperature"]["value"].sharding
      )
    }
  }
  return dataclasses.replace(state, params=params)


def test_a_step_moves_parameters_and_counts(train_step, state, batch):
  before = host(state)
  after, metrics = train_step(state, batch)
  assert int(after.step) == 1
  assert int(after.num_skipped) == 0
  moved = jax.tree.map(
    lambda a, b: not np.array_equal(a, b), before.params, host(after.params)
  )
  assert all(jax.tree.leaves(moved))
  expected = {
    "loss",
    "itc",
    "itc_accuracy",
    "itc_temperature",
    "grad_norm",
    "param_norm",
    "update_norm",
    "learning_rate",
    "num_skipped",
  }
  assert metrics.keys() == expected
  assert all(m.shape == () for m in metrics.values())
  assert float(metrics["learning_rate"]) == pytest.approx(0.01)


def test_norms_are_those_of_gradient_update_and_parameters(
  train_step, state, batch
):
  before = host(state.params)
  after, metrics = train_step(state, batch)
  moments = random_pairs.moments(after.opt_state)

  def norm(tree):
    return np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(tree)))

  gradients = jax.tree.map(
    lambda m: np.asarray(m) / (1 - CONFIG.optimizer.beta1), moments.mu
  )
  updates = jax.tree.map(lambda a, b: np.asarray(a) - b, after.params, before)
  assert float(metrics["grad_norm"]) == pytest.approx(norm(gradients), rel=1e-4)
  assert float(metrics["update_norm"]) == pytest.approx(norm(updates), rel=1e-3)
  assert float(metrics["param_norm"]) == pytest.approx(
    norm(host(after.params)), rel=1e-4
  )


def test_a_loss_that_is_not_finite_changes_nothing_but_the_counts(
  train_step, state, batch
):
  state, _ = train_step(state, batch)
  state = set_temperature(state, np.nan)
  text = state.params["text"]
  bias = jnp.full_like(text["norm"]["bias"], -0.0)
  text |= {"norm": text["norm"] | {"bias": bias}}
  state = dataclasses.replace(state, params=state.params | {"text": text})
  before = host(state)
  after, metrics = train_step(state, batch)
  assert np.isnan(metrics["loss"])
  assert metrics["update_norm"] == 0
  assert int(after.step) == 2
  assert int(after.num_skipped) == int(metrics["num_skipped"]) == 1

  def assert_same_bits(a, b):
    assert a.tobytes() == b.tobytes()

  jax.tree.map(assert_same_bits, before.params, host(after.params))
  jax.tree.map(assert_same_bits, before.opt_state, host(after.opt_state))


def test_training_goes_on_after_a_skipped_step(train_step, state, batch):
  state, _ = train_step(set_temperature(state, np.nan), batch)
  state, metrics = train_step(set_temperature(state, 0.07), batch)
  assert np.isfinite(metrics["loss"])
  assert int(state.num_skipped) == 1
  assert float(metrics["update_norm"]) > 0


def test_the_rate_in_the_log_is_the_one_the_update_used(
  train_step, state, batch
):
  state, _ = train_step(set_temperature(state, np.nan), batch)
  state = set_temperature(state, 0.07)
  before = host(state.params)
  after, metrics = train_step(state, batch)
  # No update came before this one, so it is the first of the schedule.
  assert float(metrics["learning_rate"]) == pytest.approx(0.01)
  # The first step of Adam is as long as the rate, decay aside.
  bias = before["text"]["norm"]["bias"]
  moved = np.abs(np.asarray(after.params["text"]["norm"]["bias"]) - bias)
  assert np.max(moved) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize(("start", "end"), [(0.9, 0.5), (1e-5, 0.001)])
def test_the_temperature_is_kept_in_its_range(
  start, end, train_step, state, batch
):
  after, _ = train_step(set_temperature(state, start), batch)
  found = float(after.params["temperature"]["value"])
  assert 0.001 <= np.float32(found) <= 0.5
  # The step itself moves it by about the learning rate.
  assert found == pytest.approx(end, abs=0.011)


def test_the_published_code_does_not_clamp():
  config = random_pairs.config(objectives={"itc_temperature_range": None})
  params = {"temperature": {"value": jnp.array(0.9)}}
  assert step_lib.clamp_temperature(params, config) == params


def test_a_model_without_temperature_is_left_alone():
  assert step_lib.clamp_temperature({"text": {}}, CONFIG) == {"text": {}}


def test_each_step_has_its_own_randomness():
  key = state_lib.stream_key(0, "step")
  keys = {
    tuple(np.asarray(jax.random.key_data(step_lib.step_key(key, step))))
    for step in range(5)
  }
  assert len(keys) == 5


def test_the_state_is_donated(train_step, state, batch):
  train_step(state, batch)
  assert state.params["text"]["word_embedding"].is_deleted()


def test_runs_that_differ_in_their_seed_share_a_compiled_step(mesh, batch):
  texts = set()
  for seed in (0, 1):
    config = dataclasses.replace(
      CONFIG, train=dataclasses.replace(CONFIG.train, seed=seed)
    )
    lowered = step_lib.make_train_step(config, mesh).lower(
      state_lib.abstract_state(config, mesh),
      batch,
      state_lib.run_key(config, mesh, "step"),
    )
    texts.add(lowered.as_text())
  assert len(texts) == 1


def test_what_a_step_did_not_draw_is_no_reason_to_skip_it(mesh):
  config = random_regions.config(
    objectives={"task_mix": "sample"},
    optimizer={"learning_rate": 0.01, "warmup_fraction": 0.0},
  )
  step = step_lib.make_train_step(config, mesh)
  key = state_lib.run_key(config, mesh, "step")
  state = state_lib.make_state(config, mesh)
  batch = jax.device_put(
    random_regions.batch(config), sharding.batch_sharding(mesh)
  )
  before, drawn = host(state.params), []
  for _ in range(6):
    state, metrics = step(state, batch, key)
    names = [n for n in random_regions.NAMES if np.isfinite(metrics[n])]
    assert len(names) == 1 and metrics["num_skipped"] == 0
    assert metrics["loss"] == metrics[names[0]]
    drawn += names
  assert len(set(drawn)) > 1  # the key follows the step
  assert random_pairs.difference(host(state.params), before) > 0.01
  assert all(np.all(np.isfinite(a)) for a in jax.tree.leaves(state.params))
