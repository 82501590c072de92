import functools

import jax
import jax.extend
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


def count_products(stack, params, inputs):
  """Products with parameters in the program of value and gradient."""

  def walk(jaxpr):
    for equation in jaxpr.eqns:
      if equation.primitive.name == "dot_general":
        (_, _), (batched, _) = equation.params["dimension_numbers"]
        yield not batched
      for inner in jax.extend.core.jaxprs_in_params(equation.params):
        yield from walk(inner)

  def run(params):
    return value_and_gradient(stack, params, inputs)

  return sum(walk(jax.make_jaxpr(run)(params).jaxpr))


@pytest.mark.parametrize("scan", [True, False])
def test_dots_recomputes_no_product_with_parameters(scan, params, inputs):
  none, dots, full = (
    count_products(make_stack(scan=scan, remat=remat), params, inputs)
    for remat in ("none", "dots", "full")
  )
  bodies = 1 if scan else DEPTH
  assert none == dots == 3 * 6 * bodies
  assert full - none == 6 * bodies


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


# --- blocks of CoCa and SyCoCa -----------------------------------------------


def coca_like(block, **options):
  """A block, random weights and its compiled call; 5 rows ask 4."""
  module = block(
    WIDTH,
    "float32",
    1e-5,
    **transformer.coca_initializers(WIDTH, 2),
    **options,
  )
  shapes = jax.eval_shape(module.init, jax.random.key(0), *module.example())
  rng = np.random.default_rng(2)
  params = jax.tree.map(
    lambda leaf: 0.2 * rng.standard_normal(leaf.shape).astype(np.float32),
    shapes,
  )
  run = jax.jit(module.apply)
  return lambda *arguments: np.asarray(run(params, *arguments)), params


@pytest.fixture(scope="module")
def captions():
  return coca_like(transformer.CocaBlock)


@pytest.fixture(scope="module")
def arguments():
  rng = np.random.default_rng(3)
  x_BLD, context_BMD = (
    rng.normal(size=(2, n, WIDTH)).astype(np.float32) for n in (5, 4)
  )
  return x_BLD, context_BMD


def norm(p, x):
  x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
  return x * p["scale"] + p["bias"]


def dense(p, x):
  return x @ p["kernel"] + p["bias"]


def attend(p, x, context, allowed):
  """One head."""
  q, k, v = (
    dense(p[name], a)
    for name, a in (("query", x), ("key", context), ("value", context))
  )
  logits = np.where(allowed, q @ k.T / 8, -np.inf)
  weights = np.exp(logits - logits.max(axis=1, keepdims=True))
  weights /= weights.sum(axis=1, keepdims=True)
  return dense(p["out"], weights @ v)


def feed(p, x):
  h = dense(p["fc1"], x)
  h = h * np.asarray(jax.scipy.stats.norm.cdf(h))
  return dense(p["fc2"], h)


def test_a_coca_block_is_two_attentions_and_two_mlps(captions, arguments):
  run, params = captions
  p = params["params"]
  x, context = (a[0] for a in arguments)
  valid, kept = np.arange(5) < 4, np.array([True, False, True, True])
  found = run(*arguments, np.stack([valid, valid]), np.stack([kept, kept]))[0]
  causal = np.tril(np.ones((5, 5), bool)) & valid[None]
  h = norm(p["self_norm"], x)
  x = x + attend(p["self_attention"], h, h, causal)
  x = x + feed(p["mlp"], norm(p["mlp_norm"], x))
  h, asked = norm(p["query_norm"], x), norm(p["context_norm"], context)
  x = x + attend(p["cross_attention"], h, asked, np.tile(kept, (5, 1)))
  x = x + feed(p["cross_mlp"], norm(p["cross_mlp_norm"], x))
  np.testing.assert_allclose(found, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cross", [True, False])
def test_a_pre_cross_block_is_two_attentions_and_an_mlp(cross, arguments):
  run, params = coca_like(transformer.PreCrossBlock, cross=cross)
  p = params["params"]
  x_BLD, context_BMD = arguments
  kept_BM = np.array([[True, False, True, True], [True, True, False, False]])
  context = (context_BMD, None, kept_BM) if cross else (None, None, None)
  found = run(x_BLD, *context)
  for b, x in enumerate(x_BLD):
    h = norm(p["self_norm"], x)
    x = x + attend(p["self_attention"], h, h, np.ones((5, 5), bool))
    if cross:
      h = norm(p["query_norm"], x)
      asked = norm(p["context_norm"], context_BMD[b])
      allowed = np.tile(kept_BM[b], (5, 1))
      x = x + attend(p["cross_attention"], h, asked, allowed)
    x = x + feed(p["mlp"], norm(p["mlp_norm"], x))
    np.testing.assert_allclose(found[b], x, rtol=1e-4, atol=1e-4)
  assert ("cross_attention" in p) == cross
  rows_BQ = np.array([[3, 0], [4, 1]], np.int32)
  some_BQD = run(x_BLD, *context, rows_BQ)
  np.testing.assert_allclose(
    some_BQD,
    np.take_along_axis(found, rows_BQ[:, :, None], axis=1),
    rtol=1e-5,
    atol=1e-5,
  )
