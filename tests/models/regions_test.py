"""Regions as vectors: their contents and their places."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from glscl_jax.models import products, regions
from tests import random_pairs, random_regions

CONFIG = random_regions.config()
PARAMS = random_pairs.spread_params(CONFIG)
BATCH = random_regions.batch(CONFIG)
TYPE = np.float32(0.1) * np.arange(64, dtype=np.float32)


def run(method, *arrays, config=CONFIG):
  module = regions.RegionEmbedding(config.model)
  variables = {"params": PARAMS["region"]}
  return module.apply(variables, *arrays, method=method)


def norm(name, x):
  x = x - x.mean(-1, keepdims=True)
  p = PARAMS["region"][name]
  return x / np.sqrt(x.var(-1, keepdims=True) + 1e-12) * p["scale"] + p["bias"]


def dense(name, x):
  p = PARAMS["region"][name]
  return x.astype(np.float64) @ p["kernel"] + p["bias"]


def test_a_content_is_the_feature_and_a_place_is_box_and_type():
  content = norm("feature_norm", dense("feature", BATCH.region_BRP))
  place = norm("box_norm", dense("box", BATCH.box_BR7)) + TYPE
  np.testing.assert_allclose(
    run("contents", BATCH.region_BRP), content, atol=1e-5
  )
  np.testing.assert_allclose(
    run("places", BATCH.box_BR7, TYPE), place, atol=1e-5
  )
  np.testing.assert_allclose(
    run("embed", content.astype(np.float32), place.astype(np.float32)),
    norm("norm", content + place),
    atol=1e-5,
  )


def test_a_hidden_region_is_the_mask_feature_seen_as_any_other():
  feature = PARAMS["region"]["mask_feature"]["value"]
  np.testing.assert_allclose(
    run("hidden_content"), run("contents", feature[None, None])[0, 0], atol=1e-6
  )
  # Not what a feature of zeros would be.
  zeros = run("contents", np.zeros((1, 1, 16), np.float32))[0, 0]
  assert np.abs(run("hidden_content") - zeros).max() > 0.1


def test_coordinates_are_not_rounded_to_the_type_of_products(monkeypatch):
  monkeypatch.setattr(products, "activation_dtype", jnp.dtype)
  half = random_regions.config(compute_dtype="bfloat16")
  near = BATCH.box_BR7 + np.float32(1e-3)  # .999 and .998 are one bfloat16
  moved, here = (
    run("places", box, TYPE, config=half) for box in (near, BATCH.box_BR7)
  )
  exact, start = (run("places", box, TYPE) for box in (near, BATCH.box_BR7))
  assert moved.dtype == jnp.float32
  np.testing.assert_allclose(moved - here, exact - start, atol=1e-5)


def test_blocks_of_regions_alone_see_valid_regions_only():
  config = random_regions.config(unimodal_layers=(1, 0))
  module = regions.RegionEmbedding(config.model)
  rng = np.random.default_rng(0)
  content, place = rng.standard_normal((2, 2, 6, 64)).astype(np.float32)
  valid = np.arange(6)[None] < np.array([[4], [6]])
  params = jax.jit(
    lambda k: module.init(k, content, place, valid, method="encode")
  )(jax.random.key(0))

  def encode(content):
    return np.asarray(
      module.apply(params, content, place, valid, method="encode")
    )

  before = encode(content)
  after = encode(np.where(valid[:, :, None], content, 7.0).astype(np.float32))
  np.testing.assert_array_equal(before[valid], after[valid])
  content[0, 0] *= -1.0
  assert np.abs(encode(content)[0, 1] - before[0, 1]).max() > 1e-5
  assert before.dtype == np.float32
