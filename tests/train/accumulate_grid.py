"""Every system with 1, 4 and 16 micro-batches on 1, 2, 4 and 8 devices.

  python tests/train/accumulate_grid.py [SYSTEM ...]

A program of its own, because it compiles 48 steps; the suite holds fewer
(`accumulate_test.py`). Prints the largest difference of each from the batch in
one piece on one device, and ends with an error where one is too large.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
  (
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
  )
)
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import jax
import numpy as np

from glscl_jax import config as config_lib
from glscl_jax import sharding
from glscl_jax.train import accumulate
from tests import random_pairs, random_regions
from tests.train import accumulate_test

BATCH, GROUP = 128, 2  # 16 pieces on 8 devices, of whole groups where they can
BOUND = 1e-5
MESHES = ((1, 1, 1), (2, 1, 1), (2, 2, 1), (8, 1, 1))


def main(systems: list[str]) -> None:
  for name in systems or ["glscl", "maskvlm", "sycoca", "cmal"]:
    config = widen(accumulate_test.CONFIGS[name])
    gradient, scalars = compute(config, 1, MESHES[0])
    norm = np.sqrt(sum(np.sum(g**2) for g in jax.tree.leaves(gradient)))
    for number in (1, 4, 16):
      for shape in MESHES:
        found, others = compute(config, number, shape)
        gaps = jax.tree.map(lambda a, b: np.max(np.abs(a - b)), found, gradient)
        gap = max(jax.tree.leaves(gaps)) / norm
        scalar = max(
          abs(others[key] - value) / max(1, abs(value))
          for key, value in scalars.items()
        )
        print(
          f"{name}: {number} micro-batches, mesh {shape}: gradient "
          f"{gap:.1e} of its norm, scalars {scalar:.1e}",
          flush=True,
        )
        assert max(gap, scalar) < BOUND


def widen(config: config_lib.Config) -> config_lib.Config:
  """The same with 128 samples, in groups of 2."""
  groups = {
    name: GROUP
    for name in accumulate.LOCAL_GROUPS
    if getattr(config.objectives, name) < BATCH
  }
  return dataclasses.replace(
    config,
    data=dataclasses.replace(config.data, batch_size=BATCH),
    objectives=dataclasses.replace(config.objectives, **groups),
  )


def compute(
  config: config_lib.Config, number: int, shape: tuple[int, int, int]
) -> tuple[dict, dict]:
  """Gradients and scalars, on the host."""
  config = accumulate_test.change(config, number)
  source = random_regions if config.system == "cmal" else random_pairs
  mesh = sharding.make_mesh(
    config_lib.MeshConfig(**dict(zip(sharding.AXES, shape, strict=True))),
    devices=jax.devices()[: int(np.prod(shape))],
  )

  def run(params, batch, key):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return accumulate.gradients(params, batch, config=config, key=key, step=0)

  params = random_pairs.spread_params(config)
  found = jax.jit(run)(
    jax.device_put(params, sharding.param_shardings(params, mesh)),
    jax.device_put(source.batch(config), sharding.batch_sharding(mesh)),
    jax.random.key(7),
  )
  return jax.tree.map(np.asarray, found)


if __name__ == "__main__":
  main(sys.argv[1:])
