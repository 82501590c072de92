"""What training does, kept as files: a refactoring leaves them as they are."""

import json
import os
import pathlib

import jax
import pytest

from glscl_jax import config as config_lib
from glscl_jax import sharding
from glscl_jax.config import MeshConfig
from glscl_jax.train import optimizer
from glscl_jax.train import state as state_lib
from glscl_jax.train import step as step_lib
from tests import random_pairs, recipes

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"


# The others differ in no parameter from one of these.
DISTINCT = [
  recipe
  for recipe in recipes.RECIPES
  if recipes.golden_name(recipe)
  in (
    "cmal_base",
    "glscl_base",
    "maskvlm_base",
    "quickstart",
    "quickstart_glscl_towers",
    "scl_base",
    "sycoca_base",
  )
]


@pytest.mark.parametrize("recipe", DISTINCT, ids=recipes.golden_name)
def test_the_parameters_of_a_recipe(recipe, check_golden):
  """Name, shape, spec on (2, 2, 2), learning rate factor, decay, optimizer."""
  config = config_lib.from_config_dict(recipes.load(recipe))
  mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
  params = random_pairs.abstract_params(config)
  lines = []

  def note(name, leaf):
    spec = sharding.param_spec(name, leaf.shape, mesh)
    axes = ", ".join(str(axis or "-") for axis in spec)
    lines.append(
      f"{name} {leaf.shape} ({axes})"
      f" lr {optimizer.lr_multiplier(name, config.optimizer):g}"
      f" {'decays' if optimizer.decays(name, config.optimizer) else 'stays'}"
      f" {sharding.match_one(name, optimizer.MUON_RULES)}\n"
    )

  sharding.map_with_name(note, params)
  check_golden(
    f"parameters/{recipes.golden_name(recipe)}.txt", "".join(sorted(lines))
  )


# What no published number covers; parity tests hold the steps of GLSCL.
SMALL_DATA = random_pairs.config(
  objectives=random_pairs.only("itc"),
  optimizer={
    "variant": "muon",
    "learning_rate": 1e-3,
    "warmup_fraction": 0.0,
    "weight_decay": 1.0,
  },
  **random_pairs.SMALL_DATA,
)


def test_the_first_three_steps_on_little_data():
  """Every metric, to what compilers and processors may differ in."""
  mesh = sharding.make_mesh(MeshConfig(), devices=jax.devices()[:1])
  step = step_lib.make_train_step(SMALL_DATA, mesh)
  state, found = state_lib.make_state(SMALL_DATA, mesh), []
  key = state_lib.run_key(SMALL_DATA, mesh, "step")
  for seed in range(3):
    batch = jax.device_put(
      random_pairs.batch(SMALL_DATA, seed=seed), sharding.batch_sharding(mesh)
    )
    state, metrics = step(state, batch, key)
    found.append({name: float(value) for name, value in metrics.items()})
  path = GOLDEN / "steps" / "small_data.json"
  if os.environ.get("UPDATE_GOLDEN"):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
  for here, expected in zip(found, json.loads(path.read_text()), strict=True):
    assert here == pytest.approx(expected, rel=2e-3, abs=1e-4)
