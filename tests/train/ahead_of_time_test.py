"""The roofline of a step that is not run, and what can be wrong with it.

`-m tpu_aot` compiles for TPUs as well, where libtpu is installed.
"""

import dataclasses
import importlib.util
import os

import jax
import pytest

from glscl_jax import errors, sharding
from glscl_jax.config import MeshConfig
from glscl_jax.systems import registry
from glscl_jax.train import ahead_of_time, hardware, program
from tests import random_pairs

CHIP = hardware.Chip(
  words=("toy",),
  flops=100e12,
  memory=16 * 2**30,
  memory_rate=1e12,
  link_rate=50e9,
  wraps=4,
)


@dataclasses.dataclass(frozen=True)
class Device:
  """What is asked of one."""

  coords: tuple[int, ...] = (0, 0, 0)
  process_index: int = 0


TORUS = [Device((x, y, 0)) for x in range(4) for y in range(2)]


def collective(kind, devices, *, size=1_000_000, count=3):
  return program.Collective(
    kind=kind,
    arrays="f32[250000]",
    bytes=size,
    group=len(devices),
    axes=("data",),
    devices=tuple(devices),
    count=count,
  )


@pytest.mark.parametrize(
  ("kind", "devices", "bytes_sent", "lanes"),
  [
    # A line of 4 closes to a ring: both directions at once.
    ("all-gather", (0, 2, 4, 6), 3 / 4, 2),
    ("reduce-scatter", (0, 2, 4, 6), 3 / 4, 2),
    ("all-reduce", (0, 2, 4, 6), 2 * 3 / 4, 2),
    # A line of 2 does not.
    ("all-gather", (0, 1), 1 / 2, 1),
    # Both dimensions carry a part.
    ("all-reduce", range(8), 2 * 7 / 8, 3),
    ("collective-permute", (0, 1), 1, 1),
    ("all-reduce", (5,), 0, 1),
  ],
)
def test_transfers_take_the_time_of_a_ring(kind, devices, bytes_sent, lanes):
  found = ahead_of_time.link_seconds(
    collective(kind, tuple(devices)), CHIP, TORUS
  )
  assert found == pytest.approx(3 * 1e6 * bytes_sent / (lanes * 50e9))


def test_gpus_of_several_hosts_share_the_adapters():
  gpu = dataclasses.replace(CHIP, link_rate=450e9, host_rate=50e9)
  devices = [Device(process_index=host) for host in (0, 0, 1, 1)]

  def seconds(*numbers):
    one = collective("all-gather", numbers, count=1)
    return ahead_of_time.link_seconds(one, gpu, devices)

  assert seconds(0, 1) == pytest.approx(1e6 / 2 / 450e9)
  assert seconds(0, 2) == pytest.approx(1e6 / 2 / 50e9)
  assert seconds(0, 1, 2, 3) == pytest.approx(1e6 * 3 / 4 / 100e9)


def plan(work, monkeypatch):
  monkeypatch.setattr(hardware, "find", lambda kind: CHIP)
  config = random_pairs.config(batch_size=16)
  mesh = sharding.make_mesh(MeshConfig())
  made = ahead_of_time.make_plan(
    config,
    "toy:8",
    mesh,
    work=work,
    num_params=7,
    compile_seconds=1.0,
    state_bytes=2 * 2**30,
    temporary_bytes=2**30,
  )
  model = registry.find(config).forward(config).step * 16 / 8
  return made, model


def test_a_step_takes_as_long_as_the_slowest_of_three(monkeypatch):
  work = program.Work(flops=1e12, memory_bytes=3e10, collectives=())
  made, model = plan(work, monkeypatch)
  assert made.compute_seconds == pytest.approx(0.010)
  assert made.memory_seconds == made.step_seconds == pytest.approx(0.030)
  assert made.serial_seconds == pytest.approx(0.040)
  assert made.model_flops == model
  assert made.mfu == pytest.approx(model / 0.030 / 100e12)
  assert made.serial_mfu == pytest.approx(model / 0.040 / 100e12)


def test_the_figures_are_written_for_people(monkeypatch):
  one = collective("all-reduce", (0,), size=2_000_000, count=4)
  work = program.Work(flops=1e12, memory_bytes=3e10, collectives=(one,))
  made, _ = plan(work, monkeypatch)
  text = ahead_of_time.format_plan(made)
  for part in (
    "glscl, batch 16, toy:8: 8 x cpu, mesh data 8 x fsdp 1 x tensor 1",
    "3.00 GiB of 16: 2.00 state and batch, 1.00 temporary",
    "30.00 GB of main memory: 30.0 ms",
    "all-reduce over data: 4 times, 8.0 MB, largest f32[250000] (2.00 MB)",
    "at best 30.0 ms a step",
    "one after the other 40.0 ms, 400 samples/s",
  ):
    assert part in text, part


@pytest.mark.parametrize(
  "topology", ["v5litepod-16", "v5e", "v5e:", "v5e:4x", "v7:2x2", "16x16", ""]
)
def test_a_topology_that_is_none_names_those_that_are(topology):
  with pytest.raises(errors.UserError, match="v5e:16x16.*h200:1x8") as caught:
    ahead_of_time.find_devices(topology)
  assert f"--topology={topology}: no such name" in str(caught.value)


@pytest.mark.parametrize(
  ("topology", "package"),
  [
    ("v5e:16x16", "tpu-aot"),
    ("h200:1x8", f"jax-cuda13-plugin=={jax.__version__}"),
  ],
)
def test_a_missing_compiler_is_named(topology, package, monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(errors.UserError, match="pip install") as caught:
    ahead_of_time.find_devices(topology)
  assert package in str(caught.value)


@pytest.mark.parametrize(
  ("batch_size", "group", "told"),
  [(24, 4, True), (24, 6, False), (24, 3, False), (64, 4, False)],
)
def test_groups_that_end_inside_of_a_device_are_told(batch_size, group, told):
  config = random_pairs.config(
    batch_size=batch_size,
    objectives=random_pairs.only("itm") | {"neg_group": group},
  )
  found = ahead_of_time.find_split_groups(
    config, sharding.make_mesh(MeshConfig())
  )
  assert [line.startswith("objectives.neg_group") for line in found] == (
    [True] if told else []
  )


def test_what_does_not_fit_is_told_with_what_to_try():
  # Of libtpu 0.0.42.1.
  message = (
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in "
    "memory space hbm. Used 17.68G of 15.75G hbm. Exceeded hbm capacity by "
    "1.93G.\n\nTotal hbm usage >= 17.93G:"
  )
  text = ahead_of_time.describe_excess(message, "v5e:4x4")
  assert "need 17.68G of its 15.75G" in text
  for option in ("data.batch_size", "model.remat", "mesh.fsdp"):
    assert f"--config.{option}" in text
  assert "\n" not in text
  other = ahead_of_time.describe_excess("RESOURCE_EXHAUSTED: x\ny", "v5e:4x4")
  assert "RESOURCE_EXHAUSTED: x" in other


tpu = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="needs libtpu"
)


def test_cudnn_is_not_compiled_for_gpus_elsewhere(monkeypatch):
  monkeypatch.setattr(
    ahead_of_time, "find_devices", lambda topology: jax.devices()[:1]
  )
  config = random_pairs.config(fused_attention=True, compute_dtype="bfloat16")
  with pytest.raises(errors.UserError, match="fused_attention: .* h200:1x1"):
    ahead_of_time.compile_ahead(config, "h200:1x1")


@pytest.mark.tpu_aot
@tpu
def test_a_small_step_compiles_for_a_tpu(monkeypatch):
  for name in ("TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD"):
    monkeypatch.setitem(os.environ, name, "1")
  config = random_pairs.config(
    width=128, batch_size=16, compute_dtype="bfloat16", depth=2, remat="full"
  )
  config = dataclasses.replace(config, mesh=MeshConfig(data=2, fsdp=2))
  found, text = ahead_of_time.compile_ahead(config, "v5e:2x2")
  assert "bf16[" in text  # what travels between the products of a TPU
  assert 0 < found.mfu < 1
  assert found.flops > found.model_flops
  assert found.state_bytes + found.temporary_bytes < 16 * 2**30
  assert {"all-reduce", "all-gather"} <= {
    one["kind"] for one in found.collectives
  }


@pytest.mark.tpu_aot
@tpu
@pytest.mark.parametrize("topology", ["v5e:3x3", "v4:5x2x2", "v6e:7"])
def test_a_shape_that_the_tpus_do_not_have_is_an_error(topology):
  with pytest.raises(errors.UserError, match=f"--topology={topology}: "):
    ahead_of_time.find_devices(topology)
