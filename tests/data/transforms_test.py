from __future__ import annotations

import dataclasses
import io

import cv2
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from glscl_jax import config as config_lib
from glscl_jax.data import transforms

RAMP_START, RAMP_STEP = 10, 0.5  # first colour; pixels a level of colour

PLAIN = config_lib.AugmentConfig(
  crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), hflip="off"
)


def make_image(height=48, width=48, channels=3, seed=0):
  """Smooth colours with some noise, and no symmetry."""
  rng = np.random.default_rng(seed)
  coarse = rng.integers(20, 230, (5, 5, channels), dtype=np.uint8)
  smooth = cv2.resize(coarse, (width, height)).astype(np.int32)
  noise = rng.integers(-20, 20, smooth.shape)
  return np.clip(smooth + noise, 0, 255).astype(np.uint8)


def encode(image, kind="PNG", **options):
  if isinstance(image, np.ndarray):
    image = Image.fromarray(image)
  file = io.BytesIO()
  image.save(file, kind, **options)
  return file.getvalue()


def augment(image, *, config, caption="a cat", seed=0, size=32):
  return transforms.augment(
    np.random.default_rng(seed), image, caption, size=size, config=config
  )


def apply(name, image, strength, sign=1):
  return transforms.OPS[name](image, strength, sign)


# --- decode ----------------------------------------------------------------


def test_png_decodes_to_the_same_pixels():
  image = make_image(31, 40)
  assert np.array_equal(transforms.decode(encode(image)), image)


def test_jpeg_decodes_in_rgb_order():
  image = np.zeros((32, 32, 3), np.uint8)
  image[:, :] = (200, 100, 30)
  decoded = transforms.decode(encode(image, "JPEG", quality=95))
  assert decoded.shape == image.shape
  assert abs(decoded.astype(int) - image).max() <= 3


def test_jpeg_is_turned_upright():
  image = make_image(16, 32)
  exif = Image.Exif()
  exif[0x0112] = 6  # stored lying on its left side
  decoded = transforms.decode(encode(image, "JPEG", exif=exif, quality=95))
  upright = transforms.decode(encode(image, "JPEG", quality=95))
  assert np.array_equal(decoded, np.rot90(upright, -1))


def test_transparency_is_composited_onto_white():
  image = np.zeros((2, 3, 4), np.uint8)
  image[0] = (200, 100, 0, 255)
  image[1] = (200, 100, 0, 0)
  image[:, 2, 3] = 51  # a fifth
  decoded = transforms.decode(encode(image))
  assert decoded[0, 0].tolist() == [200, 100, 0]
  assert decoded[1, 0].tolist() == [255, 255, 255]
  assert decoded[0, 2].tolist() == [244, 224, 204]


def test_transparent_palette_images_are_composited_onto_white():
  image = Image.new("P", (4, 4))
  image.putpalette([10, 20, 30, 200, 0, 0])
  image.putpixel((0, 0), 1)
  decoded = transforms.decode(encode(image, transparency=0))
  assert decoded[0, 0].tolist() == [200, 0, 0]
  assert decoded[3, 3].tolist() == [255, 255, 255]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_grey_images_become_three_equal_channels(dtype):
  scale = 257 if dtype == np.uint16 else 1
  grey = make_image(8, 9)[:, :, 0]
  decoded = transforms.decode(encode(grey.astype(dtype) * scale))
  assert np.array_equal(decoded, np.repeat(grey[:, :, None], 3, axis=2))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("share", [0.5, 0.97])
def test_a_cut_off_file_is_bad(kind, share):
  whole = encode(make_image(64, 64), kind)
  with pytest.raises(transforms.BadImage):
    transforms.decode(whole[: int(len(whole) * share)])


@pytest.mark.parametrize(
  "data", [b"", b"not an image", b"\xff\xd8\xff\xd9", b"<svg></svg>"]
)
def test_bytes_that_are_no_image_are_bad(data):
  with pytest.raises(transforms.BadImage):
    transforms.decode(data)


# --- resize and crop -------------------------------------------------------


def test_resize_is_antialiased_bicubic_without_keeping_the_aspect():
  image = make_image(40, 60)
  expected = Image.fromarray(image).resize((24, 24), Image.Resampling.BICUBIC)
  assert np.array_equal(transforms.resize(image, size=24), expected)
  # A fine checkerboard becomes grey: without antialiasing it would not.
  board = np.indices((64, 64)).sum(axis=0) % 2 * 255
  board = np.repeat(board[:, :, None], 3, axis=2).astype(np.uint8)
  assert abs(transforms.resize(board, size=16).astype(int) - 127).max() <= 3


@pytest.mark.parametrize("shape", [(40, 60), (70, 50), (100, 400), (20, 300)])
def test_the_fast_resize_is_close_to_the_exact_one(shape):
  image = cv2.GaussianBlur(make_image(*shape), (5, 5), 0)
  fast = transforms.resize_fast(image, size=48).astype(int)
  exact = transforms.resize(image, size=48).astype(int)
  assert fast.shape == exact.shape
  assert abs(fast - exact).mean() < 3


def test_the_fast_resize_does_not_alias_where_it_shrinks_much():
  board = np.indices((64, 64)).sum(0) % 2 * 255
  board = np.repeat(board[:, :, None], 3, axis=2).astype(np.uint8)
  small = transforms.resize_fast(board, size=16)
  assert abs(small.astype(int) - 127).max() <= 3
  # One side shrinks, the other grows.
  stripes = np.zeros((8, 96, 3), np.uint8)
  stripes[:, ::2] = 255
  small = transforms.resize_fast(stripes, size=16)
  assert abs(small.astype(int) - 127).max() <= 3


def test_training_views_are_resized_as_asked():
  image = make_image(48, 48)
  fast = dataclasses.replace(PLAIN, resize="opencv")
  assert np.array_equal(
    augment(image, config=fast), transforms.resize_fast(image, size=32)
  )


def test_resize_to_the_same_size_changes_nothing():
  image = make_image(32, 32)
  assert np.array_equal(transforms.resize(image, size=32), image)


def test_a_crop_of_everything_is_the_evaluation_view():
  image = make_image(48, 48)
  assert np.array_equal(
    augment(image, config=PLAIN), transforms.resize(image, size=32)
  )


def test_crops_have_the_asked_area_and_ratio_and_stay_inside():
  rng = np.random.default_rng(0)
  boxes = np.array(
    [
      transforms.crop_box(rng, 200, 300, scale=(0.3, 0.6), ratio=(3 / 4, 4 / 3))
      for _ in range(2000)
    ]
  )
  top, left, height, width = boxes.T
  assert top.min() >= 0 and left.min() >= 0
  assert (top + height).max() <= 200 and (left + width).max() <= 300
  share = height * width / 60000
  assert 0.29 < share.min() < 0.32 and 0.58 < share.max() < 0.61
  assert share.mean() == pytest.approx(0.45, abs=0.01)
  log_ratio = np.log(width / height)
  assert abs(log_ratio).max() <= np.log(4 / 3) + 0.02
  assert log_ratio.mean() == pytest.approx(0, abs=0.02)
  assert len(set(left.tolist())) > 50 and len(set(top.tolist())) > 50


@pytest.mark.parametrize(
  ("size", "box"),
  [((10, 100), (0, 43, 10, 13)), ((100, 10), (43, 0, 13, 10))],
)
def test_a_box_that_never_fits_falls_back_to_the_centre(size, box):
  found = transforms.crop_box(
    np.random.default_rng(0), *size, scale=(0.9, 1.0), ratio=(3 / 4, 4 / 3)
  )
  assert found == box


def test_an_image_of_one_pixel_can_be_augmented():
  config = config_lib.AugmentConfig(randaugment_ops=3)
  image = np.full((1, 1, 3), 7, np.uint8)
  for seed in range(50):
    view = augment(image, config=config, seed=seed)
    assert view.shape == (32, 32, 3) and view.dtype == np.uint8


# --- flip ------------------------------------------------------------------


@pytest.mark.parametrize(
  ("caption", "guarded"),
  [
    ("a bright red car", True),
    ("copyright and upright", True),
    ("left arrow", False),
    ("Leftwards black arrow", False),
    ("arrow pointing RIGHT", False),
    ("up-right arrow", False),
  ],
)
def test_guarded_flips_refuse_captions_with_a_direction(caption, guarded):
  assert transforms.may_flip(caption, mode="guarded") is guarded
  assert transforms.may_flip(caption, mode="always")
  assert not transforms.may_flip(caption, mode="off")


def test_half_of_the_views_are_mirrored():
  image = make_image(32, 32)
  config = dataclasses.replace(PLAIN, hflip="always")
  views = [augment(image, config=config, seed=s) for s in range(400)]
  same = sum(np.array_equal(v, image) for v in views)
  mirrored = sum(np.array_equal(v, image[:, ::-1]) for v in views)
  assert same + mirrored == 400
  assert 150 < same < 250


# --- RandAugment -----------------------------------------------------------


@pytest.mark.parametrize("name", list(transforms.OPS))
@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_every_operation_keeps_shape_and_input(name, strength):
  image = make_image(21, 33)
  before = image.copy()
  for sign in (-1, 1):
    found = apply(name, image, strength, sign)
    assert found.shape == image.shape and found.dtype == np.uint8
    assert np.array_equal(image, before)


@pytest.mark.parametrize(
  "name",
  [
    "Rotate",
    "Posterize",
    "SolarizeAdd",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
  ],
)
def test_strength_zero_leaves_the_image(name):
  image = make_image()
  assert np.array_equal(apply(name, image, 0.0), image)


@pytest.mark.parametrize(
  "name", ["Color", "Contrast", "Brightness", "Sharpness"]
)
def test_a_factor_of_one_leaves_the_image(name):
  image = make_image()
  assert np.array_equal(apply(name, image, 0.5), image)


def test_solarize_at_strength_zero_inverts_all():
  image = make_image()
  assert np.array_equal(apply("Solarize", image, 0.0), 255 - image)


@pytest.mark.parametrize(
  ("name", "enhance"),
  [
    ("Color", ImageEnhance.Color),
    ("Contrast", ImageEnhance.Contrast),
    ("Brightness", ImageEnhance.Brightness),
    ("Sharpness", ImageEnhance.Sharpness),
  ],
)
@pytest.mark.parametrize("strength", [0.1, 0.3, 0.9])
def test_enhancements_agree_with_pillow(name, enhance, strength):
  image = make_image()
  expected = enhance(Image.fromarray(image)).enhance(0.1 + 1.8 * strength)
  found = apply(name, image, strength).astype(int)
  # Pillow truncates where OpenCV rounds.
  assert abs(found - np.asarray(expected)).max() <= 2


@pytest.mark.parametrize(
  ("name", "operation"),
  [
    ("AutoContrast", ImageOps.autocontrast),
    ("Equalize", ImageOps.equalize),
    ("Posterize", lambda image: ImageOps.posterize(image, 7)),
    ("Solarize", lambda image: ImageOps.solarize(image, 77)),
  ],
)
def test_tables_equal_those_of_pillow(name, operation):
  for seed in range(3):
    image = make_image(seed=seed)
    expected = operation(Image.fromarray(image))
    assert np.array_equal(apply(name, image, 0.3), expected)


@pytest.mark.parametrize("name", ["AutoContrast", "Equalize"])
def test_an_image_of_one_colour_is_left_alone(name):
  image = np.full((20, 20, 3), 90, np.uint8)
  assert np.array_equal(apply(name, image, 0.3), image)


def test_solarize_add_lightens_only_dark_pixels():
  image = np.array([[[0, 127, 128], [50, 200, 255]]], np.uint8)
  expected = [[[33, 160, 128], [83, 200, 255]]]
  assert apply("SolarizeAdd", image, 0.3).tolist() == expected


def test_translations_move_by_100_m_pixels_and_fill_with_white():
  image = make_image()
  expected = np.full_like(image, 255)
  expected[:, :-10] = image[:, 10:]
  assert np.array_equal(apply("TranslateX", image, 0.1, 1), expected)
  expected = np.full_like(image, 255)
  expected[10:] = image[:-10]
  assert np.array_equal(apply("TranslateY", image, 0.1, -1), expected)


def test_shear_moves_each_row_by_its_distance_from_the_top():
  image = make_image()
  found = apply("ShearX", image, 1.0, 1)
  for row in (0, 10, 20, 30):
    shift = 3 * row // 10
    assert np.array_equal(found[row, : 48 - shift], image[row, shift:])
    assert (found[row, 48 - shift :] == 255).all()
  columns = apply("ShearY", image.transpose(1, 0, 2).copy(), 1.0, 1)
  # Up to the rounding of the interpolation.
  distance = columns.transpose(1, 0, 2).astype(int) - found
  assert abs(distance).max() <= 3


def test_rotations_turn_about_the_centre():
  image = make_image(49, 49)
  found = apply("Rotate", image, 1.0, 1)
  assert np.array_equal(found[24, 24], image[24, 24])
  # 30 degrees counter-clockwise: what was right of the centre goes up.
  up, right = round(20 * np.sin(np.pi / 6)), round(20 * np.cos(np.pi / 6))
  near = image[22:27, 42:47].reshape(-1, 3).astype(int)
  distance = abs(near - found[24 - up, 24 + right]).sum(axis=1).min()
  assert distance < 40
  assert (found[0, 0] == 255).all()


def test_opposite_signs_move_in_opposite_directions():
  image = make_image()
  for name in ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY"):
    one, other = apply(name, image, 0.3, 1), apply(name, image, 0.3, -1)
    assert not np.array_equal(one, other)


def test_operations_are_drawn_uniformly_with_replacement(monkeypatch):
  drawn = []

  def record(name):
    def operation(image, strength, sign):
      drawn.append((name, strength, sign))
      return image

    return operation

  monkeypatch.setattr(
    transforms, "OPS", {name: record(name) for name in transforms.OPS}
  )
  rng = np.random.default_rng(0)
  image = make_image()
  for _ in range(700):
    transforms.randaugment(rng, image, num_ops=2, strength=0.3)
  names, strengths, signs = zip(*drawn, strict=True)
  counts = [names.count(name) for name in transforms.OPS]
  # 100 expected each; the standard deviation is 10.
  assert sum(counts) == 1400 and 60 < min(counts) and max(counts) < 140
  assert set(strengths) == {0.3}
  assert 600 < signs.count(1) < 800
  assert any(a == b for a, b in zip(names[::2], names[1::2], strict=True))


def test_without_colour_operations_a_drawing_keeps_its_colours():
  image = np.full((40, 40, 3), 255, np.uint8)
  image[10:30, 10:30] = (220, 20, 40)
  for seed in range(100):
    view = transforms.randaugment(
      np.random.default_rng(seed), image, num_ops=2, strength=0.1, color=False
    )
    # The middle of the square never leaves it: 20 pixels of shift at most.
    red = (abs(view.astype(int) - (220, 20, 40)).max(axis=2) <= 2).sum()
    assert red > 0
    # All pixels lie between the drawing's colour and the white around it.
    share = (255 - view.astype(float)) / (255 - np.array([220, 20, 40]))
    assert np.ptp(share, axis=2).max() < 0.08


def fit_affine(warped_YXC):
  """The (2, 3) map from places of a warped image of ramps to places before.

  With the largest error of a pixel that the white around has not reached.
  """
  side = len(warped_YXC)
  ramps_YX = (warped_YXC[:, :, 2] == 0).astype(np.uint8)
  inner_N = cv2.erode(ramps_YX, np.ones((7, 7))).ravel() > 0
  before_N2 = RAMP_STEP * (warped_YXC.reshape(-1, 3)[inner_N, :2] - RAMP_START)
  y_N, x_N = np.indices((side, side)).reshape(2, -1)[:, inner_N]
  places_N3 = np.column_stack([x_N, y_N, np.ones_like(x_N)])
  map_32 = np.linalg.lstsq(places_N3, before_N2, rcond=None)[0]
  return map_32.T, np.abs(places_N3 @ map_32 - before_N2).max()


def test_warps_are_affine_maps_drawn_from_the_ranges_they_name():
  # Two coordinates are encoded as colours, so that a view tells its map.
  image_YXC = np.zeros((96, 96, 3))
  ramp_A = RAMP_START + np.arange(96) / RAMP_STEP
  image_YXC[:, :, 0], image_YXC[:, :, 1] = ramp_A[None], ramp_A[:, None]
  found = []
  for seed in range(400):
    warped_YXC = transforms.warp(
      np.random.default_rng(seed), image_YXC.astype(np.uint8), strength=1.0
    )
    map_23, error = fit_affine(warped_YXC.astype(np.float64))
    assert error < 1  # pixels
    # turn = zoom [[cos stretch, shear - sin], [sin, cos / stretch]]
    (a, b), (c, d) = map_23[:, :2]
    zoom = np.sqrt(a * d + c**2)
    angle, shear = np.degrees(np.arcsin(c / zoom)), (b + c) / zoom
    stretch = np.log(a / d) / 2
    shift_2 = (map_23 @ [47.5, 47.5, 1.0] - 47.5) / 96
    found.append((angle, zoom, stretch, shear, *shift_2))
  ranges = np.array(
    [(-15, 15), (0.75, 1.05), (-0.2, 0.2), (-0.2, 0.2), *2 * [(-0.075, 0.075)]]
  )
  low, high = np.min(found, axis=0), np.max(found, axis=0)
  slack = 0.03 * np.ptp(ranges, axis=1)
  assert np.all(np.abs(low - ranges[:, 0]) < slack)
  assert np.all(np.abs(high - ranges[:, 1]) < slack)
  # Uniform: means in the middle, deviations of a twelfth of the width squared.
  np.testing.assert_allclose(
    (np.mean(found, axis=0) - ranges.mean(axis=1)) / np.ptp(ranges, axis=1),
    0,
    atol=0.05,
  )
  np.testing.assert_allclose(
    np.std(found, axis=0) / np.ptp(ranges, axis=1), 12**-0.5, atol=0.02
  )


def test_a_warp_of_no_strength_changes_nothing():
  image_YXC = make_image()
  warped_YXC = transforms.warp(
    np.random.default_rng(0), image_YXC, strength=0.0
  )
  np.testing.assert_array_equal(warped_YXC, image_YXC)


def test_warped_views_keep_a_drawing_in_sight():
  image_YXC = np.full((96, 96, 3), 255, np.uint8)
  image_YXC[44:52, 44:52] = 0
  config = dataclasses.replace(PLAIN, warp=1.0)
  for seed in range(50):
    view_YXC = augment(image_YXC, config=config, seed=seed)
    assert view_YXC.shape == (32, 32, 3)
    assert view_YXC.min() < 100


def test_new_colours_keep_shapes_and_colour_the_background_evenly():
  image_YXC = np.full((48, 48, 3), 255, np.uint8)
  image_YXC[10:20, 10:20] = (200, 30, 60)
  config = dataclasses.replace(PLAIN, warp=1.0, recolor=0.25)
  backgrounds, greys = set(), 0
  for seed in range(100):
    colours = np.unique(
      transforms.recolor(
        np.random.default_rng(seed), image_YXC, strength=config.recolor
      ).reshape(-1, 3),
      axis=0,
    )
    assert len(colours) <= 2
    greys += int(np.all(np.ptp(colours.astype(int), axis=1) == 0))
    corners = augment(image_YXC, config=config, seed=seed)[[0, -1], [0, -1]]
    np.testing.assert_array_equal(corners[0], corners[1])
    backgrounds.add(tuple(corners[0]))
  assert len(backgrounds) > 30
  assert 10 <= greys <= 40  # one in five on purpose, some by saturation


def test_the_same_generator_gives_the_same_view():
  config = config_lib.AugmentConfig(randaugment_ops=2, hflip="always")
  image = make_image()
  views = [augment(image, config=config, seed=s) for s in (1, 1, 2)]
  assert np.array_equal(views[0], views[1])
  assert not np.array_equal(views[0], views[2])


def test_a_subset_holds_some_of_the_phrases_of_a_caption_once_each():
  phrases = ["grinning face", "smile", "happy", "joy"]
  caption = "grinning face: smile, happy, joy"
  seen = set()
  for seed in range(200):
    drawn = transforms.phrase_subset(np.random.default_rng(seed), caption)
    parts = drawn.split(", ")
    assert len(parts) == len(set(parts))
    assert set(parts) <= set(phrases)
    seen.add(tuple(parts))
  assert {len(parts) for parts in seen} == {1, 2, 3, 4}
  assert {parts for parts in seen if len(parts) == 1} == {
    (phrase,) for phrase in phrases
  }


@pytest.mark.parametrize("caption", ["grinning face", "", " : ", "red:"])
def test_a_caption_of_one_phrase_stays_as_it_is(caption):
  rng = np.random.default_rng(0)
  assert transforms.phrase_subset(rng, caption) == caption
