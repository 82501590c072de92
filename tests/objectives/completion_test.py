"""MGSC and MLTC: which tokens are contrasted, and where gradients stop."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glscl_jax.objectives import completion

global_completion = jax.jit(
  completion.global_completion,
  static_argnames=("temperature", "same_image", "group"),
)
local_completion = jax.jit(
  completion.local_completion,
  static_argnames=("temperature", "same_image", "group"),
)
TAU = 0.03
B, J, D = 4, 3, 8


def tokens(seed=0):
  rng = np.random.default_rng(seed)
  masked = rng.standard_normal((B, J, D)).astype(np.float32)
  noise = 1.5 * rng.standard_normal(masked.shape)
  return masked, (masked + noise).astype(np.float32)


def slow_nce(masked, complete, allowed):
  """Sum of both directions; `allowed[i, j]`: pair in the denominators."""
  a, b = (
    v / np.linalg.norm(v, axis=1, keepdims=True)
    for v in (np.asarray(masked, float), np.asarray(complete, float))
  )
  logits = a @ b.T / TAU
  weights = np.where(allowed, np.exp(logits), 0.0)
  own = np.exp(np.diag(logits))
  rows = -np.log(own / weights.sum(axis=1))
  columns = -np.log(own / weights.sum(axis=0))
  return rows.mean() + columns.mean()


def local(masked, complete, ok=None, **settings):
  settings = dict(temperature=TAU, group=B, same_image="none") | settings
  return local_completion(masked, complete, ok, **settings)


def test_global_completion_is_the_contrast_of_global_tokens():
  masked, complete = (v[:, 0] for v in tokens())
  found = global_completion(
    masked, complete, temperature=TAU, same_image="none"
  )
  wanted = slow_nce(masked, complete, np.ones((B, B), bool))
  np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_global_completion_ignores_other_captions_of_the_image():
  masked, complete = (v[:, 0] for v in tokens())
  ids = np.array([1, 1, 2, 3], np.int32)
  found = global_completion(
    masked, complete, temperature=TAU, identity_BM=ids[:, None]
  )
  allowed = (ids[:, None] != ids[None]) | np.eye(B, dtype=bool)
  wanted = slow_nce(masked, complete, allowed)
  np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_global_completion_averages_groups():
  masked, complete = (v[:, 0] for v in tokens())
  found = global_completion(masked, complete, temperature=TAU, group=2)
  parts = [
    global_completion(masked[rows], complete[rows], temperature=TAU)
    for rows in (slice(0, 2), slice(2, 4))
  ]
  np.testing.assert_allclose(found, np.mean(parts), rtol=1e-5)


def test_local_completion_contrasts_all_tokens_of_a_group():
  masked, complete = tokens()
  wanted = slow_nce(
    masked.reshape(-1, D), complete.reshape(-1, D), np.ones((B * J,) * 2)
  )
  np.testing.assert_allclose(
    local(masked, complete), wanted, rtol=1e-4, atol=1e-5
  )
  # A group larger than the batch is the batch.
  np.testing.assert_allclose(
    local(masked, complete, group=16), wanted, rtol=1e-4, atol=1e-5
  )


def test_local_completion_averages_groups():
  masked, complete = tokens()
  parts = [
    local(masked[rows], complete[rows]) for rows in (slice(0, 2), slice(2, 4))
  ]
  found = local(masked, complete, group=2)
  np.testing.assert_allclose(found, np.mean(parts), rtol=1e-5)


@pytest.mark.parametrize("same", ["ignore", "positive"])
def test_tokens_of_one_sample_stay_negatives_but_not_those_of_its_twin(same):
  masked, complete = tokens()
  ids = np.array([5, 5, 6, 7], np.int32)
  found = local(masked, complete, identity_BM=ids[:, None], same_image=same)
  image, sample = np.repeat(ids, J), np.repeat(np.arange(B), J)
  allowed = (image[:, None] != image[None]) | (sample[:, None] == sample[None])
  wanted = slow_nce(masked.reshape(-1, D), complete.reshape(-1, D), allowed)
  np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("same", ["none", "ignore", "positive"])
def test_empty_slots_are_as_if_they_were_not_there(same):
  masked, complete = tokens()
  ok = np.array([[1, 1, 0], [0, 0, 0], [1, 0, 0], [1, 1, 1]], bool)
  wild = np.where(ok[:, :, None], masked, 1e4).astype(np.float32)
  value, grad = jax.value_and_grad(local)(
    jnp.asarray(wild), complete, ok, same_image=same
  )
  wanted = slow_nce(masked[ok], complete[ok], np.ones((ok.sum(),) * 2))
  np.testing.assert_allclose(value, wanted, rtol=1e-4, atol=1e-5)
  assert np.all(np.asarray(grad)[~ok] == 0)


def test_nothing_masked_gives_zero_and_no_gradient():
  masked, complete = tokens()
  ok = np.zeros((B, J), bool)
  value, grad = jax.value_and_grad(local)(masked, complete, ok)
  assert value == 0
  assert np.all(np.asarray(grad) == 0)


def test_the_order_of_samples_does_not_matter():
  masked, complete = tokens()
  ok = np.array([[1, 1, 0], [1, 0, 0], [0, 0, 0], [1, 1, 1]], bool)
  order = np.array([2, 0, 3, 1])
  np.testing.assert_allclose(
    local(masked[order], complete[order], ok[order]),
    local(masked, complete, ok),
    rtol=1e-5,
  )


def test_complete_tokens_get_no_gradient_and_masked_ones_the_whole():
  masked, complete = tokens()
  losses = (
    lambda m, c: global_completion(m[:, 0], c[:, 0], temperature=TAU),
    local,
  )
  constant = jnp.array(complete)
  for loss in losses:
    by_masked, by_complete = jax.grad(loss, (0, 1))(masked, complete)
    assert np.all(np.asarray(by_complete) == 0)
    alone = jax.grad(lambda m, loss=loss: loss(m, constant))(masked)
    np.testing.assert_array_equal(by_masked, alone)
    assert np.any(np.asarray(by_masked) != 0)


def test_equal_tokens_cost_twice_the_logarithm_of_their_number():
  ones = np.ones((B, J, D), np.float32)
  np.testing.assert_allclose(local(ones, ones), 2 * np.log(B * J), rtol=1e-6)


def test_zero_tokens_have_a_finite_gradient():
  zeros = np.zeros((B, J, D), np.float32)
  value, grad = jax.value_and_grad(local)(zeros, zeros)
  assert np.isfinite(value)
  assert np.all(np.isfinite(grad))


def test_without_items_local_completion_is_zero():
  nothing = jnp.zeros((4, 0, 8))
  found = completion.local_completion(
    nothing, nothing, temperature=0.03, group=2
  )
  assert found == 0.0


def test_a_group_larger_than_the_batch_is_the_whole_batch():
  rng = np.random.default_rng(3)
  masked, complete = rng.standard_normal((2, 4, 8)).astype(np.float32)
  run = functools.partial(
    completion.global_completion, masked, complete, temperature=0.1
  )
  np.testing.assert_array_equal(run(group=16), run())
