"""Which image each text is shown, and which pairs count, for each negative."""

from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glscl_jax.systems import glscl
from tests import random_pairs

# Two groups of four; the second shows one image only.
IDS = np.array([0, 1, 2, 1, 3, 3, 3, 3], np.int32)
STATES = jnp.arange(8, dtype=jnp.float32)[:, None, None]
VECTORS = np.random.default_rng(0).standard_normal((2, 8, 4))


def show(kind, key):
  """(index of the image shown, label, counts) of each text."""
  config = random_pairs.config(
    objectives={"itm_negatives": kind, "neg_group": 4}
  )
  batch = random_pairs.change(
    random_pairs.batch(config), identity_BM=IDS[:, None]
  )
  pairing = glscl.Pairing(
    types.SimpleNamespace(temperature=lambda: jnp.float32(0.07)),
    batch,
    STATES,
    tuple(jnp.asarray(v, jnp.float32) for v in VECTORS),
    config,
    key,
  )
  shown, labels, ok = glscl.ITM_IMAGES[kind](pairing)
  counts = np.ones(8, bool) if ok is None else np.asarray(ok)
  return np.asarray(shown[:, 0, 0], int), np.asarray(labels), counts


@pytest.mark.parametrize("kind", ["in_batch", "hard"])
def test_a_false_image_is_another_one_of_the_group(kind, key):
  for i in range(5):
    shown, labels, counts = show(kind, jax.random.fold_in(key, i))
    np.testing.assert_array_equal(shown[labels == 1], np.nonzero(labels)[0])
    false = (labels == 0) & counts
    assert np.all(IDS[shown[false]] != IDS[false])
    np.testing.assert_array_equal(shown // 4, np.arange(8) // 4)
    assert labels[:4].sum() == 2 and counts[:4].all()


def test_a_random_negative_that_is_not_there_becomes_a_true_pair(key):
  shown, labels, counts = show("in_batch", key)
  np.testing.assert_array_equal(shown[4:], np.arange(4, 8))
  assert labels[4:].all() and counts.all()


def test_a_hard_negative_that_is_not_there_is_dropped(key):
  _, labels, counts = show("hard", key)
  assert labels[4:].sum() == 2
  np.testing.assert_array_equal(counts[4:], labels[4:] == 1)
