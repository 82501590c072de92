"""Charts and pictures: what is drawn where, by numbers."""

import io
import re

import numpy as np
import pytest
from PIL import Image

from glscl_jax.export import attention, pictures

CHANCE = {f"{d}_r{k}": k / 124 for d in ("i2t", "t2i") for k in (1, 5, 10)}


def recall(value):
  return dict.fromkeys(CHANCE, value)


def test_recall_bars_show_every_cell_protocol_and_chance():
  chart = pictures.recall_bars(
    {
      "unseen studio": {"cosine": recall(0.51), "re-ranked": recall(0.67)},
      "seen studio": {"cosine": recall(0.83)},
    },
    {"unseen studio": CHANCE, "seen studio": CHANCE},
  ).decode()
  for text in ("unseen studio", "seen studio", "cosine", "re-ranked", "chance"):
    assert f">{text}<" in chart
  # Three bars in each of two directions.
  for label, count in (("51", 6), ("67", 6), ("83", 6)):
    assert len(re.findall(f">{label}<", chart)) == count


def test_equal_numbers_give_equal_bytes():
  points = {"loss": [(i, 1 / (1 + i)) for i in range(50)]}
  assert pictures.curves(points) == pictures.curves(points)


@pytest.mark.parametrize("count", (1, 5, 50))
def test_curves_take_any_number_of_points(count):
  chart = pictures.curves(
    {"loss": [(i, i**0.5) for i in range(count)], "share": [(3, 0.5)]},
    percent=frozenset({"share"}),
  )
  assert b">loss<" in chart and b">share<" in chart


def test_the_running_mean_of_a_line_is_the_line_but_at_its_ends():
  values = np.arange(100.0)
  found = pictures.running_mean(values)
  np.testing.assert_allclose(found[5:-5], values[5:-5])
  assert found[0] > values[0] and found[-1] < values[-1]


def test_png_gives_the_picture_back():
  image = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
  found = np.asarray(Image.open(io.BytesIO(pictures.png(image))))
  np.testing.assert_array_equal(found, image)


def test_an_overlay_is_red_where_the_map_is_and_grey_elsewhere():
  image = np.full((40, 40, 3), (0, 120, 255), np.uint8)
  where = np.zeros((4, 4), np.float32)
  where[1, 3] = 0.2
  found = pictures.overlay(image, where, top=0.2, size=80).astype(int)
  red = found[..., 0] - found[..., 1:].max(-1)
  y, x = np.unravel_index(red.argmax(), red.shape)
  assert (y // 20, x // 20) == (1, 3)
  assert red.max() > 100
  assert abs(red[:, :30]).max() == 0


def test_word_maps_leave_out_the_class_and_take_the_strongest_head():
  maps = np.zeros((2, 5, 1 + 4), np.float32)  # heads, pieces, class + patches
  maps[:, :, 0] = 0.9
  maps[0, 1, 1], maps[1, 1, 4] = 0.1, 0.3  # word 0, one piece
  maps[1, 2, 2], maps[1, 3, 2] = 0.2, 0.4  # word 1, two pieces
  maps[:, 4, 3] = 0.8  # the end token
  found = attention.word_maps(maps, np.array([-1, 0, 1, 1, -1]), 2)
  np.testing.assert_allclose(found, [[[0.1, 0], [0, 0.3]], [[0, 0.3], [0, 0]]])


def test_patches_are_put_where_they_were_taken_from():
  image = np.random.default_rng(0).integers(0, 256, (12, 12, 3), np.uint8)
  patch_IPC = np.stack(
    [
      image[4 * y : 4 * y + 4, 4 * x : 4 * x + 4]
      for y in range(3)
      for x in range(3)
    ]
  ).reshape(9, 16, 3)
  index = np.array([7, 2, 4])
  found = pictures.put_patches(
    np.zeros_like(image), index, patch_IPC[index], patch_size=4
  )
  there = np.kron(np.isin(np.arange(9), index).reshape(3, 3), np.ones((4, 4)))
  np.testing.assert_array_equal(found, image * (there[..., None] > 0))


def test_hidden_patches_are_grey_or_red_and_the_others_as_they_were():
  image = np.full((8, 8, 3), 40, np.uint8)
  hidden = np.array([False, True, False, False])
  grey, red = pictures.hide(image, hidden), pictures.mark(image, hidden)
  for found in (grey, red):
    changed = np.any(found != 40, axis=-1)
    assert changed[:4, 4:].all() and changed.sum() == 16
  assert np.ptp(grey[:4, 4:].reshape(-1, 3), axis=0).max() == 0
  assert red[0, 7, 0] > red[0, 7, 1] + 50
