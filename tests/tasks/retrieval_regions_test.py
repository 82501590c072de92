"""Retrieval by matching alone, of images that are known by their regions."""

import numpy as np
import pytest

from glscl_jax import config as config_lib
from glscl_jax.data import retrieval_set
from glscl_jax.data import tokenizer as tokenizers
from glscl_jax.systems import cmal
from glscl_jax.tasks import retrieval
from tests import random_pairs, random_regions, tiny
from tests.data import tiny_regions

NAMES = ("a dog", "two red apples", "a person", "person, dog", "a knife")


def make_config(data_dir, *names, number=6):
  region = config_lib.RegionConfig(
    number=number,
    feature_width=tiny_regions.WIDTH,
    num_classes=len(tiny_regions.CLASSES),
  )
  return tiny.of_system(
    data_dir,
    lambda **sizes: random_regions.config(*names, region=region, **sizes),
  )


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  records = [
    tiny_regions.make_record(i, captions=(name,), split="test")
    for i, name in enumerate(NAMES)
  ]
  return tiny_regions.write(tmp_path_factory.mktemp("regions") / "d", records)


def encode(data_dir, config, params):
  return retrieval.encode(
    params,
    retrieval_set.read(str(data_dir), "test"),
    config=config,
    tokenizer=tokenizers.load(data_dir / "tokenizer.model"),
    batch_size=4,  # the last batch is padded
    keep_tokens=True,
  )


def test_all_pairs_are_scored_as_the_system_scores_them(data_dir):
  config = make_config(data_dir, "itm")
  params = random_pairs.spread_params(config)
  encodings = encode(data_dir, config, params)
  fused = retrieval.fuse(params, encodings, config=config, count=None)
  scores_UZ = fused.scores.reshape(len(NAMES), len(NAMES))
  for image, text in ((0, 0), (1, 3), (4, 2)):
    expected = cmal.match_scores(
      params,
      encodings.text_tokens[text : text + 1],
      encodings.text_valid[text : text + 1],
      encodings.image_tokens[image : image + 1],
      encodings.image_valid[image : image + 1],
      config=config,
    )
    np.testing.assert_allclose(scores_UZ[image, text], expected[0], atol=1e-5)
  assert np.ptp(scores_UZ) > 1e-3


def test_empty_slots_of_regions_change_no_score(data_dir):
  few, many = (make_config(data_dir, "itm", number=n) for n in (4, 9))
  params = random_pairs.spread_params(few)
  found = [
    retrieval.fuse(
      params, encode(data_dir, config, params), config=config, count=None
    ).scores
    for config in (few, many)
  ]
  np.testing.assert_allclose(*found, atol=1e-5)


def test_cosines_are_refused_where_there_is_no_contrastive_space(data_dir):
  config = make_config(data_dir, "itm")
  with pytest.raises(retrieval.RetrievalError, match="full needs none"):
    retrieval.check_protocol(config, retrieval.Protocol())
  retrieval.check_protocol(config, retrieval.Protocol(rerank="full"))
