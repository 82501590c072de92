"""32 pairs are learned by heart; wrong captions are noticed."""

import numpy as np
import pytest

from tests import overfit, random_pairs

CONFIG = random_pairs.sycoca(
  batch_size=overfit.NUM_PAIRS,
  image_size=16,  # four patches
  max_length=4,
  num_steps=250,
  objectives={"ic": 2.0, "itc_temperature_range": (0.02, 1.0)},
  optimizer={
    "learning_rate": 2e-3,
    "fusion_multiplier": 1.0,
    "head_multiplier": 1.0,
  },
)


def draw_image(rng):
  """Four patches, each with an edge between two colours."""
  colors_YXC = rng.integers(0, 256, (2, 4, 3), dtype=np.uint8)
  return np.kron(colors_YXC, np.ones((8, 4, 1), np.uint8))


@pytest.fixture(scope="module")
def batch():
  return overfit.make_batch(CONFIG, draw_image)


@pytest.fixture(scope="module")
def trained(batch):
  return overfit.train(CONFIG, batch)


@pytest.mark.parametrize("name", ["itc", "ic"])
def test_each_loss_but_that_of_pixels_falls_below_a_tenth(name, trained):
  assert trained.last[name] < 0.1 * trained.first[name]


def test_the_pixel_loss_falls_by_a_third(trained):
  assert trained.last["tg_mim"] < 0.67 * trained.first["tg_mim"]


def test_wrong_captions_are_worse(trained):
  assert trained.shuffled["ic"] > 10 * trained.last["ic"]
  assert trained.shuffled["tg_mim"] > 1.2 * trained.last["tg_mim"]


def test_vectors_rank_the_own_partner_first_both_ways(trained, batch):
  scores = overfit.scores(CONFIG, trained.params, batch)
  assert set(scores) == {"vectors"}
  for rank in overfit.ranks(scores["vectors"]):
    np.testing.assert_array_equal(rank, 0)
