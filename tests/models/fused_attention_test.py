"""Kernels against the plain attention: values, gradients, masks, meshes."""

from __future__ import annotations

import functools
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glscl_jax import sharding
from glscl_jax.config import MeshConfig
from glscl_jax.errors import UserError
from glscl_jax.models import attention, fused_attention, products
from glscl_jax.systems import registry
from tests import random_pairs, random_regions

# queries, keys, valid keys of the three samples, causal
CASES = {
  "no padding": (130, 130, None, False),
  "padded keys": (96, 200, (200, 7, 1), False),
  "causal": (200, 200, None, True),
  "causal, and padded keys": (200, 200, (200, 150, 1), True),
  "odd lengths": (75, 131, None, False),
  "odd lengths, and padded keys": (75, 131, (131, 9, 2), False),
  "several blocks": (40, 1100, (1100, 1030, 3), False),
  "a class after the padding": (140, 140, (100, 7, 1), True),
}
APPENDED = "a class after the padding"  # its last key is valid, as SyCoCa's


def plain(q_BHLK, k_BHMK, v_BHMK, valid_BM, *, causal):
  p_BHLM = attention.probabilities(
    q_BHLK, k_BHMK, valid_BM, dtype="float32", causal=causal
  )
  return products.batched_dot(
    "BHLM,BHMK->BHLK", p_BHLM, v_BHMK, dtype="float32"
  )


def on_one_device():
  """The context that a training step sets."""
  return jax.set_mesh(
    sharding.make_mesh(MeshConfig(), devices=jax.devices()[:1])
  )


def make_case(case):
  """Operands of one of CASES, and whether it is causal."""
  *sizes, causal = CASES[case]
  q, k, v, valid_BM = make_operands(*sizes)
  if case == APPENDED:
    valid_BM[:, -1] = True
  return (q, k, v, valid_BM), causal


def make_operands(length, num_keys, counts, *, batch=3, heads=2):
  rng = np.random.default_rng(0)

  def draw(tokens):
    shape = (batch, heads, tokens, 64)
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  valid_BM = None
  if counts is not None:
    valid_BM = np.arange(num_keys)[None] < np.asarray(counts)[:, None]
  return draw(length), draw(num_keys), draw(num_keys), valid_BM


def value_and_gradients(kernel, q, k, v, valid_BM):
  """The mixed values, and gradients of a sum that weighs each differently."""

  def weighted(q, k, v):
    mixed = kernel(q, k, v, valid_BM)
    weight = jnp.cos(jnp.arange(mixed.size, dtype=jnp.float32))
    return jnp.sum(mixed * weight.reshape(mixed.shape)), mixed

  grads, mixed = jax.grad(weighted, (0, 1, 2), has_aux=True)(q, k, v)
  return mixed, grads


@pytest.mark.parametrize("case", CASES)
def test_splash_is_the_plain_attention(case):
  operands, causal = make_case(case)
  splash = functools.partial(
    fused_attention.splash, causal=causal, interpret=True
  )
  found = value_and_gradients(splash, *operands)
  expected = value_and_gradients(
    functools.partial(plain, causal=causal), *operands
  )
  for one, other in zip(
    jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
  ):
    np.testing.assert_allclose(one, other, atol=2e-5)


@pytest.fixture
def as_on_tpu(monkeypatch):
  """What a TPU would choose, interpreted here. Returns shapes it has seen."""
  seen = []
  splash = fused_attention.splash

  def record(q_BHLK, k_BHMK, v_BHMK, valid_BM, *, causal):
    seen.append(q_BHLK.shape)
    return splash(
      q_BHLK, k_BHMK, v_BHMK, valid_BM, causal=causal, interpret=True
    )

  monkeypatch.setattr(fused_attention, "splash", record)
  monkeypatch.setattr(products, "platform", lambda: "tpu")
  return seen


@pytest.mark.parametrize("counts", [(125, 9, 1, 50), None], ids=str)
@pytest.mark.parametrize(("heads", "own"), [(2, 1), (3, 3)])
def test_each_device_runs_the_kernel_on_its_samples_and_heads(
  as_on_tpu, counts, heads, own
):
  q, k, v, valid_BM = make_operands(100, 125, counts, batch=4, heads=heads)
  mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))

  def run(*operands):
    # As a training step does.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      attend = functools.partial(fused_attention.attend, dtype="float32")
      return value_and_gradients(attend, *operands)

  spread = [jax.device_put(x, sharding.batch_sharding(mesh)) for x in (q, k, v)]
  if valid_BM is not None:
    valid_BM = jax.device_put(valid_BM, sharding.batch_sharding(mesh))
  found = jax.jit(run)(*spread, valid_BM)
  assert set(as_on_tpu) == {(1, own, 100, 64)}
  expected = value_and_gradients(
    functools.partial(plain, causal=False), q, k, v, valid_BM
  )
  for one, other in zip(
    jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
  ):
    np.testing.assert_allclose(one, other, atol=2e-5)


def test_no_kernel_where_padding_would_outweigh_it(as_on_tpu):
  short, long = make_operands(50, 325, None), make_operands(325, 325, None)
  with on_one_device():
    assert fused_attention.attend(*short, dtype="float32") is None
    assert fused_attention.attend(*long, dtype="float32") is not None


def test_no_kernel_where_nobody_says_how_samples_are_spread(as_on_tpu):
  operands = make_operands(128, 128, None)
  assert fused_attention.attend(*operands, dtype="float32") is None
  with on_one_device():
    assert fused_attention.attend(*operands, dtype="float32") is not None


def test_no_kernel_where_devices_do_not_divide_the_samples(as_on_tpu):
  with jax.set_mesh(sharding.make_mesh(MeshConfig(data=8))):
    operands = make_operands(128, 128, None)
    assert fused_attention.attend(*operands, dtype="float32") is None


def test_no_kernel_on_cpu():
  operands = make_operands(128, 128, None)
  with on_one_device():
    assert fused_attention.attend(*operands, dtype="float32") is None


def test_a_layer_asks_the_kernel_unless_its_probabilities_are_read(as_on_tpu):
  x_BLD = make_operands(125, 125, None)[0].reshape(3, 125, 128)
  valid_BM = np.arange(125)[None] < np.array([125, 7, 1])[:, None]
  layer = attention.Attention("float32", fused=True)
  params = layer.init(jax.random.key(0), x_BLD, x_BLD)
  assert not as_on_tpu
  call = functools.partial(layer.apply, params, x_BLD, x_BLD, valid_BM)
  with on_one_device():
    found = call()
    assert len(as_on_tpu) == 1
    p_BHLM = call(return_probabilities=True)
  assert p_BHLM.shape == (3, 2, 125, 125) and len(as_on_tpu) == 1
  expected = attention.Attention("float32").apply(
    params, x_BLD, x_BLD, valid_BM
  )
  np.testing.assert_allclose(found, expected, atol=2e-5)


def test_a_fused_layer_drops_no_probabilities_on_any_platform():
  x_BLD = make_operands(8, 8, None)[0].reshape(3, 8, 128)
  key = {"dropout": jax.random.key(1)}
  plain_layer = attention.Attention("float32", 0.5)
  params = plain_layer.init(jax.random.key(0), x_BLD, x_BLD)
  undropped = plain_layer.apply(params, x_BLD, x_BLD)
  dropped = plain_layer.apply(params, x_BLD, x_BLD, rngs=key)
  assert np.abs(dropped - undropped).max() > 1e-3
  fused = attention.Attention("float32", 0.5, fused=True)
  np.testing.assert_array_equal(
    fused.apply(params, x_BLD, x_BLD, rngs=key), undropped
  )


def pretend_cudnn(monkeypatch):
  """jax asks for the version before it traces the kernel."""
  from jax._src.cudnn import fused_attention_stablehlo

  monkeypatch.setattr(
    fused_attention_stablehlo, "check_cudnn_version", lambda: 91000
  )


def test_without_cudnn_the_field_to_change_is_named(monkeypatch):
  from jax._src.cudnn import fused_attention_stablehlo

  monkeypatch.setattr(fused_attention_stablehlo, "cuda_versions", None)
  (q, k, v, valid_BM), causal = make_case("padded keys")
  operands = [x.astype(jnp.bfloat16) for x in (q, k, v)]
  with pytest.raises(UserError, match="fused_attention: cuDNN is not detected"):
    fused_attention.cudnn(*operands, valid_BM, causal=causal)


@pytest.mark.parametrize("case", CASES)
def test_cudnn_refuses_no_shape(case, monkeypatch):
  """Traced for a GPU that is not here: only its version is not asked for."""
  pretend_cudnn(monkeypatch)
  (q, k, v, valid_BM), causal = make_case(case)
  operands = [x.astype(jnp.bfloat16) for x in (q, k, v)]
  kernel = functools.partial(fused_attention.cudnn, causal=causal)
  mixed, grads = jax.eval_shape(
    functools.partial(value_and_gradients, kernel), *operands, valid_BM
  )
  assert mixed.shape == q.shape
  assert [g.shape for g in grads] == [x.shape for x in operands]


FUSED = {"fused_attention": True, "compute_dtype": "bfloat16"}


@pytest.mark.parametrize(
  ("config", "make_batch"),
  [
    (random_pairs.config(depth=2, dropout=0.1, **FUSED), random_pairs.batch),
    (random_pairs.maskvlm(**FUSED), random_pairs.batch),
    (random_pairs.sycoca(**FUSED), random_pairs.batch),
    (random_regions.config(**FUSED), random_regions.batch),
  ],
  ids=["glscl", "maskvlm", "sycoca", "cmal"],
)
def test_every_system_can_be_traced_with_cudnn(config, make_batch, monkeypatch):
  pretend_cudnn(monkeypatch)
  monkeypatch.setattr(products, "platform", lambda: "gpu")
  asked = []
  cudnn = fused_attention.cudnn
  monkeypatch.setattr(
    fused_attention,
    "cudnn",
    lambda *a, **k: asked.append(a[0].shape) or cudnn(*a, **k),
  )
  system = registry.find(config)
  params = jax.eval_shape(
    functools.partial(system.init, config), jax.random.key(0)
  )
  with on_one_device():
    grads, _ = jax.eval_shape(
      random_pairs.gradient_function(config),
      params,
      make_batch(config),
      jax.random.key(0),
    )
  assert asked
  assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, params)


@pytest.mark.skipif(not shutil.which("nvidia-smi"), reason="needs a GPU")
def test_cudnn_is_the_plain_attention():
  environment = os.environ | {"JAX_PLATFORMS": "cuda", "XLA_FLAGS": ""}
  done = subprocess.run(
    [sys.executable, pathlib.Path(__file__).with_name("cudnn_check.py")],
    env=environment,
    cwd=pathlib.Path(__file__).resolve().parents[2],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stdout + done.stderr
