import numpy as np
import pytest

from glscl_jax.tasks import querybank


def unit(rng, *shape):
  x = rng.normal(size=shape)
  return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("num_bank", [1, 7, 9000])
def test_scores_are_those_of_the_formula(num_bank):
  rng = np.random.default_rng(num_bank)
  query_QE, candidate_AE = unit(rng, 5, 16), unit(rng, 6, 16)
  bank_BE = unit(rng, num_bank, 16)
  found = querybank.normalize(
    query_QE @ candidate_AE.T, bank_BE, candidate_AE, temperature=0.05
  )
  exponents = np.exp(bank_BE.astype(np.float64) @ candidate_AE.T / 0.05)
  expected = query_QE @ candidate_AE.T - 0.05 * np.log(exponents.mean(0))[None]
  np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_hub_no_longer_hides_the_right_candidate():
  # Candidate 0 is near to everything, 1 and 2 to their own query alone.
  score_QA = np.array([[0.9, 0.8, 0.0], [0.9, 0.0, 0.8]], np.float32)
  candidate_AE = np.eye(3, dtype=np.float32)
  bank_BE = np.array([[0.9, 0.3, 0.3]] * 4, np.float32)
  found = querybank.normalize(score_QA, bank_BE, candidate_AE, temperature=0.1)
  np.testing.assert_array_equal(score_QA.argmax(1), [0, 0])
  np.testing.assert_array_equal(found.argmax(1), [1, 2])


@pytest.mark.parametrize("temperature", [1e-3, 1e3])
def test_extreme_temperatures_stay_finite(temperature):
  """From the largest to the mean similarity of the bank."""
  rng = np.random.default_rng(0)
  candidate_AE, bank_BE = unit(rng, 6, 16), unit(rng, 50, 16)
  found = querybank.normalize(
    np.zeros((1, 6)), bank_BE, candidate_AE, temperature=temperature
  )
  similarity_BA = bank_BE @ candidate_AE.T
  limit = similarity_BA.max if temperature < 1 else similarity_BA.mean
  np.testing.assert_allclose(-found[0], limit(axis=0), atol=5e-3)
