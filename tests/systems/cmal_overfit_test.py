"""32 pairs: a guess at first, then learned by heart; what captions are for."""

import math

import numpy as np
import pytest

from glscl_jax import config as config_lib
from glscl_jax.types import Batch
from tests import overfit, random_regions

CONFIG = random_regions.config(
  depth=3,
  batch_size=overfit.NUM_PAIRS,
  max_length=5,
  region=config_lib.RegionConfig(number=3, feature_width=64, num_classes=44),
  num_steps=700,
  # In 64 dimensions the cosines of random vectors are no small ones.
  itc_temperature=0.3,
  scan=False,
  objectives={
    "amc": 3.0,
    "wrc": 2.0,
    "itm": 3.0,
    "neg_group": overfit.NUM_PAIRS,
    "itc_temperature_range": (0.02, 0.5),
  },
  masking={"max_anchors": 2, "max_pairs": 3},
  optimizer={
    "learning_rate": 2e-3,
    "fusion_multiplier": 1.0,
    "head_multiplier": 1.0,
    "clip_norm": 5.0,
  },
)
LOSSES = ("amc", "wrc", "itm")


@pytest.fixture(scope="module")
def batch():
  """Each pair has a word of its own, 10 .., and so has its region's class.

  Of the other regions one is named by one of four words, 45 ..; one has no
  name. A feature is that of its class, and a little of its own.
  """
  rng = np.random.default_rng(0)
  features = rng.standard_normal((45, 64))
  rows = []
  for index in range(overfit.NUM_PAIRS):
    classes = np.array([1 + index, 33 + index // 8, 37 + index % 8])
    order = rng.permutation(3)
    rows.append(
      random_regions.sample(
        CONFIG,
        rng,
        words=np.array([10 + index, 45 + index // 8, 50 + index % 8]),
        features=features[classes[order]] + 0.1 * rng.standard_normal((3, 64)),
        classes=classes[order],
        anchors=[(word, int(np.argmax(order == word))) for word in (0, 1)],
        index=index,
      )
    )
  columns = {k: np.stack([row[k] for row in rows]) for k in rows[0]}
  # Of the pairs of WRC those alone that name the same.
  columns["pair_ok_BA"][:, 2] = False
  return Batch(**columns)


@pytest.fixture(scope="module")
def trained(batch):
  return overfit.train(CONFIG, batch)


@pytest.mark.parametrize("name", LOSSES)
def test_each_loss_falls_below_a_tenth(name, trained):
  # The two pairs of a sample share one softmax: WRC can fall to log 2.
  least = math.log(2) if name == "wrc" else 0.0
  first, last = trained.first[name] - least, trained.last[name] - least
  assert last < 0.1 * first


def test_the_loss_is_the_mean_of_the_objectives_by_weight(trained):
  for metrics in (trained.first, trained.last):
    amc, wrc, itm = (metrics[name] for name in LOSSES)
    expected = (3 * amc + 2 * wrc + 3 * itm) / 8
    assert metrics["loss"] == pytest.approx(expected, rel=1e-5)
    assert metrics["anchors_per_sample"] == 2


def test_anchors_and_ordinary_masks_are_counted_apart(trained):
  for kind in ("word_anchor", "word_masked", "region_anchor", "region_hidden"):
    assert trained.first[f"amc_{kind}_accuracy"] < 0.5
    assert trained.last[f"amc_{kind}_accuracy"] > 0.95


def test_wrong_captions_are_worse(trained):
  assert trained.shuffled["amc"] > 10 * trained.last["amc"]
  assert trained.shuffled["itm"] > 10 * trained.last["itm"]


def test_matching_ranks_the_own_partner_first_both_ways(trained, batch):
  scores = overfit.scores(CONFIG, trained.params, batch)
  assert set(scores) == {"matching"}
  for rank in overfit.ranks(scores["matching"]):
    # A step shows half of the texts one false image of 31: whether the last
    # pairs are told apart depends on how threads round.
    assert np.sum(rank > 0) <= 3 and np.max(rank) <= 2
