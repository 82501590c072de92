"""The mesh, and which axis of which parameter lies on which mesh axis.

Mesh axes: `data` (batch), `fsdp` (batch and parameters), `tensor` (heads and
mlp). Axes are Auto: XLA places what is not said here. With Explicit axes every
einsum and gather of the models would have to name its output sharding.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from glscl_jax.config import ConfigError, MeshConfig
from glscl_jax.types import BATCH_AXES

AXES = ("data", "fsdp", "tensor")
BATCH = P(BATCH_AXES)

# Path pattern -> spec of the trailing dimensions; a leading layer axis stays
# whole. Each parameter matches exactly one rule, each rule is used.
PARAM_RULES: tuple[tuple[str, P], ...] = (
  (r".*attention/(query|key|value)/kernel", P("fsdp", "tensor")),
  (r".*attention/(query|key|value)/bias", P("tensor")),
  (r".*attention/out/kernel", P("tensor", "fsdp")),
  (r".*mlp/fc1/kernel", P("fsdp", "tensor")),
  (r".*mlp/fc1/bias", P("tensor")),
  (r".*mlp/fc2/kernel", P("tensor", "fsdp")),
  (r"text/(word|position|type)_embedding", P(None, "fsdp")),
  (r"image_positions/value", P(None, "fsdp")),
  (r"(region/(feature|box)|pooler)/kernel", P(None, "fsdp")),
  (r"vision/(patch_kernel|position_embedding)", P(None, "fsdp")),
  (r"vision/stem/.*(join|conv[12])/kernel", P(None, "fsdp")),
  (r"fusion/(text|image)_(transform|pooler)/kernel", P(None, "fsdp")),
  (
    r"((mlm|word|region|feature)_head/fc1|.*_projection(/fc[12])?)/kernel",
    P(None, "fsdp"),
  ),
  # By width: the vocabulary (50265) has no factor to split it by.
  (
    r"((mlm|region)_head/fc2|(match|pixel|caption)_head/fc)/kernel",
    P("fsdp", None),
  ),
  (r".*(norm\d?|ln_(pre|post))/(scale|bias)", P()),
  (r".*(attention/out|mlp/fc2)/bias", P()),
  (r".*(_transform|pooler|_head(/fc\d?)?|_projection(/fc[12])?)/bias", P()),
  (r"region/(feature|box)/bias", P()),
  (r"(vision/(patch_bias|mask_token/value)|region/mask_feature/value)", P()),
  (r"(vision|text)/class_embedding", P()),
  (r"(temperature|logit_scale|fusion/type_embedding)/value", P()),
)


def path_name(path: tuple[Any, ...]) -> str:
  """A tree path as `vision/blocks/layers/mlp/fc1/kernel`."""
  return jax.tree_util.keystr(path, simple=True, separator="/")


def match_one(name: str, rules: tuple[tuple[str, Any], ...]) -> Any:
  """The value of the only rule that matches all of `name`.

  Raises:
    ValueError: no rule or several rules match.
  """
  found = [(p, value) for p, value in rules if re.fullmatch(p, name)]
  if len(found) != 1:
    patterns = [pattern for pattern, _ in found]
    raise ValueError(f"parameter {name} matches {len(found)} rules {patterns}")
  return found[0][1]


def map_with_name(function: Callable[[str, Any], Any], tree: Any) -> Any:
  """Maps `function(name, leaf)` over a parameter tree."""
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: function(path_name(path), leaf), tree
  )


def make_mesh(
  config: MeshConfig, *, devices: Sequence[jax.Device] | None = None
) -> jax.sharding.Mesh:
  """A mesh over `devices`, by default all of them.

  Devices of one process stay together, so that the rows of a batch which a
  process makes are one block.

  Raises:
    ConfigError: the sizes do not multiply to the number of devices.
  """
  sizes = np.array([config.data, config.fsdp, config.tensor])
  devices = jax.devices() if devices is None else devices
  count = len(devices)
  known = int(np.prod(sizes[sizes != -1]))
  if -1 in sizes and count % known == 0:
    sizes[sizes == -1] = count // known
  if int(np.prod(sizes)) != count:
    raise ConfigError(
      f"config.mesh: data x fsdp x tensor = {tuple(map(int, sizes))} does not "
      f"give the {count} devices that are here; set one of them to -1"
    )
  shape, types = tuple(map(int, sizes)), (AxisType.Auto,) * 3
  if len({device.process_index for device in devices}) == 1:
    return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)
  # jax would follow the wires of a TPU slice, in and out of its hosts.
  ordered = sorted(
    devices, key=lambda device: (device.process_index, device.id)
  )
  return jax.sharding.Mesh(
    np.array(ordered).reshape(shape), AXES, axis_types=types
  )


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
  """Leading axis over data and fsdp."""
  return NamedSharding(mesh, BATCH)


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
  """The whole array on every device."""
  return NamedSharding(mesh, P())


def _axes(name: str, shape: tuple[int, ...]) -> tuple[str | None, ...]:
  """The mesh axis that the rules want for each dimension."""
  spec = match_one(name, PARAM_RULES)
  return (None,) * (len(shape) - len(spec)) + tuple(spec)


def param_spec(name: str, shape: tuple[int, ...], mesh) -> P:
  """The rule's spec, padded for layer axes; sizes must divide to be split."""
  return P(
    *(
      axis if axis is not None and size % mesh.shape[axis] == 0 else None
      for axis, size in zip(_axes(name, shape), shape, strict=True)
    )
  )


def find_undivided(params: Any, mesh: jax.sharding.Mesh) -> list[str]:
  """For each mesh axis a line on the parameters that it cannot split.

  They stay whole along it, so that a small model runs on a large mesh.
  """
  wanted = {axis: [] for axis in AXES}
  whole = {axis: [] for axis in AXES}

  def look(name: str, leaf: Any) -> None:
    for axis, size in zip(_axes(name, leaf.shape), leaf.shape, strict=True):
      if axis is not None:
        wanted[axis].append(name)
        if size % mesh.shape[axis]:
          whole[axis].append(name)

  map_with_name(look, params)
  return [
    f"mesh.{axis} = {mesh.shape[axis]} splits "
    f"{len(wanted[axis]) - len(names)} of {len(wanted[axis])} parameters; it "
    f"does not divide a size of {', '.join(names)}"
    for axis, names in whole.items()
    if names
  ]


def param_shardings(params: Any, mesh: jax.sharding.Mesh) -> Any:
  """A NamedSharding for each parameter (arrays or ShapeDtypeStructs)."""
  return map_with_name(
    lambda name, leaf: NamedSharding(mesh, param_spec(name, leaf.shape, mesh)),
    params,
  )
