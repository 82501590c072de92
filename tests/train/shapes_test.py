"""Shapes of batches without data are those of batches with data."""

import dataclasses

import jax
import pytest

from glscl_jax import config as config_lib
from glscl_jax import sharding
from glscl_jax.config import ConfigError, MeshConfig
from glscl_jax.data import pipeline, sources
from glscl_jax.data import tokenizer as tokenizer_lib
from glscl_jax.train import shapes
from tests import random_pairs, random_regions, tiny
from tests.data import tiny_regions


@pytest.fixture(scope="module")
def pairs_dir(tmp_path_factory):
  return tiny.write_names(tmp_path_factory.mktemp("data") / "names", "train")


@pytest.fixture(scope="module")
def regions_dir(tmp_path_factory):
  records = [tiny_regions.make_record(number) for number in range(4)]
  return tiny_regions.write(tmp_path_factory.mktemp("data") / "r", records)


def of_regions(data_dir, *names):
  region = config_lib.RegionConfig(
    number=6,
    feature_width=tiny_regions.WIDTH,
    num_classes=len(tiny_regions.CLASSES),
  )
  make = lambda **sizes: random_regions.config(*names, region=region, **sizes)  # noqa: E731
  return tiny.of_system(data_dir, make)


def with_false_images(**sizes):
  return random_pairs.config(objectives={"itm_negatives": "dataset"}, **sizes)


@pytest.mark.parametrize(
  "make",
  [
    random_pairs.config,
    with_false_images,
    random_pairs.maskvlm,
    random_pairs.sycoca,
  ],
)
def test_a_batch_of_images_has_these_shapes(make, pairs_dir):
  check(tiny.of_system(pairs_dir, make))


@pytest.mark.parametrize("names", [(), ("itm", "mlm", "mrc")])
def test_a_batch_of_regions_has_these_shapes(names, regions_dir):
  check(of_regions(regions_dir, *names))


def check(config):
  config = dataclasses.replace(
    config, data=dataclasses.replace(config.data, batch_size=8, num_threads=1)
  )
  mesh = sharding.make_mesh(MeshConfig())
  path = sources.tokenizer_path(config.data.dir)
  iterator = pipeline.make_train_iterator(config, tokenizer_lib.load(path))
  batch = pipeline.global_batch(next(iterator), mesh)
  iterator.close()
  found = shapes.abstract_batch(config, mesh)
  assert jax.tree.structure(found) == jax.tree.structure(batch)
  for name, array in vars(batch).items():
    if array is not None:
      told = getattr(found, name)
      assert (told.shape, told.dtype) == (array.shape, array.dtype), name
      assert told.sharding == array.sharding, name


def test_devices_that_do_not_divide_the_batch_are_an_error():
  config = random_pairs.config(batch_size=12)
  with pytest.raises(ConfigError, match="batch_size 12 is not divisible by"):
    shapes.abstract_batch(config, sharding.make_mesh(MeshConfig()))
