"""Vectors moved towards what they match among known pairs."""

import numpy as np
import pytest

from glscl_jax.tasks import conse


def unit(rng, *shape):
  x = rng.normal(size=shape)
  return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


@pytest.mark.parametrize("num_vectors", [1, 5000])
def test_vectors_are_those_of_the_formula(num_vectors):
  rng = np.random.default_rng(num_vectors)
  vector_QE, bank_BE = unit(rng, num_vectors, 8), unit(rng, 20, 8)
  found = conse.expand(vector_QE, bank_BE, temperature=0.2)
  for q in (0, num_vectors - 1):
    v = vector_QE[q].astype(np.float64)
    p = np.exp(bank_BE @ v / 0.2)
    mean = (p / p.sum()) @ bank_BE
    expected = v + mean / np.linalg.norm(mean)
    np.testing.assert_allclose(
      found[q], expected / np.linalg.norm(expected), atol=1e-5
    )
  assert found.dtype == np.float32


def test_a_low_temperature_leaves_the_nearest_alone():
  """And nothing overflows on the way."""
  bank_BE = np.eye(3, dtype=np.float32)
  vector_QE = np.array([[0.8, 0.6, 0.0]], np.float32)
  found = conse.expand(vector_QE, bank_BE, temperature=1e-4)
  np.testing.assert_allclose(
    found, [[1.8, 0.6, 0.0] / np.sqrt(np.float32(3.6))], atol=1e-6
  )


def test_what_matches_the_same_known_pairs_comes_nearer():
  # The image and the caption of one concept have nothing in common, but both
  # match the known pair 0; the other caption matches pair 1.
  known_BE = np.array([[1, 0, 0, 0], [0, 1, 0, 0]], np.float32)
  image_QE = np.array([[0.6, 0.0, 0.8, 0.0]], np.float32)
  text_QE = np.array([[0.6, 0, 0, 0.8], [0.0, 0.6, 0.4, 0.69]], np.float32)
  before_QA = image_QE @ text_QE.T
  image_QE = conse.expand(image_QE, known_BE, temperature=0.1)
  text_QE = conse.expand(text_QE, known_BE, temperature=0.1)
  after_QA = image_QE @ text_QE.T
  assert after_QA[0, 0] - after_QA[0, 1] > before_QA[0, 0] - before_QA[0, 1]
