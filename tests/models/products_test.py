"""Where products round, forward and backward."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from glscl_jax.models import products

ATTENTION = (
  ("BHLK,BHMK->BHLM", (2, 2, 3, 8), (2, 2, 5, 8)),
  ("BHLM,BHMK->BHLK", (2, 2, 3, 5), (2, 2, 5, 8)),
)


def draw(seed, *shape):
  values = np.random.default_rng(seed).standard_normal(shape)
  return jnp.asarray(values, jnp.float32)


def rounded(x):
  return x.astype(jnp.bfloat16).astype(jnp.float32)


@pytest.fixture
def travels_in_bfloat16(monkeypatch):
  """Activations as on an accelerator, where they are `dtype` itself."""
  monkeypatch.setattr(products, "activation_dtype", jnp.dtype)


def test_a_sum_is_rounded_only_where_no_other_type_is_asked_for(
  travels_in_bfloat16,
):
  x, kernel = draw(0, 3, 64), draw(1, 64, 5)
  short = products.dot(x, kernel, dtype="bfloat16")
  wide = products.dot(x, kernel, dtype="bfloat16", out_dtype="float32")
  assert (short.dtype, wide.dtype) == (jnp.bfloat16, jnp.float32)
  np.testing.assert_array_equal(wide.astype(jnp.bfloat16), short)
  np.testing.assert_allclose(wide, rounded(x) @ rounded(kernel), rtol=1e-5)
  assert not np.array_equal(wide, rounded(wide))


def gradients(product, dtype, x, y, weight):
  return jax.grad(
    lambda x, y: jnp.sum(product(x, y, dtype) * weight), argnums=(0, 1)
  )(x, y)


@pytest.mark.parametrize(("equation", "left", "right"), ATTENTION)
def test_float32_gradients_of_attention_products_are_those_of_einsum(
  equation, left, right
):
  x, y = draw(0, *left), draw(1, *right)
  weight = draw(2, *jnp.einsum(equation, x, y).shape)

  def own(x, y, dtype):
    return products.batched_dot(equation, x, y, dtype=dtype)

  found = gradients(own, "float32", x, y, weight)
  expected = gradients(
    lambda x, y, _: jnp.einsum(equation, x, y), "float32", x, y, weight
  )
  jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize(("equation", "left", "right"), ATTENTION)
def test_gradients_of_attention_products_multiply_rounded_operands(
  equation, left, right
):
  x, y = draw(0, *left), draw(1, *right)
  weight = draw(2, *jnp.einsum(equation, x, y).shape)

  def own(x, y, dtype):
    return products.batched_dot(equation, x, y, dtype=dtype)

  found = gradients(own, "bfloat16", x, y, weight)
  expected = gradients(
    lambda x, y, _: jnp.einsum(equation, x, y),
    "float32",
    rounded(x),
    rounded(y),
    rounded(weight),
  )
  for a, b in zip(found, expected, strict=True):
    assert a.dtype == jnp.float32
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def plain_convolution(x_BYXD, kernel_ZWDF):
  return jax.lax.conv_general_dilated(
    x_BYXD,
    kernel_ZWDF,
    window_strides=(1, 1),
    padding="SAME",
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )


def convolve(x, y, dtype):
  return products.convolve(x, y, dtype=dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sides", [(3, 3), (5, 1)], ids=str)
def test_convolutions_on_cpu_are_the_plain_float32_ones(dtype, sides):
  x, kernel = draw(0, 4, 6, 5, 8), draw(1, *sides, 8, 3)
  weight = draw(2, 4, 6, 5, 3)
  found = convolve(x, kernel, dtype)
  np.testing.assert_array_equal(found, plain_convolution(x, kernel))
  jax.tree.map(
    np.testing.assert_array_equal,
    gradients(convolve, dtype, x, kernel, weight),
    gradients(
      lambda x, y, _: plain_convolution(x, y), dtype, x, kernel, weight
    ),
  )


def test_a_convolution_multiplies_rounded_operands_and_sums_in_float32(
  travels_in_bfloat16,
):
  x, kernel = draw(0, 2, 4, 5, 32), draw(1, 3, 3, 32, 6)
  weight = draw(2, 2, 4, 5, 6)
  short = convolve(x, kernel, "bfloat16")
  wide = plain_convolution(rounded(x), rounded(kernel))
  assert short.dtype == jnp.bfloat16
  # One rounding, at the end.
  np.testing.assert_allclose(short.astype(jnp.float32), wide, rtol=2**-8)
  found = gradients(convolve, "bfloat16", x, kernel, rounded(weight))
  expected = gradients(
    lambda x, y, _: plain_convolution(x, y),
    "float32",
    rounded(x),
    rounded(kernel),
    rounded(weight),
  )
  for a, b in zip(found, expected, strict=True):
    assert a.dtype == jnp.float32
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


ONE_DEVICE = """
import jax, jax.numpy as jnp
from glscl_jax.models import products

def loss(x_AD, table_VD):
  kernel_DV = products.transpose(table_VD)
  return products.dot(x_AD, kernel_DV, dtype="bfloat16").sum()

shapes = (24, 128), (1518, 128)
x_AD, table_VD = (jnp.ones(shape) for shape in shapes)
grads = jax.jit(jax.grad(loss, (0, 1)))(x_AD, table_VD)
print([float(g[0, 0]) for g in grads])
"""


def test_a_tied_table_is_multiplied_in_bfloat16_on_one_cpu_device():
  """XLA folds a plain transpose into a product that it cannot run there."""
  root = pathlib.Path(__file__).resolve().parents[2]
  done = subprocess.run(
    [sys.executable, "-c", ONE_DEVICE],
    capture_output=True,
    text=True,
    cwd=root,
    env={**os.environ, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"},
    check=False,
  )
  assert done.returncode == 0, done.stderr
  assert json.loads(done.stdout) == [1518.0, 24.0]


def adam():
  """A compiled update of a million numbers, if they are finite."""
  transform = optax.adam(1e-3)

  def update(params, state, gradient):
    norm = optax.tree.norm(gradient)
    step, state = products.choose(
      jnp.isfinite(norm),
      lambda old: transform.update(gradient, old, params),
      lambda old: (jnp.zeros_like(gradient), old),
      state,
    )
    return params + step, state, norm, optax.tree.norm(step)

  params = jnp.ones((1000, 1000))
  operands = params, transform.init(params), draw(0, *params.shape)
  lowered = jax.jit(update, donate_argnums=(0, 1)).lower(*operands)
  return lowered.compile(), operands


def test_a_chosen_update_is_made_in_place_on_cpu(monkeypatch):
  found, _ = adam()
  monkeypatch.setattr(products, "platform", lambda: "gpu")
  plain, _ = adam()
  held = found.memory_analysis().temp_size_in_bytes
  # The step, whose norm is taken, and next to nothing else.
  assert held < 1.1 * 4e6
  assert plain.memory_analysis().temp_size_in_bytes > 1.5 * held


@pytest.mark.parametrize("value", [1.0, np.nan])
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_either_result_is_chosen_on_every_platform(
  value, platform, monkeypatch
):
  monkeypatch.setattr(products, "platform", lambda: platform)
  compiled, (params, state, gradient) = adam()
  before = np.array(params), np.array(state[0].mu)
  after, state, *_ = compiled(params, state, gradient * value)
  moved = not np.isnan(value)
  assert np.array_equal(after, before[0]) == (not moved)
  assert np.array_equal(state[0].mu, before[1]) == (not moved)
  assert int(state[0].count) == int(moved)
