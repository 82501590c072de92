"""Which patches a caption speaks of, and the two sets made of them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glscl_jax.objectives import attentive

B, N, T, E = 3, 8, 6, 5


def example(seed=0):
  rng = np.random.default_rng(seed)
  patch = rng.standard_normal((B, N, E)).astype(np.float32)
  word = rng.standard_normal((B, T, E)).astype(np.float32)
  return patch, word, rng.random((B, T)) < 0.5


def slow_scores(patch, word, content):
  found = np.zeros(patch.shape[:2])
  for b in range(len(patch)):
    for n in range(patch.shape[1]):
      cosines = [
        patch[b, n]
        @ word[b, j]
        / max(np.linalg.norm(patch[b, n]) * np.linalg.norm(word[b, j]), 1e-8)
        for j in np.flatnonzero(content[b])
      ]
      found[b, n] = max(cosines, default=0.0)
  return found


def slow_split(scores, num_high, num_low):
  """Sets of `high` and `low`: one patch after the other leaves the rest."""
  high, low = [], []
  for row in scores:
    rest = list(range(len(row)))
    high.append({rest.pop(int(np.argmax(row[rest]))) for _ in range(num_high)})
    # Of equal ones the last.
    rest = list(range(len(row)))[::-1]
    low.append({rest.pop(int(np.argmin(row[rest]))) for _ in range(num_low)})
  return high, low


@pytest.mark.parametrize(
  ("lengths", "expected"),
  [
    ((6, 5, 3), ["011110", "011100", "010000"]),
    ((2, 1, 0), ["000000", "000000", "000000"]),
  ],
  ids=["words", "no words"],
)
def test_content_is_what_stands_between_start_and_end(lengths, expected):
  valid = np.arange(T)[None] < np.array(lengths)[:, None]
  found = np.asarray(attentive.content_words(jnp.asarray(valid)))
  rows = ["".join(str(int(flag)) for flag in row) for row in found]
  assert rows == expected


def test_a_score_is_the_largest_cosine_to_a_content_word():
  patch, word, content = example()
  content[1] = False
  patch[2, 3] = 0.0  # no direction: no similarity
  found = attentive.scores(*map(jnp.asarray, (patch, word, content)))
  np.testing.assert_allclose(
    found, slow_scores(patch, word, content), atol=1e-6
  )
  assert np.all(np.asarray(found)[1] == 0)


def test_scores_carry_no_gradient():
  patch, word, content = map(jnp.asarray, example())

  def total(patch, word):
    return jnp.sum(attentive.scores(patch, word, content))

  for gradient in jax.grad(total, argnums=(0, 1))(patch, word):
    assert np.all(np.asarray(gradient) == 0)


SCORES = {
  "random": np.random.default_rng(1).standard_normal((B, N)),
  "ties": np.array([[1, 0, 1, 0, 1, 0, 1, 0], [2, 2, 2, 1, 1, 1, 1, 1]]),
  "all equal": np.zeros((1, N)),
}


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize(
  ("num_high", "num_low"), [(4, 4), (2, 3), (6, 6), (1, 0), (0, 7)]
)
def test_exact_counts_of_the_largest_and_of_all_but_the_smallest(
  kind, num_high, num_low
):
  scores = SCORES[kind].astype(np.float32)
  found = attentive.split(
    jnp.asarray(scores), num_high=num_high, num_low=num_low
  )
  high, low = slow_split(scores, num_high, num_low)
  assert found.high_BJ.shape == (len(scores), num_high)
  assert found.keep_BM.shape == (len(scores), N - num_low)
  for b in range(len(scores)):
    assert set(np.asarray(found.high_BJ)[b].tolist()) == high[b]
    kept = set(np.asarray(found.keep_BM)[b].tolist())
    assert kept == set(range(N)) - low[b]
    assert len(kept) == N - num_low  # without repetition


@pytest.mark.parametrize("kind", SCORES)
def test_the_halves_are_complements(kind):
  found = attentive.split(
    jnp.asarray(SCORES[kind].astype(np.float32)), num_high=4, num_low=4
  )
  np.testing.assert_array_equal(found.high_BJ, found.keep_BM)


def test_halves_of_an_odd_number_share_the_patch_in_the_middle():
  """Nine patches: five are `high`, five `low`, four kept."""
  scores = np.random.default_rng(2).standard_normal((B, 9)).astype(np.float32)
  scores[1] = 0.0
  found = attentive.split(jnp.asarray(scores), num_high=5, num_low=5)
  order = np.argsort(-scores, axis=1, kind="stable")
  np.testing.assert_array_equal(found.high_BJ, order[:, :5])
  np.testing.assert_array_equal(found.keep_BM, order[:, :4])
