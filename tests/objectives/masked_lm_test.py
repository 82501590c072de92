"""Masked language modelling: a mean over masked tokens of the whole batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glscl_jax.objectives import masked_lm

B, J, V = 3, 4, 11


def example(seed=0):
  rng = np.random.default_rng(seed)
  logits = 3 * rng.standard_normal((B, J, V)).astype(np.float32)
  labels = rng.integers(0, V, (B, J)).astype(np.int32)
  return logits, labels


def slow(logits, labels, ok):
  losses = [
    np.log(np.sum(np.exp(np.asarray(logits[i, j], float))))
    - logits[i, j, labels[i, j]]
    for i in range(B)
    for j in range(J)
    if ok[i, j]
  ]
  return np.mean(losses) if losses else 0.0


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_loss_is_the_mean_over_masked_tokens_of_the_batch(share):
  logits, labels = example()
  ok = np.random.default_rng(1).random((B, J)) < share
  found = masked_lm.masked_cross_entropy(logits, labels, ok)
  np.testing.assert_allclose(found, slow(logits, labels, ok), rtol=1e-5)


def test_samples_with_more_masked_tokens_weigh_more():
  logits, labels = example()
  ok = np.array([[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]], bool)
  each = [
    masked_lm.masked_cross_entropy(logits[[i]], labels[[i]], ok[[i]])
    for i in range(2)
  ]
  found = masked_lm.masked_cross_entropy(logits, labels, ok)
  np.testing.assert_allclose(found, (4 * each[0] + each[1]) / 5, rtol=1e-5)
  assert abs(found - np.mean(each)) > 1e-2


def test_nothing_masked_gives_zero_and_no_gradient():
  logits, labels = example()
  value, grad = jax.value_and_grad(masked_lm.masked_cross_entropy)(
    logits, labels, np.zeros((B, J), bool)
  )
  assert value == 0
  assert np.all(np.asarray(grad) == 0)


def test_empty_slots_reach_neither_value_nor_gradient():
  logits, labels = example()
  ok = np.array([[1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0]], bool)
  wild = np.where(ok[:, :, None], logits, np.inf).astype(np.float32)
  value, grad = jax.value_and_grad(masked_lm.masked_cross_entropy)(
    jnp.where(ok[:, :, None], wild, 1e30), np.where(ok, labels, 0), ok
  )
  np.testing.assert_allclose(value, slow(logits, labels, ok), rtol=1e-5)
  assert np.all(np.asarray(grad)[~ok] == 0)
  assert np.all(np.asarray(grad)[ok] != 0)


def test_equal_logits_cost_the_logarithm_of_the_vocabulary():
  logits, labels = np.zeros((B, J, V), np.float32), example()[1]
  found = masked_lm.masked_cross_entropy(logits, labels, np.ones((B, J), bool))
  np.testing.assert_allclose(found, np.log(V), rtol=1e-6)


def test_bfloat16_logits_are_summed_in_float32():
  logits = jnp.zeros((1, 1, 50_000), jnp.bfloat16)
  one = np.ones((1, 1), np.int32)
  found = masked_lm.masked_cross_entropy(logits, one, one.astype(bool))
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, np.log(50_000), rtol=1e-5)


def test_the_order_of_samples_does_not_matter():
  logits, labels = example()
  ok = np.array([[1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0]], bool)
  order = np.array([2, 0, 1])
  np.testing.assert_allclose(
    masked_lm.masked_cross_entropy(logits[order], labels[order], ok[order]),
    masked_lm.masked_cross_entropy(logits, labels, ok),
    rtol=1e-6,
  )


def test_accuracy_counts_masked_tokens_only():
  logits, labels = example()
  best = logits.argmax(axis=-1).astype(np.int32)
  ok = np.array([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0]], bool)
  half = np.where(np.arange(J)[None] == 0, best, (best + 1) % V)
  assert masked_lm.accuracy(logits, half, ok) == 0.5
  assert masked_lm.accuracy(logits, labels, np.zeros((B, J), bool)) == 0
