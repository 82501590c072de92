"""Masked image modelling: a mean over hidden patches of the whole batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glscl_jax.objectives import masked_regression

B, N, J, P = 3, 9, 4, 12


def example(seed=0):
  rng = np.random.default_rng(seed)
  prediction = rng.standard_normal((B, J, P)).astype(np.float32)
  target = rng.standard_normal((B, N, P)).astype(np.float32)
  index = np.stack([rng.permutation(N)[:J] for _ in range(B)])
  return prediction, target, index.astype(np.int32)


def run(*arrays, loss="l1", patch_norm=False):
  return masked_regression.masked_regression(
    *map(jnp.asarray, arrays), loss=loss, patch_norm=patch_norm
  )


def slow(prediction, target, index, ok, *, loss, patch_norm):
  errors = []
  for b, j in zip(*np.nonzero(ok), strict=True):
    wanted = target[b, index[b, j]].astype(float)
    if patch_norm:
      wanted = (wanted - wanted.mean()) / np.sqrt(wanted.var(ddof=1) + 1e-6)
    error = np.abs(prediction[b, j] - wanted)
    errors.append(np.mean(error if loss == "l1" else error**2))
  return np.mean(errors) if errors else 0.0


@pytest.mark.parametrize("loss", ["l1", "l2"])
@pytest.mark.parametrize("patch_norm", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_loss_is_the_mean_over_hidden_patches_of_the_batch(
  loss, patch_norm, share
):
  arrays = example()
  ok = np.random.default_rng(1).random((B, J)) < share
  found = run(*arrays, ok, loss=loss, patch_norm=patch_norm)
  expected = slow(*arrays, ok, loss=loss, patch_norm=patch_norm)
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_without_a_mask_of_slots_all_count():
  arrays = example()
  ok = np.ones((B, J), bool)
  assert run(*arrays) == run(*arrays, ok)
  assert run(*example(1)) != run(*arrays)


@pytest.mark.parametrize("loss", ["l1", "l2"])
def test_nothing_hidden_gives_zero_and_no_gradient(loss):
  prediction, target, index = example()

  def value(prediction):
    ok = jnp.zeros((B, J), bool)
    return run(prediction, target, index, ok, loss=loss)

  found, grad = jax.value_and_grad(value)(jnp.asarray(prediction))
  assert found == 0 and not np.any(np.asarray(grad))
  empty = run(prediction[:, :0], target, index[:, :0], loss=loss)
  assert empty == 0


@pytest.mark.parametrize("loss", ["l1", "l2"])
def test_a_perfect_prediction_costs_nothing_and_has_a_finite_gradient(loss):
  _, target, index = example()
  perfect = np.take_along_axis(target, index[:, :, None], axis=1)
  found, grad = jax.value_and_grad(
    lambda prediction: run(prediction, target, index, loss=loss)
  )(jnp.asarray(perfect))
  assert found == 0 and np.all(np.isfinite(grad))


def test_flat_patches_have_a_finite_normalised_target():
  prediction, target, index = example()
  flat = np.ones_like(target)
  found = run(np.zeros_like(prediction), flat, index, patch_norm=True)
  assert found == 0


def test_zero_output_scores_what_the_unbiased_variance_leaves():
  # Patches of 16 x 16 pixels in three colours.
  rng = np.random.default_rng(0)
  target = rng.normal(3.0, 2.0, (4, 6, 768)).astype(np.float32)
  index = np.tile(np.arange(6, dtype=np.int32), (4, 1))
  found = run(
    np.zeros((4, 6, 768), np.float32),
    target,
    index,
    loss="l2",
    patch_norm=True,
  )
  assert float(found) == pytest.approx(767 / 768, abs=1e-4)


def test_zero_output_scores_the_mean_of_a_normal_variable():
  rng = np.random.default_rng(0)
  target = rng.normal(size=(4, 9, 768)).astype(np.float32)
  index = np.tile(np.arange(9, dtype=np.int32), (4, 1))
  found = run(np.zeros((4, 9, 768), np.float32), target, index)
  assert float(found) == pytest.approx(np.sqrt(2 / np.pi), abs=0.01)


def test_targets_carry_no_gradient_and_visible_patches_do_not_matter():
  prediction, target, index = example()
  grad = jax.grad(lambda t: run(prediction, t, index))(jnp.asarray(target))
  assert not np.any(np.asarray(grad))
  other = target.copy()
  for b in range(B):
    other[b, np.setdiff1d(np.arange(N), index[b])] = 99.0
  assert run(prediction, other, index) == run(prediction, target, index)


def test_bfloat16_predictions_are_summed_in_float32():
  prediction, target, index = example()
  found = run(jnp.asarray(prediction, jnp.bfloat16), target, index)
  assert found.dtype == jnp.float32


def test_the_mean_over_patches_is_the_loss():
  arrays = example()
  errors = masked_regression.patch_errors(*arrays, loss="l1", patch_norm=True)
  assert errors.shape == (B, J)
  np.testing.assert_allclose(
    errors.mean(), run(*arrays, patch_norm=True), rtol=1e-6
  )


def test_normalised_patches_are_restored_by_the_original_statistics():
  _, target, index = example()
  rows = np.take_along_axis(target, index[:, :, None], axis=1)
  found = masked_regression.restore_patches(
    masked_regression.normalize_patches(jnp.asarray(rows)), target, index
  )
  np.testing.assert_allclose(found, rows, atol=1e-5)
