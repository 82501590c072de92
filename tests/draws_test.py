import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glscl_jax import draws

KEY = jax.random.key(3)


def test_numbers_are_spread_evenly():
  u = np.asarray(draws.uniform(KEY, (400, 25, 10)), np.float64)
  assert 0 < u.min() < 1e-4 and 1 - 1e-4 < u.max() < 1
  assert u.mean() == pytest.approx(1 / 2, abs=0.004)
  assert u.var() == pytest.approx(1 / 12, abs=0.001)
  counts, _ = np.histogram(u, bins=16, range=(0, 1))
  # 16 cells of 6,250: chi-square with 15 degrees of freedom.
  assert np.sum(np.square(counts - 6250) / 6250) < 40
  # Neither neighbours in a row nor rows go together.
  pairs = u.reshape(400, -1)
  for a, b in ((pairs[:, :-1], pairs[:, 1:]), (pairs[:-1], pairs[1:])):
    assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.015


def test_no_word_is_used_twice():
  words_AJ2 = np.asarray(draws.bits(KEY, (64, 32, 2))).astype(np.uint32)
  words_AJ = words_AJ2[:, :, 0] * 2**16 + words_AJ2[:, :, 1]
  assert len(np.unique(words_AJ)) == words_AJ.size


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_a_share_of_one_minus_rate_is_kept(rate):
  kept = draws.keep(KEY, rate, (500, 400))
  # Four standard errors.
  error = np.sqrt(rate * (1 - rate) / kept.size)
  assert float(jnp.mean(kept)) == pytest.approx(1 - rate, abs=4 * error)


def test_gumbel_noise_draws_by_softmax():
  logits_V = jnp.array([0.0, 1.0, 2.0])
  noise_AV = draws.gumbel(KEY, (20_000, 3))
  drawn_A = np.asarray(jnp.argmax(logits_V[None] + noise_AV, axis=1))
  found_V = np.bincount(drawn_A, minlength=3) / len(drawn_A)
  np.testing.assert_allclose(found_V, jax.nn.softmax(logits_V), atol=0.015)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
@pytest.mark.parametrize(("number", "parts"), [(3, 1), (3, 2), (2, 4)])
def test_a_micro_batch_draws_what_its_rows_draw_in_one_piece(
  number, parts, impl
):
  key = jax.random.key(1, impl=impl)
  whole = np.asarray(draws.bits(key, (24, 3, 5)))
  runs = whole.reshape(parts, number, -1, 3, 5)
  for index in range(number):
    with draws.share(draws.Share(jnp.asarray(index), number, parts)):
      piece = draws.bits(key, (24 // number, 3, 5))
    expected = runs[:, index].reshape(-1, 3, 5)
    np.testing.assert_array_equal(piece, expected)
  np.testing.assert_array_equal(draws.bits(key, (24, 3, 5)), whole)


def test_a_row_draws_the_same_whatever_comes_after_it():
  few, many = draws.bits(KEY, (3, 7)), draws.bits(KEY, (9, 7))
  np.testing.assert_array_equal(few, many[:3])


def test_keys_draw_different_numbers():
  first, second = (draws.bits(jax.random.key(s), (8, 8)) for s in (0, 1))
  assert np.mean(np.asarray(first) == np.asarray(second)) < 0.05
