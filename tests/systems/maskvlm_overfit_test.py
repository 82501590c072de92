"""32 pairs are learned by heart; wrong captions are noticed."""

import numpy as np
import pytest

from tests import overfit, random_pairs

NUM_PAIRS = overfit.NUM_PAIRS
CONFIG = random_pairs.maskvlm(
  batch_size=NUM_PAIRS,
  max_length=4,
  num_steps=600,
  objectives={
    "neg_group": NUM_PAIRS,
    # A colder temperature makes single steps too long.
    "itc_temperature_range": (0.02, 0.5),
  },
  optimizer={
    "learning_rate": 2e-3,
    "fusion_multiplier": 1.0,
    "head_multiplier": 1.0,
  },
)


def draw_image(rng):
  """Sixteen patches, each of one colour."""
  colors_YXC = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
  return np.kron(colors_YXC, np.ones((8, 8, 1), np.uint8))


@pytest.fixture(scope="module")
def batch():
  return overfit.make_batch(CONFIG, draw_image)


@pytest.fixture(scope="module")
def trained(batch):
  return overfit.train(CONFIG, batch)


@pytest.mark.parametrize("name", ["mlm", "itc", "itm"])
def test_each_loss_but_that_of_pixels_falls_below_a_tenth(name, trained):
  assert trained.last[name] < 0.1 * trained.first[name]


def test_the_pixel_loss_falls_by_a_third(trained):
  assert trained.last["mim"] < 0.7 * trained.first["mim"]


def test_wrong_captions_are_worse(trained):
  for name in ("mlm", "itm"):
    assert trained.shuffled[name] > 10 * trained.last[name], name
  assert trained.shuffled["mim"] > 1.2 * trained.last["mim"]


@pytest.fixture(scope="module")
def scores(trained, batch):
  return overfit.scores(CONFIG, trained.params, batch)


def test_vectors_rank_the_own_partner_first_both_ways(scores):
  for rank in overfit.ranks(scores["vectors"]):
    np.testing.assert_array_equal(rank, 0)
