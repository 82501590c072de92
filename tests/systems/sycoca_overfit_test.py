"""32 pairs: a guess at first, then learned by heart; what captions are for."""

import functools
import math

import jax
import numpy as np
import pytest

from glscl_jax.systems import inputs
from glscl_jax.tasks import captioning, decoding
from tests import overfit, random_pairs

CONFIG = random_pairs.sycoca(
  batch_size=overfit.NUM_PAIRS,
  image_size=16,  # four patches
  max_length=4,
  num_steps=260,
  # In 32 dimensions the cosines of random vectors are no small ones.
  itc_temperature=0.18,
  scan=False,
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


@pytest.mark.parametrize(
  ("name", "expected", "tolerance"),
  [
    ("itc", math.log(overfit.NUM_PAIRS), 0.3),
    ("ic", math.log(64), 0.15),
    # Of a zero output; that of fresh parameters has a variance of .026. Targets
    # have an unbiased variance of 1: (P - 1) / P.
    ("tg_mim", 191 / 192 + 64 * 0.02**2, 0.03),
  ],
)
def test_losses_start_where_a_guess_would(name, expected, tolerance, trained):
  assert trained.first[name] == pytest.approx(expected, abs=tolerance)


def test_the_loss_is_the_weighted_sum_of_the_objectives(trained):
  for metrics in (trained.first, trained.last):
    total = metrics["itc"] + 2 * metrics["ic"] + metrics["tg_mim"]
    assert metrics["loss"] == pytest.approx(total, rel=1e-5)
  assert trained.first["itc_temperature"] == pytest.approx(0.18, rel=1e-5)


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


@pytest.mark.parametrize("beam", [1, 3])
def test_captions_known_by_heart_are_written(beam, trained, batch):
  marks = captioning.Marks(
    start=random_pairs.START,
    end=random_pairs.END,
    never=(random_pairs.START, random_pairs.PAD, 63),
  )
  options = decoding.Options(beam=beam, max_tokens=3, min_tokens=1)
  write = functools.partial(
    captioning.caption, config=CONFIG, marks=marks, options=options
  )
  found = jax.jit(write)(trained.params, inputs.see_images(batch))
  np.testing.assert_array_equal(found.length_B, 3)
  right_B = np.all(found.ids_BL == batch.text_ids_BT[:, 1:], axis=1)
  # Not all of them: in training captions read half of the patches. How many
  # depends on how threads round; a guess is right once.
  assert np.sum(right_B) >= 16
