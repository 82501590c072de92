import jax.numpy as jnp
import numpy as np

from glscl_jax.models import layers


def draw(*shape):
  return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def test_the_mean_of_the_other_valid_rows_takes_the_first_place():
  x_BLD = draw(2, 5, 3)
  valid_BL = np.arange(5)[None] < np.array([5, 3])[:, None]
  found_BLD = layers.put_mean_first(x_BLD, valid_BL)
  np.testing.assert_allclose(found_BLD[0, 0], x_BLD[0, 1:].mean(0), rtol=1e-5)
  np.testing.assert_allclose(found_BLD[1, 0], x_BLD[1, 1:3].mean(0), rtol=1e-5)
  np.testing.assert_array_equal(found_BLD[:, 1:], x_BLD[:, 1:])
  whole_BLD = layers.put_mean_first(x_BLD)
  np.testing.assert_allclose(whole_BLD[:, 0], x_BLD[:, 1:].mean(1), rtol=1e-5)


def test_the_mean_of_short_rows_is_rounded_only_once():
  x_BLD = jnp.asarray(1 + draw(1, 300, 8), jnp.bfloat16)
  found_BLD = layers.put_mean_first(x_BLD)
  assert found_BLD.dtype == jnp.bfloat16
  expected_D = np.asarray(x_BLD[0, 1:], np.float32).mean(0)
  np.testing.assert_array_equal(
    found_BLD[0, 0], jnp.asarray(expected_D, jnp.bfloat16)
  )
