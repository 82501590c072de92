import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glscl_jax.models import transformer

WIDTH, DEPTH = 64, 3


def make_stack(*, scan=True, remat="none", dropout=0.0):
  return transformer.Stack(
    functools.partial(
      transformer.PostBlock,
      width=WIDTH,
      dtype="float32",
      eps=1e-5,
      dropout=dropout,
      init_std=0.2,
      parent=None,
    ),
    DEPTH,
    scan,
    remat,
  )


@pytest.fixture(scope="module")
def inputs():
  rng = np.random.default_rng(0)
  x_BLD = rng.normal(size=(2, 5, WIDTH)).astype(np.float32)
  return x_BLD, np.arange(5)[None] < np.array([5, 3])[:, None]


@pytest.fixture(scope="module")
def params(inputs):
  return jax.jit(make_stack().init)(jax.random.key(0), *inputs)


def value_and_gradient(stack, params, inputs, dropout_key=None):
  rngs = {} if dropout_key is None else {"dropout": dropout_key}

  def value(params):
    y_BLD = stack.apply(params, *inputs, rngs=rngs)
    return jnp.sum(jnp.sin(y_BLD)), y_BLD

  return jax.jit(jax.grad(value, has_aux=True))(params)


def assert_same(expected, found):
  # Layers amplify rounding: relative to the largest number of each array.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      b, a, rtol=0, atol=2e-5 * max(1.0, np.abs(a).max())
    ),
    expected,
    found,
  )


@pytest.mark.parametrize(
  "options",
  [
    {"scan": False},
    {"remat": "dots"},
  ],
  ids=str,
)
def test_scan_and_recomputation_change_no_number(options, params, inputs):
  expected = value_and_gradient(make_stack(), params, inputs)
  found = value_and_gradient(make_stack(**options), params, inputs)
  assert_same(expected, found)


@pytest.mark.parametrize("scan", [True, False])
def test_recomputation_draws_the_same_dropout(scan, params, inputs):
  key = jax.random.key(3)
  expected = value_and_gradient(
    make_stack(dropout=0.5), params, inputs, dropout_key=key
  )
  found = value_and_gradient(
    make_stack(dropout=0.5, scan=scan, remat="full"),
    params,
    inputs,
    dropout_key=key,
  )
  assert_same(expected, found)


def test_layers_start_different(params):
  kernel_NDF = params["params"]["layers"]["mlp"]["fc1"]["kernel"]
  assert kernel_NDF.shape == (DEPTH, WIDTH, 4 * WIDTH)
  assert not np.array_equal(kernel_NDF[0], kernel_NDF[1])


def test_dropout_needs_a_key_and_repeats_with_it(params, inputs):
  stack = make_stack(dropout=0.5)
  run = jax.jit(lambda k: stack.apply(params, *inputs, rngs={"dropout": k}))
  first = run(jax.random.key(0))
  assert np.array_equal(first, run(jax.random.key(0)))
  assert not np.array_equal(first, run(jax.random.key(1)))
  without = jax.jit(stack.apply)(params, *inputs)
  assert not np.array_equal(first, without)
  plain = jax.jit(make_stack().apply)(params, *inputs)
  np.testing.assert_array_equal(without, plain)


def test_padding_does_not_reach_real_rows(params, inputs):
  x_BLD, valid_BL = inputs
  other_BLD = np.where(valid_BL[:, :, None], x_BLD, x_BLD + 9.0)
  run = jax.jit(make_stack().apply)
  rows = [np.asarray(run(params, x, valid_BL)) for x in (x_BLD, other_BLD)]
  np.testing.assert_array_equal(rows[0][valid_BL], rows[1][valid_BL])
  assert not np.array_equal(rows[0], rows[1])


@pytest.mark.parametrize(
  ("block", "options"),
  [
    (transformer.PreBlock, {"activation": "gelu"}),
    (transformer.PostBlock, {"dropout": 0.0, "init_std": 0.2}),
  ],
  ids=["pre", "post"],
)
@pytest.mark.parametrize("zero", [True, False])
def test_only_the_last_matrices_of_residual_branches_may_start_at_zero(
  block, options, zero, key
):
  module = block(
    width=WIDTH, dtype="float32", eps=1e-5, zero_residual=zero, **options
  )
  params = jax.jit(module.init)(key, *module.example())["params"]
  zeros = {
    f"{branch}/{name}"
    for branch in ("attention", "mlp")
    for name, dense in params[branch].items()
    if not np.any(np.asarray(dense["kernel"]))
  }
  assert zeros == ({"attention/out", "mlp/fc2"} if zero else set())


@pytest.fixture(scope="module")
def cross_block():
  block = transformer.PostCrossBlock(WIDTH, "float32", 1e-12, 0.0, 0.2)
  rng = np.random.default_rng(1)
  x_BLD, context_BMD = (
    rng.normal(size=(2, n, WIDTH)).astype(np.float32) for n in (5, 4)
  )
  valid_BL = np.arange(5)[None] < np.array([5, 3])[:, None]
  arguments = x_BLD, context_BMD, valid_BL, None
  init = jax.jit(block.init)
  return block, init(jax.random.key(0), *arguments), arguments


def test_asking_for_some_rows_gives_the_same_rows(cross_block):
  block, params, arguments = cross_block
  rows_BQ = np.array([[0, 3], [2, 0]], np.int32)
  run = jax.jit(block.apply)
  whole_BLD = np.asarray(run(params, *arguments))
  some_BQD = run(params, *arguments, rows_BQ)
  np.testing.assert_allclose(
    some_BQD,
    np.take_along_axis(whole_BLD, rows_BQ[:, :, None], axis=1),
    atol=1e-5,
  )


def test_cross_attention_maps_are_those_of_the_context(cross_block):
  block, params, arguments = cross_block
  run = jax.jit(
    functools.partial(block.apply, method=block.cross_probabilities)
  )
  p_BHLM = run(params, *arguments)
  assert p_BHLM.shape == (2, 1, 5, 4)
  np.testing.assert_allclose(p_BHLM.sum(axis=-1), 1.0, rtol=1e-6)
  x_BLD, context_BMD, *rest = arguments
  same_BMD = np.repeat(context_BMD[:, :1], 4, axis=1)
  flat = run(params, x_BLD, same_BMD, *rest)
  np.testing.assert_allclose(flat, 0.25, atol=1e-6)
