"""Micro-batches give the loss and the gradients of the batch in one piece."""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import numpy as np
import pytest

from glscl_jax import sharding
from glscl_jax.config import ConfigError, MeshConfig
from glscl_jax.train import accumulate
from tests import random_pairs, random_regions

BATCH, GROUP = 16, 4
GROUPS = {"neg_group": GROUP, "mltc_image_group": 8, "mltc_text_group": 8}
# Dropout, hard negatives and random patches: what is drawn must be the same.
CONFIGS = {
  "glscl": random_pairs.config(
    dropout=0.1,
    batch_size=BATCH,
    objectives=GROUPS | {"itm_negatives": "hard"},
  ),
  "maskvlm": random_pairs.maskvlm(
    dropout=0.1, batch_size=BATCH, objectives={"neg_group": GROUP}
  ),
  "sycoca": random_pairs.sycoca(batch_size=BATCH, masking={"split": "random"}),
  "cmal": random_regions.config(
    dropout=0.1,
    batch_size=BATCH,
    objectives={
      "task_mix": "sum",
      "neg_group": GROUP,
      "amc_pair": 1.0,
      "amc_pair_group": GROUP,
    },
  ),
}


# One objective a step, as recipes have it: the others are NaN.
CONFIGS["cmal_drawn"] = random_regions.config(
  batch_size=BATCH, objectives={"task_mix": "sample", "neg_group": GROUP}
)


def change(config, number):
  train = dataclasses.replace(config.train, accumulate=number)
  return dataclasses.replace(config, train=train)


def widen(config):
  """The same with 128 samples, 16 pieces on 8 devices, in groups of 2."""
  groups = {
    name: 2
    for name in accumulate.LOCAL_GROUPS
    if getattr(config.objectives, name) < BATCH
  }
  return dataclasses.replace(
    config,
    data=dataclasses.replace(config.data, batch_size=128),
    objectives=dataclasses.replace(config.objectives, **groups),
  )


class Found(NamedTuple):
  gradient: dict
  scalars: dict
  temporary: int  # bytes


@functools.cache
def gradients(name, number, shape=(1, 1, 1), wide=False):
  """Of one batch on a mesh, 128 samples if `wide`."""
  config = change(CONFIGS[name], number)
  if wide:
    config = widen(config)
  source = random_regions if config.system == "cmal" else random_pairs
  mesh = sharding.make_mesh(
    MeshConfig(**dict(zip(sharding.AXES, shape, strict=True))),
    devices=jax.devices()[: math.prod(shape)],
  )

  def compute(params, batch, key):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return accumulate.gradients(params, batch, config=config, key=key, step=0)

  params = random_pairs.spread_params(config)
  operands = (
    jax.device_put(params, sharding.param_shardings(params, mesh)),
    jax.device_put(source.batch(config), sharding.batch_sharding(mesh)),
    jax.random.key(7),
  )
  compiled = jax.jit(compute).lower(*operands).compile()
  found = jax.tree.map(np.asarray, compiled(*operands))
  return Found(*found, compiled.memory_analysis().temp_size_in_bytes)


def assert_equal(found, expected):
  gradient, scalars, _ = found
  gradient_0, scalars_0, _ = expected
  assert scalars.keys() == scalars_0.keys()
  for name, value in scalars.items():
    expected = pytest.approx(
      float(scalars_0[name]), rel=1e-5, abs=1e-5, nan_ok=True
    )
    assert value == expected, name
  rights = jax.tree.leaves(gradient_0)
  # Biases of keys have no gradient but rounding.
  floor = 1e-2 * max(np.max(np.abs(right)) for right in rights)
  for found, right in zip(jax.tree.leaves(gradient), rights, strict=True):
    scale = max(np.max(np.abs(right)), floor)
    np.testing.assert_allclose(found, right, rtol=0, atol=1e-5 * scale)


@pytest.mark.parametrize("name", CONFIGS)
def test_four_micro_batches_are_one_batch(name):
  assert_equal(gradients(name, 4), gradients(name, 1))


@pytest.mark.grid
@pytest.mark.parametrize("number", [1, 4, 16])
@pytest.mark.parametrize(
  "shape", [(1, 1, 1), (2, 1, 1), (2, 2, 1), (8, 1, 1), (2, 2, 2)], ids=str
)
@pytest.mark.parametrize("name", CONFIGS)
def test_micro_batches_on_every_mesh_are_one_batch_on_one_device(
  name, shape, number
):
  assert_equal(
    gradients(name, number, shape, wide=True), gradients(name, 1, wide=True)
  )


def test_one_micro_batch_is_held_at_a_time():
  held = {n: gradients("glscl", n).temporary for n in (1, 4)}
  size = sum(g.nbytes for g in jax.tree.leaves(gradients("glscl", 1).gradient))
  # Beside the sum of gradients, a quarter of the activations and some features.
  assert held[4] - size < 0.5 * (held[1] - size)


def test_so_they_are_on_devices_that_share_groups():
  # Pieces of two samples on four devices: groups of four lie in fewer runs.
  config = change(CONFIGS["glscl"], 2)
  assert accumulate.find_parts(config, {"data": 4, "fsdp": 1}) == 2
  assert_equal(gradients("glscl", 2, (4, 1, 1)), gradients("glscl", 1))


def test_another_key_draws_another_step():
  # Else the tests above could not see that draws agree.
  config = CONFIGS["sycoca"]
  params, batch = random_pairs.spread_params(config), random_pairs.batch(config)
  compute = random_pairs.loss_function(config)
  first, second = (
    compute(params, batch, jax.random.key(seed)).metrics for seed in (7, 8)
  )
  assert first["itc"] == second["itc"]
  assert abs(first["tg_mim"] - second["tg_mim"]) > 1e-3


@pytest.mark.parametrize(("number", "parts"), [(1, 4), (4, 1), (2, 3)])
def test_pieces_are_put_back_where_they_were(number, parts):
  x_AD = np.arange(24 * 5).reshape(24, 5)
  cut = accumulate.cut({"x": x_AD}, number, parts)
  assert cut["x"].shape == (number, 24 // number, 5)
  np.testing.assert_array_equal(accumulate.join(cut, parts)["x"], x_AD)


def test_rows_stay_on_their_device():
  row_A = np.arange(24)
  first, second = np.asarray(accumulate.cut(row_A, 2, 3))
  runs = row_A.reshape(3, 8)
  np.testing.assert_array_equal(first.reshape(3, 4), runs[:, :4])
  np.testing.assert_array_equal(np.sort([*first, *second]), row_A)


@pytest.mark.parametrize(
  ("number", "devices", "parts"),
  [(1, 4, 4), (2, 4, 2), (2, 2, 2), (4, 2, 1), (4, 1, 1)],
)
def test_pieces_hold_whole_groups(number, devices, parts):
  config = change(CONFIGS["glscl"], number)
  shape = {"data": 1, "fsdp": devices, "tensor": 2}
  assert accumulate.find_parts(config, shape) == parts


def test_micro_batches_that_do_not_fit_are_named():
  config = change(CONFIGS["glscl"], 8)
  with pytest.raises(ConfigError, match="neg_group = 4; lower one"):
    accumulate.find_parts(config, {"data": 1})
  with pytest.raises(ConfigError, match="4 devices do not divide .* 16"):
    accumulate.find_parts(config, {"data": 4})
  alone = random_pairs.config(
    batch_size=16, objectives=random_pairs.only("itc")
  )
  assert accumulate.find_parts(change(alone, 16), {"data": 1}) == 1
