"""32 pairs are learned by heart; wrong captions are noticed."""

import numpy as np
import pytest

from glscl_jax.config import SYSTEM_OBJECTIVES
from tests import overfit, random_pairs

NUM_PAIRS = overfit.NUM_PAIRS
CONFIG = random_pairs.config(
  batch_size=NUM_PAIRS,
  image_size=24,  # nine patches
  max_length=4,
  num_steps=280,
  objectives={
    "itm": 3.0,  # the slowest to learn
    "neg_group": NUM_PAIRS,  # so that every wrong pair is shown
    "mltc_text_group": NUM_PAIRS,
    # A colder temperature makes single steps too long.
    "itc_temperature_range": (0.02, 0.5),
  },
  # Muon learns them by heart in half of AdamW's steps, the last pair too.
  optimizer={
    "variant": "muon",
    "muon_rms": 0.4,
    "learning_rate": 5e-3,
    "fusion_multiplier": 1.0,
    "head_multiplier": 1.0,
  },
)


@pytest.fixture(scope="module")
def batch():
  return overfit.make_batch(
    CONFIG, lambda rng: rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)
  )


@pytest.fixture(scope="module")
def trained(batch):
  return overfit.train(CONFIG, batch)


@pytest.mark.parametrize("name", SYSTEM_OBJECTIVES["glscl"])
def test_each_loss_falls_below_a_tenth(name, trained):
  assert trained.last[name] < 0.1 * trained.first[name]


def test_accuracies_are_perfect_but_for_a_pair_in_matching(trained):
  assert trained.last["mlm_accuracy"] == 1.0
  assert trained.last["itc_accuracy"] == 1.0
  # Which false pair is still confused, if any, depends on rounding.
  assert trained.last["itm_accuracy"] >= 1 - 1 / NUM_PAIRS


def test_wrong_captions_are_worse_for_words_and_matching(trained):
  assert trained.shuffled["mlm"] > 10 * trained.last["mlm"]
  assert trained.shuffled["itm"] > 10 * trained.last["itm"]
  assert trained.shuffled["mlm_accuracy"] < 0.5


@pytest.fixture(scope="module")
def scores(trained, batch):
  return overfit.scores(CONFIG, trained.params, batch)


def test_vectors_rank_the_own_partner_first_both_ways(scores):
  for rank in overfit.ranks(scores["vectors"]):
    np.testing.assert_array_equal(rank, 0)


def test_matching_ranks_most_own_partners_first_both_ways(scores):
  # A run shows each of the 992 wrong pairs about five times; how many it still
  # confuses depends on the compiler's rounding. By chance 1 of 32 is first.
  for rank in overfit.ranks(scores["matching"]):
    assert np.sum(rank == 0) >= 24
    assert np.all(rank <= 5)
