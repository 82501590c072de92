import dataclasses
import math
import re

import jax
import pytest
from jax.sharding import PartitionSpec as P

from glscl_jax import config as config_lib
from glscl_jax import sharding
from glscl_jax.config import MeshConfig
from glscl_jax.train import optimizer
from tests import random_pairs, random_regions

TABLES = {
  "parameters": sharding.PARAM_RULES,
  "learning rates": optimizer.LR_RULES,
  "decay": optimizer.DECAY_RULES,
  "muon": optimizer.MUON_RULES,
}


@pytest.fixture(scope="module")
def base():
  return shapes(config_lib.Config())


def shapes(config):
  params = random_pairs.abstract_params(config)
  return {
    sharding.path_name(path): leaf.shape
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  }


@pytest.fixture(scope="module")
def every_part(base):
  """GLSCL's, those that only some recipes have, those of other systems."""
  return (
    base
    | shapes(random_pairs.config(**random_pairs.SMALL_DATA))
    | shapes(random_pairs.maskvlm(depth=2))
    | shapes(random_pairs.sycoca(depth=2))
    | shapes(random_regions.config(*config_lib.SYSTEM_OBJECTIVES["cmal"]))
  )


@pytest.mark.parametrize("table", TABLES)
def test_each_parameter_matches_exactly_one_rule(table, every_part):
  for name in every_part:
    sharding.match_one(name, TABLES[table])


@pytest.mark.parametrize("table", TABLES)
def test_each_rule_is_used(table, every_part):
  unused = [
    pattern
    for pattern, _ in TABLES[table]
    if not any(re.fullmatch(pattern, name) for name in every_part)
  ]
  assert not unused


@pytest.mark.parametrize(
  "rules", [(), ((".*", 1), (r".*kernel", 2))], ids=["none", "two"]
)
def test_a_name_without_exactly_one_rule_is_an_error(rules):
  with pytest.raises(ValueError, match=f"a/kernel matches {len(rules)} rules"):
    sharding.match_one("a/kernel", rules)


def test_a_pattern_must_match_the_whole_name():
  with pytest.raises(ValueError, match="matches 0 rules"):
    sharding.match_one("text/norm/scale/extra", ((r"text/norm/scale", 1),))


def test_fsdp_and_tensor_split_all_but_small_change(base):
  mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
  whole = split = 0
  for name, shape in base.items():
    spec = sharding.param_spec(name, shape, mesh)
    ways = math.prod(mesh.shape[axis] for axis in spec if axis)
    whole += math.prod(shape)
    split += math.prod(shape) // ways
  # Half by fsdp nearly everywhere, half again by tensor in the blocks.
  assert split < 0.32 * whole


def test_layer_axes_stay_whole(base):
  mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))
  name = "text/blocks/layers/attention/query/kernel"
  assert base[name] == (12, 768, 768)
  assert sharding.param_spec(name, base[name], mesh) == P(
    None, "fsdp", "tensor"
  )


def test_what_does_not_divide_stays_whole():
  mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=8, tensor=1))
  name = "text/blocks/layers/attention/query/kernel"
  assert sharding.param_spec(name, (12, 68, 64), mesh) == P(
    None, None, "tensor"
  )


def test_what_a_mesh_axis_cannot_split_is_named():
  mesh = sharding.make_mesh(MeshConfig(data=1, fsdp=4, tensor=2))

  def leaf(*shape):
    return jax.ShapeDtypeStruct(shape, "float32")

  params = {
    "vision": {"patch_kernel": leaf(48, 64), "position_embedding": leaf(5, 66)},
    "match_head": {"fc": {"kernel": leaf(62, 2), "bias": leaf(2)}},
    "text": {"mlp": {"fc1": {"bias": leaf(3, 64)}}},
  }
  assert sharding.find_undivided(params, mesh) == [
    "mesh.fsdp = 4 splits 1 of 3 parameters; it does not divide a size of "
    "match_head/fc/kernel, vision/position_embedding"
  ]
  one = sharding.make_mesh(MeshConfig(), devices=jax.devices()[:1])
  assert not sharding.find_undivided(params, one)


@pytest.mark.parametrize(
  ("config", "shape"),
  [
    (MeshConfig(), (8, 1, 1)),
    (MeshConfig(data=2, fsdp=-1), (2, 4, 1)),
    (MeshConfig(data=2, fsdp=2, tensor=2), (2, 2, 2)),
    (MeshConfig(data=1, fsdp=1, tensor=-1), (1, 1, 8)),
  ],
  ids=str,
)
def test_the_mesh_takes_all_devices(config, shape):
  mesh = sharding.make_mesh(config)
  assert tuple(mesh.shape.items()) == tuple(
    zip(sharding.AXES, shape, strict=True)
  )


def test_a_mesh_can_be_made_of_some_devices():
  mesh = sharding.make_mesh(MeshConfig(fsdp=2), devices=jax.devices()[:4])
  assert mesh.devices.shape == (2, 2, 1)
  assert list(mesh.devices.flat) == jax.devices()[:4]


@pytest.mark.parametrize(
  "config", [MeshConfig(data=3), MeshConfig(data=2, fsdp=2), MeshConfig(fsdp=3)]
)
def test_a_mesh_that_does_not_fit_the_devices_is_an_error(config):
  with pytest.raises(config_lib.ConfigError, match="the 8 devices"):
    sharding.make_mesh(config)


def test_a_batch_is_split_over_data_and_fsdp():
  mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
  assert sharding.batch_sharding(mesh).shard_shape((8, 5)) == (2, 5)
  assert sharding.replicated(mesh).shard_shape((8, 5)) == (8, 5)


@dataclasses.dataclass(frozen=True)
class Chip:
  """What a mesh asks of a device: here of hosts that hold 2 x 2 of a slice."""

  id: int
  process_index: int
  platform: str = "tpu"
  device_kind: str = "TPU v5 lite"


def test_devices_of_a_process_stay_together():
  # By their place in the slice, row by row, hosts take turns.
  place = [
    (x // 2 + 2 * (y // 2), x % 2 + 2 * (y % 2))
    for y in range(4)
    for x in range(4)
  ]
  chips = [Chip(4 * host + chip, host) for host, chip in place]
  mesh = sharding.make_mesh(MeshConfig(fsdp=4), devices=chips)
  assert mesh.devices.shape == (4, 4, 1)
  hosts = [chip.process_index for chip in mesh.devices.flat]
  assert hosts == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
