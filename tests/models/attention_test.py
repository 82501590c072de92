import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glscl_jax.models import attention

WIDTH, HEADS = 128, 2


@pytest.fixture(scope="module")
def layer():
  module = attention.Attention("float32")
  rng = np.random.default_rng(0)
  params = jax.eval_shape(
    lambda: module.init(
      jax.random.key(0), jnp.zeros((1, 2, WIDTH)), jnp.zeros((1, 3, WIDTH))
    )
  )
  params = jax.tree.map(
    lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32), params
  )
  return module, params


@pytest.fixture(scope="module")
def inputs():
  rng = np.random.default_rng(1)
  x_BLD = rng.normal(size=(3, 4, WIDTH)).astype(np.float32)
  context_BMD = rng.normal(size=(3, 5, WIDTH)).astype(np.float32)
  valid_BM = np.arange(5)[None] < np.array([5, 3, 1])[:, None]
  return x_BLD, context_BMD, valid_BM


def by_hand(params, x_BLD, context_BMD, valid_BM):
  """One sample and one head after the other; padded keys are cut away."""
  p = params["params"]
  result = np.zeros_like(x_BLD)
  for b in range(len(x_BLD)):
    context = context_BMD[b][valid_BM[b]]
    q = x_BLD[b] @ p["query"]["kernel"] + p["query"]["bias"]
    k = context @ p["key"]["kernel"] + p["key"]["bias"]
    v = context @ p["value"]["kernel"] + p["value"]["bias"]
    mixed = []
    for h in range(HEADS):
      part = slice(64 * h, 64 * (h + 1))
      logits = q[:, part] @ k[:, part].T / 8.0
      weights = np.exp(logits - logits.max(axis=1, keepdims=True))
      mixed.append(weights / weights.sum(axis=1, keepdims=True) @ v[:, part])
    joined = np.concatenate(mixed, axis=1)
    result[b] = joined @ p["out"]["kernel"] + p["out"]["bias"]
  return result


def test_attention_equals_a_plain_numpy_version(layer, inputs):
  module, params = layer
  np.testing.assert_allclose(
    module.apply(params, *inputs), by_hand(params, *inputs), atol=2e-5
  )


def test_padded_keys_get_exactly_no_probability(layer, inputs):
  module, params = layer
  p_BHLM = module.apply(params, *inputs, return_probabilities=True)
  assert p_BHLM.shape == (3, HEADS, 4, 5)
  np.testing.assert_allclose(p_BHLM.sum(axis=-1), 1.0, rtol=1e-6)
  hidden = ~inputs[2][:, None, None, :]
  assert np.all(np.asarray(p_BHLM)[np.broadcast_to(hidden, p_BHLM.shape)] == 0)


def test_padded_keys_get_exactly_no_gradient(layer, inputs):
  module, params = layer
  x_BLD, context_BMD, valid_BM = inputs

  def value(context_BMD):
    return jnp.sum(module.apply(params, x_BLD, context_BMD, valid_BM) ** 2)

  gradient_BMD = jax.jit(jax.grad(value))(context_BMD)
  assert np.all(np.asarray(gradient_BMD)[~valid_BM] == 0)
  assert np.all(np.any(np.asarray(gradient_BMD)[valid_BM] != 0, axis=-1))


def test_bfloat16_keeps_probabilities_in_float32(layer, inputs):
  _, params = layer
  module = attention.Attention("bfloat16")
  p_BHLM = module.apply(params, *inputs, return_probabilities=True)
  assert p_BHLM.dtype == jnp.float32
  np.testing.assert_allclose(p_BHLM.sum(axis=-1), 1.0, rtol=1e-6)


def test_causal_attention_gives_nothing_to_later_keys(layer, inputs):
  _, params = layer
  x_BLD, _, valid_BM = inputs
  module = attention.Attention("float32", causal=True)
  valid_BL = valid_BM[:, :4]
  p_BHLM = np.asarray(
    module.apply(params, x_BLD, x_BLD, valid_BL, return_probabilities=True)
  )
  np.testing.assert_allclose(p_BHLM.sum(axis=-1), 1.0, rtol=1e-6)
  later = np.triu(np.ones((4, 4), bool), k=1)
  hidden = later[None, None] | ~valid_BL[:, None, None, :]
  assert np.all(p_BHLM[np.broadcast_to(hidden, p_BHLM.shape)] == 0)
  assert np.all(p_BHLM[np.broadcast_to(~hidden, p_BHLM.shape)] > 0)
