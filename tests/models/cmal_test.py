"""The swap of contents, and the embedding of words."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from glscl_jax.models import cmal
from tests import random_regions

B, T, R, D, A = 2, 5, 4, 3, 3
POS = np.array([[1, 3, 0], [2, 0, 0]], np.int32)
REGION = np.array([[2, 0, 0], [3, 0, 0]], np.int32)
OK = np.array([[True, True, False], [True, False, False]])


def contents(seed=0):
  rng = np.random.default_rng(seed)
  return (
    rng.standard_normal((B, T, D)).astype(np.float32),
    rng.standard_normal((B, R, D)).astype(np.float32),
  )


def swap(text, region, *, sides=("text", "image"), rescale=False):
  found = cmal.swap(text, region, POS, REGION, OK, sides=sides, rescale=rescale)
  return tuple(map(np.asarray, found))


def by_hand(text, region, sides):
  new_text, new_region = text.copy(), region.copy()
  for b, a in zip(*np.nonzero(OK), strict=True):
    if "text" in sides:
      new_text[b, POS[b, a]] = region[b, REGION[b, a]]
    if "image" in sides:
      new_region[b, REGION[b, a]] = text[b, POS[b, a]]
  return new_text, new_region


@pytest.mark.parametrize(
  "sides", [("text", "image"), ("text",), ("image",), ()], ids=str
)
def test_contents_of_anchors_change_places_and_no_others(sides):
  for found, expected in zip(
    swap(*contents(), sides=sides), by_hand(*contents(), sides), strict=True
  ):
    np.testing.assert_array_equal(found, expected)


def test_swapping_twice_swaps_back():
  for found, expected in zip(swap(*swap(*contents())), contents(), strict=True):
    np.testing.assert_array_equal(found, expected)


def test_slots_without_an_anchor_do_not_matter():
  text, region = contents()
  found = cmal.swap(
    text,
    region,
    np.where(OK, POS, 3),
    np.where(OK, REGION, 1),
    OK,
    sides=("text", "image"),
    rescale=False,
  )
  for a, b in zip(found, swap(text, region), strict=True):
    np.testing.assert_array_equal(a, b)


def test_rescaled_contents_are_as_long_as_what_they_replace():
  text, region = contents()
  plain, scaled = swap(text, region), swap(text, region, rescale=True)
  for before, found, moved in zip((text, region), scaled, plain, strict=True):
    np.testing.assert_allclose(
      np.linalg.norm(found, axis=2), np.linalg.norm(before, axis=2), rtol=1e-5
    )
    unit = moved / np.linalg.norm(moved, axis=2, keepdims=True)
    length = np.linalg.norm(found, axis=2, keepdims=True)
    np.testing.assert_allclose(found, unit * length, atol=1e-6)


def test_a_content_of_length_zero_is_rescaled_to_something_finite():
  text, region = contents()
  found = swap(0 * text, region, rescale=True)
  assert all(np.all(np.isfinite(a)) for a in found)


def test_positions_count_from_zero_and_come_from_validity(key):
  module = cmal.WordEmbedding(random_regions.config().model)
  valid_BT = np.array([[True] * 4, [True, True, False, False]])
  params = module.init(key, valid_BT, method="places")["params"]
  place_BTD = module.apply({"params": params}, valid_BT, method="places")
  rows = np.array([[0, 1, 2, 3], [0, 1, 0, 0]])
  table, types = (
    np.asarray(params[f"{name}_embedding"]) for name in ("position", "type")
  )
  expected = table[rows] + types[0]
  np.testing.assert_array_equal(place_BTD, expected)


def test_the_two_rows_of_types_are_those_of_text_and_regions(key):
  model = cmal.CMAL(random_regions.config().model)
  init = jax.jit(lambda k: model.init(k, method="region_type"))
  params = init(key)["params"]
  assert params["text"]["type_embedding"].shape == (2, 64)
  np.testing.assert_array_equal(
    model.apply({"params": params}, method="region_type"),
    params["text"]["type_embedding"][1],
  )
