"""Which pairs a run shows, in which batches."""

from __future__ import annotations

import collections
import pickle

import numpy as np
import pytest

from glscl_jax import config as config_lib
from glscl_jax.data import order

BATCH = 4
LENGTHS = (8, 16, 50)


@pytest.fixture
def tokens_A():
  return np.random.default_rng(0).integers(3, 60, 103).astype(np.int32)


def make(tokens_A, *, seed=0):
  return order.ByLength(tokens_A, LENGTHS, batch_size=BATCH, seed=seed)


def read(by_length, steps):
  """The places of some batches."""
  return [
    [by_length(step * BATCH + row) for row in range(BATCH)] for step in steps
  ]


def test_a_batch_has_one_length_that_holds_all_its_texts(tokens_A):
  seen = collections.Counter()
  for batch in read(make(tokens_A), range(50)):
    (length,) = {place.length for place in batch}
    longest = max(tokens_A[place.pair] for place in batch)
    assert longest <= length or length == LENGTHS[-1]
    seen[length] += 1
  assert set(seen) == set(LENGTHS)


def test_few_batches_are_longer_than_their_texts_ask_for(tokens_A):
  """One a class at most: that of the pairs which filled no shorter one."""
  batches = read(make(tokens_A), range(len(tokens_A) // BATCH))
  for shorter, length in zip((0, *LENGTHS[:-1]), LENGTHS, strict=True):
    own = [batch for batch in batches if batch[0].length == length]
    mixed = [
      batch
      for batch in own
      if min(tokens_A[place.pair] for place in batch) <= shorter
    ]
    assert len(mixed) <= 1


def test_an_epoch_has_every_pair_once_but_less_than_a_batch(tokens_A):
  by_length, number = make(tokens_A), len(tokens_A) // BATCH
  epochs = [
    [place for batch in read(by_length, steps) for place in batch]
    for steps in (range(number), range(number, 2 * number))
  ]
  for epoch, places in enumerate(epochs):
    assert {place.epoch for place in places} == {epoch}
    pairs = [place.pair for place in places]
    assert len(set(pairs)) == len(pairs) == number * BATCH
  first, second = ([p.pair for p in places] for places in epochs)
  assert first != second
  lengths = [[p.length for p in places] for places in epochs]
  assert lengths[0] != lengths[1]  # batches are shuffled too


def test_the_order_is_the_same_from_any_start_and_in_workers(tokens_A):
  by_length = make(tokens_A)
  expected = read(by_length, range(60))
  worker = pickle.loads(pickle.dumps(by_length))
  assert read(worker, reversed(range(60))) == expected[::-1]
  assert read(make(tokens_A, seed=1), range(60)) != expected


def test_too_few_pairs_for_a_batch_say_what_to_set(tokens_A):
  with pytest.raises(config_lib.ConfigError, match="3 pairs do not fill"):
    make(tokens_A[:3])


@pytest.mark.parametrize(
  "lengths, told",
  [((16, 8), "must rise"), ((2, 8), "from 3 to below"), ((8, 50), "below")],
)
def test_lengths_that_make_no_sense_are_told(lengths, told):
  with pytest.raises(config_lib.ConfigError, match=told):
    config_lib.Config(data=config_lib.DataConfig(text_lengths=lengths))


def test_one_length_is_a_recipe_without_lengths():
  config = config_lib.Config(data=config_lib.DataConfig(text_lengths=(16, 32)))
  short = config_lib.at_length(config, 16)
  assert short.model.text.max_length == 16
  assert short.data.text_lengths == ()
