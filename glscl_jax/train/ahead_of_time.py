"""Compiles a recipe's step for accelerators that are not here.

`launch/compile.py`: whether a batch and a mesh fit, what a chip computes, reads
and sends in a step, and a bound of the speed, before a pod is booked. The step
is the run's own; only its devices and its arrays are missing.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import math
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from glscl_jax import config as config_lib
from glscl_jax import errors, sharding
from glscl_jax.systems import registry
from glscl_jax.train import hardware, program, shapes
from glscl_jax.train import state as state_lib
from glscl_jax.train import step as step_lib

GIB = 2**30
TPUS = ("v4", "v5e", "v5p", "v6e")
EXAMPLES = (
  "v4:4x4x4, v5e:16x16, v5p:4x4x4 and v6e:16x16 are chips along the dimensions "
  "of a torus, h100:1x8 and h200:1x8 hosts x GPUs"
)
# What XLA reads off a GPU, typed in from data sheets: it plans memory by it,
# and tunes nothing.
_GPU = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {memory_rate:.0f}
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: {memory:.0f}
  shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: 9 minor: 0 }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{kind}"
"""
_GPUS = {"h100": "NVIDIA H100 80GB HBM3", "h200": "NVIDIA H200"}
# Its choice of tiles asks the device.
_OPTIONS = {"gpu": {"xla_gpu_enable_triton_gemm": False}}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """What one step would be; bytes, FLOPs and seconds are those of a chip."""

  system: str
  topology: str
  devices: str  # number and kind
  mesh: dict[str, int]
  jax: str  # version
  batch_size: int
  num_params: int
  compile_seconds: float
  memory: float  # that a chip has
  state_bytes: float  # arguments: state and batch
  temporary_bytes: float
  flops: float  # of products, with what is computed again
  model_flops: float  # of the model alone, forward and backward
  memory_bytes: float  # read and written
  collectives: list[dict[str, Any]]  # program.Collective, and seconds
  compute_seconds: float  # each of the three alone
  memory_seconds: float
  link_seconds: float
  step_seconds: float  # the largest of the three: all of them at once
  serial_seconds: float  # their sum: one after the other
  mfu: float  # at step_seconds
  serial_mfu: float

  def to_json(self) -> str:
    """As one object."""
    return json.dumps(dataclasses.asdict(self), indent=1)


def find_devices(topology: str) -> list[jax.Device]:
  """Devices that can be compiled for and hold nothing.

  Raises:
    UserError: a name that is none, or a package that is missing.
  """
  option = f"--topology={topology}"
  kind, _, shape = topology.partition(":")
  sizes = re.fullmatch(r"\d+(x\d+)*", shape)
  if kind not in (*TPUS, *_GPUS) or not sizes:
    raise errors.UserError(f"{option}: no such name; {EXAMPLES}")
  if kind in TPUS:
    return _find_tpus(kind, shape, option)
  return _find_gpus(kind, shape, option)


def _find_tpus(kind: str, shape: str, option: str) -> list[jax.Device]:
  if importlib.util.find_spec("libtpu") is None:
    raise errors.UserError(
      f"{option}: compiling for a TPU needs the package libtpu, though no TPU: "
      "pip install -e '.[tpu-aot]'"
    )
  sizes = tuple(map(int, shape.split("x")))
  settings: dict[str, Any] = {}
  if kind == "v4":
    settings["chip_config_name"] = "megacore"  # a device a chip, not a core
  if math.prod(sizes) == 1:
    settings["chips_per_host_bounds"] = [1, 1, 1]
  try:
    found = topologies.get_topology_desc(
      platform="tpu", topology_name=f"{kind}:{shape}", **settings
    )
  except jax.errors.JaxRuntimeError as error:
    raise errors.UserError(f"{option}: {_first_line(error)}; {EXAMPLES}") from (
      error
    )
  return list(found.devices)


def _find_gpus(kind: str, shape: str, option: str) -> list[jax.Device]:
  # Without any plugin there is no folder of them either.
  plugins = importlib.util.find_spec("jax_plugins")
  if not plugins or not importlib.util.find_spec("jax_plugins.xla_cuda13"):
    raise errors.UserError(
      f"{option}: compiling for a GPU needs the packages jax-cuda13-plugin and "
      "jax-cuda13-pjrt, though no GPU: pip install --no-deps "
      f"jax-cuda13-plugin=={jax.__version__} jax-cuda13-pjrt=={jax.__version__}"
    )
  if shape.count("x") != 1:
    raise errors.UserError(f"{option}: expected hosts x GPUs; {EXAMPLES}")
  chip = hardware.find(_GPUS[kind])
  found = topologies.get_topology_desc(
    platform="cuda",
    topology_name=kind,
    topology=f"1x{shape}",
    target_config=_GPU.format(
      memory_rate=chip.memory_rate, memory=chip.memory, kind=_GPUS[kind]
    ),
  )
  return list(found.devices)


def compile_ahead(
  config: config_lib.Config,
  topology: str,
  *,
  say: Callable[[str], None] = print,
) -> tuple[Plan, str]:
  """Compiles the step; reads no data and writes nothing.

  Args:
    config: the run's; its mesh is laid over the topology.
    topology: a name, see EXAMPLES.
    say: called with each stage.

  Returns:
    What it would be, and the compiled program's text.

  Raises:
    UserError: a topology that is none, a mesh or a batch that does not divide
      over it, or a step that does not fit into the memory of a chip.
  """
  devices = find_devices(topology)
  model = config.model
  if (
    model.fused_attention
    and model.compute_dtype == "bfloat16"
    and devices[0].platform != "tpu"
  ):
    raise config_lib.ConfigError(
      "config.model.fused_attention: jax asks for the version of cuDNN, which "
      f"is not here, before it compiles for {topology}; set it to False"
    )
  mesh = sharding.make_mesh(config.mesh, devices=devices)
  batch = shapes.abstract_batch(config, mesh)
  state = state_lib.abstract_state(config, mesh)
  make_key = functools.partial(state_lib.stream_key, stream="step")
  key = jax.eval_shape(make_key, np.int32(config.train.seed))
  for line in (
    *sharding.find_undivided(state.params, mesh),
    *find_split_groups(config, mesh),
  ):
    say(f"warning: {line}")
  say(f"compiling for {len(devices)} x {devices[0].device_kind}: minutes")
  started = time.perf_counter()
  try:
    compiled = (
      step_lib.make_train_step(config, mesh)
      .lower(state, batch, key)
      .compile(_OPTIONS.get(devices[0].platform))
    )
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    raise errors.UserError(describe_excess(str(error), topology)) from error
  seconds = time.perf_counter() - started
  text = compiled.as_text()
  memory = compiled.memory_analysis()
  plan = make_plan(
    config,
    topology,
    mesh,
    work=program.read(text, dict(mesh.shape)),
    num_params=sum(leaf.size for leaf in jax.tree.leaves(state.params)),
    compile_seconds=seconds,
    state_bytes=memory.argument_size_in_bytes,
    # Of the results only those take room that replace no argument.
    temporary_bytes=memory.temp_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes,
  )
  needed = plan.state_bytes + plan.temporary_bytes
  if needed > plan.memory:  # compilers of GPUs plan it all the same
    raise errors.UserError(
      describe_excess(
        f"Used {needed / GIB:.2f}G of {plan.memory / GIB:.2f}G hbm", topology
      )
    )
  return plan, text


def find_split_groups(
  config: config_lib.Config, mesh: jax.sharding.Mesh
) -> list[str]:
  """A line on each group of samples whose border lies inside of a device.

  Then XLA moves samples so that groups lie evenly.
  """
  num_devices = mesh.shape["data"] * mesh.shape["fsdp"]
  batch_size = config.data.batch_size // config.train.accumulate
  held = batch_size // num_devices
  found = []
  for name, objective in config_lib.GROUPS.items():
    group = getattr(config.objectives, name)
    active = getattr(config.objectives, objective) > 0
    group = min(group or batch_size, batch_size)
    if active and group % held and held % group:
      found.append(
        f"objectives.{name} {group} neither divides the {held} samples of a "
        "device nor is a multiple: groups are taken apart on the way"
      )
  return found


def make_plan(
  config: config_lib.Config,
  topology: str,
  mesh: jax.sharding.Mesh,
  *,
  work: program.Work,
  num_params: int,
  compile_seconds: float,
  state_bytes: float,
  temporary_bytes: float,
) -> Plan:
  """Puts together what is known of a compiled step; the arguments are Plan's.

  The bound is a roofline: products at the chip's peak, memory traffic and
  transfers at the data sheet's rates.
  """
  devices = list(mesh.devices.flat)
  chip = hardware.find(devices[0].device_kind)
  links = [link_seconds(one, chip, devices) for one in work.collectives]
  size = config.data.batch_size
  model = registry.find(config).forward(config).step * size / len(devices)
  parts = (
    work.flops / chip.flops,
    work.memory_bytes / chip.memory_rate,
    sum(links),
  )
  return Plan(
    system=config.system,
    topology=topology,
    devices=f"{len(devices)} x {devices[0].device_kind}",
    mesh=dict(mesh.shape),
    jax=jax.__version__,
    batch_size=size,
    num_params=num_params,
    compile_seconds=compile_seconds,
    memory=chip.memory,
    state_bytes=state_bytes,
    temporary_bytes=temporary_bytes,
    flops=work.flops,
    model_flops=model,
    memory_bytes=work.memory_bytes,
    collectives=[
      dataclasses.asdict(one) | {"seconds": seconds}
      for one, seconds in zip(work.collectives, links, strict=True)
    ],
    compute_seconds=parts[0],
    memory_seconds=parts[1],
    link_seconds=parts[2],
    step_seconds=max(parts),
    serial_seconds=sum(parts),
    mfu=model / chip.flops / max(parts),
    serial_mfu=model / chip.flops / sum(parts),
  )


def link_seconds(
  one: program.Collective, chip: hardware.Chip, devices: Sequence[jax.Device]
) -> float:
  """How long a collective takes if nothing but the links limits it.

  A ring algorithm over all dimensions of the torus that the devices of a group
  span, in both directions where these close to rings. A collective-permute
  takes one link of one dimension, as between neighbours.
  """
  if one.group == 1:
    return 0.0
  group = [devices[number] for number in one.devices]
  if one.kind == "collective-permute":
    return one.count * one.bytes / _rate(group[:2], chip, lanes=1)
  share = (one.group - 1) / one.group
  moved = one.bytes * share * (2 if one.kind == "all-reduce" else 1)
  lanes = 1
  if chip.host_rate is None:
    lanes = sum(
      2 if length % chip.wraps == 0 else 1
      for length in _spans([device.coords for device in group])
    )
  return one.count * moved / _rate(group, chip, lanes=lanes)


def _spans(coords: Sequence[Sequence[int]]) -> list[int]:
  """How far places reach along each dimension in which they differ."""
  at_AM = np.array(coords)
  length_M = at_AM.max(0) - at_AM.min(0) + 1
  return [int(length) for length in length_M if length > 1]


def _rate(
  group: Sequence[jax.Device], chip: hardware.Chip, *, lanes: int
) -> float:
  """Bytes a second that a device of the group sends."""
  hosts = {device.process_index for device in group}
  if chip.host_rate is None or len(hosts) == 1:
    return lanes * chip.link_rate
  # Each GPU of a host has an adapter.
  return min(chip.link_rate, chip.host_rate * len(group) / len(hosts))


def describe_excess(message: str, topology: str) -> str:
  """What a compiler's RESOURCE_EXHAUSTED means, and what to try."""
  found = re.search(r"Used ([\d.]+\w?) of ([\d.]+\w?)", message)
  needs = (
    f"a chip would need {found[1]} of its {found[2]} bytes"
    if found
    else message.strip().splitlines()[0]
  )
  return (
    f"--topology={topology}: the step does not fit: {needs}. Lower "
    "--config.data.batch_size, raise --config.train.accumulate, set "
    "--config.model.remat=full with --config.model.scan, share the state with "
    "--config.mesh.fsdp, or take more chips"
  )


def format_plan(plan: Plan) -> str:
  """For people."""
  mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
  needed = plan.state_bytes + plan.temporary_bytes
  again = plan.flops / plan.model_flops
  return "\n".join(
    [
      f"{plan.system}, batch {plan.batch_size}, {plan.topology}: "
      f"{plan.devices}, mesh {mesh}, {plan.num_params:,} parameters, jax "
      f"{plan.jax}; compiled in {plan.compile_seconds:.0f} s",
      "a chip, a step:",
      f"  memory      {needed / GIB:.2f} GiB of {plan.memory / GIB:.0f}: "
      f"{plan.state_bytes / GIB:.2f} state and batch, "
      f"{plan.temporary_bytes / GIB:.2f} temporary",
      f"  products    {plan.flops / 1e12:.3f} TFLOP, {again:.2f} times the "
      f"model's: {1e3 * plan.compute_seconds:.1f} ms at the peak",
      f"  traffic     {plan.memory_bytes / 1e9:.2f} GB of main memory: "
      f"{1e3 * plan.memory_seconds:.1f} ms",
      *_format_collectives(plan),
      f"at best {1e3 * plan.step_seconds:.1f} ms a step (products, traffic and "
      f"links at once), {plan.batch_size / plan.step_seconds:,.0f} samples/s, "
      f"MFU {100 * plan.mfu:.1f} %;",
      f"one after the other {1e3 * plan.serial_seconds:.1f} ms, "
      f"{plan.batch_size / plan.serial_seconds:,.0f} samples/s, "
      f"MFU {100 * plan.serial_mfu:.1f} %",
    ]
  )


def _format_collectives(plan: Plan) -> list[str]:
  """A line for all links, then one a kind and mesh axes."""
  sent = sum(one["bytes"] * one["count"] for one in plan.collectives)
  lines = [
    f"  links       {sent / 1e9:.3f} GB of collectives: "
    f"{1e3 * plan.link_seconds:.1f} ms"
  ]
  kinds: dict[tuple[str, str], list[dict[str, Any]]] = {}
  for one in plan.collectives:
    axes = "+".join(one["axes"]) or "-"
    kinds.setdefault((one["kind"], axes), []).append(one)
  for (kind, axes), ones in kinds.items():
    total = sum(one["bytes"] * one["count"] for one in ones)
    largest = max(ones, key=lambda one: one["bytes"])
    lines.append(
      f"    {kind} over {axes}: {sum(one['count'] for one in ones):.0f} times, "
      f"{total / 1e6:.1f} MB, largest {largest['arrays']} "
      f"({largest['bytes'] / 1e6:.2f} MB), "
      f"{1e3 * sum(one['seconds'] for one in ones):.2f} ms"
    )
  return lines


def _first_line(error: Exception) -> str:
  return str(error).strip().splitlines()[0]
