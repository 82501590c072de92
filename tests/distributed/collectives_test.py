"""What the compiled steps of MaskVLM, SyCoCa and CMAL send between devices.

Those of GLSCL, and with them SCL's, are in mesh_test.py, which trains on them.
Nothing runs here. ITM's groups lie within devices: those that do not are seen
in mesh_test.py.
"""

import functools
import math
import re

import jax
import pytest

from glscl_jax import sharding
from glscl_jax.config import MeshConfig
from glscl_jax.train import program, shapes
from glscl_jax.train import state as state_lib
from glscl_jax.train import step as step_lib
from tests import random_pairs, random_regions

BATCH, WIDTH = 16, 128
GROUP = {"neg_group": BATCH // 8}
SIZES = {"width": WIDTH, "batch_size": BATCH, "scan": False}
CONFIGS = {
  "maskvlm": random_pairs.maskvlm(objectives=GROUP, dropout=0.0, **SIZES),
  "sycoca": random_pairs.sycoca(**SIZES),
  "cmal": random_regions.config(objectives=GROUP, dropout=0.1, **SIZES),
}
DATA, FSDP = (8, 1, 1), (2, 4, 1)


@functools.cache
def compiled(system, shape):
  """State, and work of the step on a mesh."""
  config = CONFIGS[system]
  mesh = sharding.make_mesh(
    MeshConfig(**dict(zip(sharding.AXES, shape, strict=True)))
  )
  state = state_lib.abstract_state(config, mesh)
  key = jax.eval_shape(lambda: jax.random.key(0))
  step = step_lib.make_train_step(config, mesh)
  text = (
    step.lower(state, shapes.abstract_batch(config, mesh), key)
    .compile()
    .as_text()
  )
  return state, program.read(text, dict(mesh.shape))


def sizes(tree):
  return [leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("system", CONFIGS)
def test_a_data_mesh_sums_gradients_and_gathers_nothing(system):
  state, work = compiled(system, DATA)
  kinds = {one.kind for one in work.collectives}
  assert kinds <= {"all-reduce", "collective-permute"}
  summed = sum(
    one.bytes * one.count
    for one in work.collectives
    if one.kind == "all-reduce"
  )
  # What two passes share may be summed after each.
  gradients = sum(sizes(state.params))
  assert gradients <= summed < 2 * gradients


@pytest.mark.parametrize("system", CONFIGS)
def test_a_data_mesh_hands_on_features_alone(system):
  _, work = compiled(system, DATA)
  handed = [
    one.bytes for one in work.collectives if one.kind == "collective-permute"
  ]
  # Around the ring: the samples of a device, by one vector each. CMAL has no
  # contrast over the batch.
  features = BATCH // 8 * CONFIGS[system].model.joint_width * 4
  assert max(handed, default=0) == (0 if system == "cmal" else features)


def layer_sizes(params):
  """Elements of each parameter, of one layer where layers are stacked."""
  found = {}

  def note(name, leaf):
    shape = leaf.shape[1:] if "/layers/" in name else leaf.shape
    found[name] = math.prod(shape)

  sharding.map_with_name(note, params)
  return set(found.values())


def largest(one):
  """Elements of the largest array of a collective."""
  shape = re.search(r"\[([\d,]*)\]", one.arrays)[1]
  return math.prod(int(n) for n in shape.split(",") if n)


@pytest.mark.parametrize("system", ["sycoca", "cmal"])
def test_fsdp_gathers_parameters_and_sums_gradients_but_no_states(system):
  state, work = compiled(system, FSDP)
  config = CONFIGS[system]
  # Of the samples of a device, by the shortest sequence.
  states = BATCH // 8 * config.model.text.max_length * WIDTH
  along = [one for one in work.collectives if one.axes == ("fsdp",)]
  for kind in ("all-gather", "all-reduce"):
    large = {
      largest(one)
      for one in along
      if one.kind == kind and largest(one) >= states
    }
    assert large and large <= layer_sizes(state.params), kind

  def total(*kinds):
    return sum(one.bytes * one.count for one in along if one.kind in kinds)

  # What is left: rows of the table of words, whose widths are spread.
  exchanged = total("all-to-all", "collective-permute")
  assert exchanged < 0.05 * total("all-gather")


@pytest.mark.parametrize("system", CONFIGS)
def test_fsdp_keeps_parameters_and_moments_in_parts(system):
  mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=4, tensor=1))
  state = state_lib.abstract_state(CONFIGS[system], mesh)
  for tree in (state.params, state.opt_state):
    held = sum(
      math.prod(leaf.sharding.shard_shape(leaf.shape))
      for leaf in jax.tree.leaves(tree)
    )
    assert held < 0.3 * sum(leaf.size for leaf in jax.tree.leaves(tree))
