"""Contrastive losses around a ring of devices: values, memory, traffic, time.

`pytest -n 0 -s` prints the tables of docs/scaling.md.
"""

import functools
import math
import re
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glscl_jax import sharding
from glscl_jax.config import MeshConfig, ObjectiveConfig
from glscl_jax.objectives import contrastive
from tests.objectives import plain_contrast

MESHES = [(2, 1, 1), (4, 1, 1), (8, 1, 1), (2, 4, 1), (2, 2, 2)]
ROWS, WIDTH = 48, 16
BLOCK = ObjectiveConfig().contrast_block
# What long runs compile; the other tests compile quickly rather than well.
OPTIMISED = {
  "xla_backend_optimization_level": 3,
  "xla_llvm_disable_expensive_passes": False,
}


def make_mesh(shape):
  return sharding.make_mesh(
    MeshConfig(**dict(zip(sharding.AXES, shape, strict=True))),
    devices=jax.devices()[: math.prod(shape)],
  )


def program(function, mesh, rows, width, options=None, **settings):
  """Lowers loss, gradients and accuracy of rows spread over `mesh`."""
  rows_spec, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)

  def run(query, key, tau, identity):
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return jax.value_and_grad(
        lambda *point: function(*point, identity_AM=identity, **settings),
        (0, 1, 2),
      )(query, key, tau)

  def like(shape, dtype, where):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

  features = like((rows, width), jnp.float32, rows_spec)
  return (
    jax.jit(run, out_shardings=(whole, (rows_spec, rows_spec, whole)))
    .lower(
      features,
      features,
      like((), jnp.float32, whole),
      like((rows, 2), jnp.int32, rows_spec),
    )
    .compile(compiler_options=options)
  )


def point(mesh, rows, width, num_ids):
  """Random arguments of a program, where it wants them."""
  rng = np.random.default_rng(0)
  query = rng.standard_normal((rows, width), np.float32)
  key = query + rng.standard_normal((rows, width), np.float32)
  rows_spec = sharding.batch_sharding(mesh)
  return (
    *jax.device_put((query, key), rows_spec),
    jax.device_put(np.float32(0.1), sharding.replicated(mesh)),
    jax.device_put(rng.integers(0, num_ids, (rows, 2), np.int32), rows_spec),
  )


@functools.cache
def found(shape, same_image, group):
  mesh = make_mesh(shape)
  run = program(
    contrastive.info_nce,
    mesh,
    ROWS,
    WIDTH,
    same_image=same_image,
    group=group,
    block=4,
    valid_A=np.arange(ROWS) % 5 > 0,
    sample_A=np.arange(ROWS) // 2,
  )
  return jax.tree.map(np.asarray, run(*point(mesh, ROWS, WIDTH, ROWS // 2)))


@pytest.mark.parametrize("shape", MESHES, ids=str)
@pytest.mark.parametrize(
  ("same_image", "group"),
  [
    ("ignore", None),
    ("none", None),
    ("positive", None),
    ("ignore", 6),  # within each of eight devices
    ("ignore", 12),  # two of eight
    ("positive", 16),  # across borders of eight
  ],
)
def test_loss_and_gradients_are_those_of_one_device(shape, same_image, group):
  value, gradients = found(shape, same_image, group)
  wanted_value, wanted = found((1, 1, 1), same_image, group)
  np.testing.assert_allclose(value, wanted_value, rtol=1e-6)
  for a, b in zip(gradients, wanted, strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_accuracy_is_that_of_one_device(shape):
  def run(query, key, _, identity):
    return contrastive.accuracy(query, key, identity, block=4)

  mesh = make_mesh(shape)
  with jax.set_mesh(mesh):
    value = jax.jit(run)(*point(mesh, ROWS, WIDTH, ROWS))
  wanted = jax.jit(run)(*point(make_mesh((1, 1, 1)), ROWS, WIDTH, ROWS))
  assert float(value) == float(wanted)
  assert 0 < wanted < 1


def collectives(compiled, kind):
  """Elements of each result of a collective of floats."""
  text = compiled.as_text()
  results = re.findall(rf"= \(?(.*?) {kind}(?:-start)?\(", text)
  shapes = [s for r in results for s in re.findall(r"f32\[([\d,]*)\]", r)]
  return [math.prod(int(n) for n in s.split(",") if n) for s in shapes]


@pytest.mark.parametrize("group", [None, 12])
def test_features_travel_around_the_ring_and_are_not_gathered(group):
  mesh = make_mesh((8, 1, 1))
  run = program(
    contrastive.info_nce, mesh, ROWS, WIDTH, group=group, block=BLOCK
  )
  held = ROWS * WIDTH // 8
  assert max(collectives(run, "collective-permute")) == held
  for kind in ("all-gather", "all-to-all", "all-reduce"):
    assert max(collectives(run, kind), default=0) <= ROWS, kind
  plain = program(plain_contrast.info_nce, mesh, ROWS, WIDTH, group=group)
  assert max(collectives(plain, "all-gather")) >= held * 2  # the test sees them


def test_groups_within_a_device_move_no_features():
  mesh = make_mesh((8, 1, 1))
  run = program(contrastive.info_nce, mesh, ROWS, WIDTH, group=6, block=BLOCK)
  for kind in ("collective-permute", "all-gather", "all-to-all", "all-reduce"):
    assert max(collectives(run, kind), default=0) <= ROWS, kind


def megabytes(function, rows, **settings):
  """Temporary memory of a device, of eight that share rows of width 256."""
  run = program(
    function, make_mesh((8, 1, 1)), rows, 256, OPTIMISED, **settings
  )
  return run.memory_analysis().temp_size_in_bytes / 1e6


def test_memory_of_a_device_grows_with_its_rows_and_not_with_their_square():
  print("\n| rows | one matrix, MB | ring, MB | ratio |\n|---|---|---|---|")
  ring = {}
  for rows in (8192, 16384, 32768):
    plain = megabytes(plain_contrast.info_nce, rows)
    ring[rows] = megabytes(contrastive.info_nce, rows, block=BLOCK)
    ratio = plain / ring[rows]
    print(f"| {rows} | {plain:.0f} | {ring[rows]:.1f} | {ratio:.0f} |")
  assert ratio >= 50
  assert ring[16384] <= 2.1 * ring[8192]
  assert ring[32768] <= 2.1 * ring[16384]


def test_the_ring_is_no_slower_than_one_matrix():
  mesh, rows = make_mesh((8, 1, 1)), 4096
  arguments = point(mesh, rows, 256, 4 * rows)
  runs = {
    "ring": program(
      contrastive.info_nce, mesh, rows, 256, OPTIMISED, block=BLOCK
    ),
    "one matrix": program(plain_contrast.info_nce, mesh, rows, 256, OPTIMISED),
  }
  seconds = {name: [] for name in runs}
  for _ in range(5):  # in turns, so that both meet the same load
    for name, run in runs.items():
      start = time.process_time()  # of this process alone
      jax.block_until_ready(run(*arguments))
      seconds[name].append(time.process_time() - start)
  medians = {name: statistics.median(s) for name, s in seconds.items()}
  ratio = medians["ring"] / medians["one matrix"]
  print(f"\n{rows} rows, CPU seconds: {medians}, ratio {ratio:.2f}")
  assert ratio < 1.25
