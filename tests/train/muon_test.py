import dataclasses

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from glscl_jax.config import OptimizerConfig
from glscl_jax.train import optimizer

RATE, RMS = 0.01, 0.4
CONFIG = OptimizerConfig(
  variant="muon",
  muon_rms=RMS,
  learning_rate=RATE,
  warmup_fraction=0.0,
  weight_decay=0.1,
)


def first_update(params, grads):
  transform = optimizer.make_optimizer(CONFIG, 1000)
  updates, _ = transform.update(grads, transform.init(params), params)
  return updates


@pytest.fixture
def rng():
  return np.random.default_rng(0)


def tree(rng):
  kernel = rng.standard_normal((2, 24, 16)).astype(np.float32)
  table = rng.standard_normal((10, 8)).astype(np.float32)
  return {
    "text": {
      "blocks": {"layers": {"mlp": {"fc1": {"kernel": jnp.array(kernel)}}}},
      "word_embedding": jnp.array(table),
    }
  }


def kernel_of(params):
  return params["text"]["blocks"]["layers"]["mlp"]["fc1"]["kernel"]


def test_each_layer_of_a_stack_moves_along_its_own_orthogonal_factor(rng):
  params, grads = tree(rng), tree(rng)
  move = -np.asarray(kernel_of(first_update(params, grads))) / RATE
  move -= 0.1 * np.asarray(kernel_of(params))  # decay
  for layer, grad in zip(move, np.asarray(kernel_of(grads)), strict=True):
    u, _, vt = np.linalg.svd(grad, full_matrices=False)
    polar = u @ vt
    # Five Newton-Schulz steps bring singular values near 1, not to it.
    values = np.linalg.svd(layer, compute_uv=False) / (RMS * 24**0.5)
    assert 0.6 < values.min() and values.max() < 1.3
    cosine = np.sum(layer * polar) / np.linalg.norm(layer)
    assert cosine / np.linalg.norm(polar) > 0.97
    assert np.sqrt(np.mean(layer**2)) == pytest.approx(RMS, rel=0.15)


def test_tables_move_as_with_adamw(rng):
  params, grads = tree(rng), tree(rng)
  ours = first_update(params, grads)["text"]["word_embedding"]
  adamw = optax.adamw(RATE, 0.9, 0.98, 1e-8, weight_decay=0.1)
  table = {"w": params["text"]["word_embedding"]}
  grad = {"w": grads["text"]["word_embedding"]}
  theirs, _ = adamw.update(grad, adamw.init(table), table)
  np.testing.assert_allclose(ours, theirs["w"], rtol=1e-5)


def test_the_vocabulary_matrix_counts_as_a_table(rng):
  kernel = jnp.array(rng.standard_normal((8, 12)).astype(np.float32))
  params = {"mlm_head": {"fc2": {"kernel": kernel}}}
  update = first_update(params, params)["mlm_head"]["fc2"]["kernel"]
  # Adam's first step is the sign of the gradient; heads learn 5 times faster.
  expected = -5 * RATE * (np.sign(kernel) + 0.1 * np.asarray(kernel))
  np.testing.assert_allclose(update, expected, rtol=1e-4)


@pytest.mark.parametrize("beta", [0.0, 0.95])
def test_momentum_forgets_earlier_gradients_at_its_own_rate(rng, beta):
  params, first, second = tree(rng), tree(rng), tree(rng)
  config = dataclasses.replace(CONFIG, muon_beta=beta)
  transform = optimizer.make_optimizer(config, 1000)
  _, state = transform.update(first, transform.init(params), params)
  found, _ = transform.update(second, state, params)
  fresh, _ = transform.update(second, transform.init(params), params)
  same = np.allclose(kernel_of(found), kernel_of(fresh), atol=1e-4)
  assert same == (beta == 0.0)
