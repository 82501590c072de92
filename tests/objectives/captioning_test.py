"""Captioning: the cross-entropy of each next token."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from glscl_jax.objectives import captioning

B, T, V = 3, 6, 11


def example(lengths=(6, 4, 2), seed=0):
  rng = np.random.default_rng(seed)
  logits = rng.standard_normal((B, T - 1, V)).astype(np.float32)
  ids = rng.integers(0, V, (B, T)).astype(np.int32)
  return logits, ids, np.arange(T)[None] < np.array(lengths)[:, None]


def slow(logits, ids, valid):
  losses, hits = [], []
  for b in range(len(ids)):
    for place in range(T - 1):
      if valid[b, place + 1]:
        row, label = logits[b, place].astype(float), ids[b, place + 1]
        losses.append(scipy.special.logsumexp(row) - row[label])
        hits.append(np.argmax(row) == label)
  return (np.mean(losses), np.mean(hits)) if losses else (0.0, 0.0)


@pytest.mark.parametrize(
  "lengths",
  [(6, 4, 2), (1, 3, 0), (1, 1, 0), (0, 0, 0)],
  ids=["texts", "one without a target", "starts alone", "padding alone"],
)
def test_each_token_is_predicted_from_those_before(lengths):
  arrays = example(lengths)
  loss, hits = slow(*arrays)
  assert float(captioning.captioning(*arrays)) == pytest.approx(loss, rel=1e-5)
  assert float(captioning.accuracy(*arrays)) == pytest.approx(hits)


def test_a_batch_of_one_text():
  logits, ids, valid = (a[1:2] for a in example())
  found = captioning.captioning(logits, ids, valid)
  assert float(found) == pytest.approx(slow(logits, ids, valid)[0], rel=1e-5)


def test_a_valid_token_whose_id_is_that_of_padding_keeps_its_term():
  logits, ids, valid = example()
  ids[1] = [5, 7, 0, 9, 0, 0]
  ids[1, 2] = 0
  other = ids.copy()
  other[1, 2] = 3
  before, after = (
    float(captioning.captioning(logits, a, valid)) for a in (ids, other)
  )
  assert before != after
  other = ids.copy()
  other[1, 4] = 3  # behind the end
  assert before == float(captioning.captioning(logits, other, valid))


def test_padding_gets_exactly_no_gradient():
  logits, ids, valid = example()
  gradient = np.asarray(
    jax.grad(captioning.captioning)(jnp.asarray(logits), ids, valid)
  )
  target = valid[:, 1:]
  assert np.all(gradient[~target] == 0)
  assert np.all(np.any(gradient[target] != 0, axis=-1))
  none = jax.grad(captioning.captioning)(
    jnp.asarray(logits), ids, np.zeros_like(valid)
  )
  assert np.all(np.asarray(none) == 0)


def test_an_even_guess_costs_the_logarithm_of_the_vocabulary():
  _, ids, valid = example()
  found = captioning.captioning(np.zeros((B, T - 1, V), np.float32), ids, valid)
  assert float(found) == pytest.approx(np.log(V), rel=1e-6)
