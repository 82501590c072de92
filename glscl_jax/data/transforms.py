"""Images and captions: decoding, training-time augmentation, resizing.

Everything works on (rows, columns, 3) uint8 RGB and stays uint8: the device
normalises. Resizing is Pillow's bicubic, which antialiases, unless training
asks for a faster one; OpenCV does the rest, single-threaded because the
pipeline has threads of its own.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable

import cv2
import numpy as np
from PIL import Image, ImageOps

from glscl_jax import config as config_lib
from glscl_jax import errors

cv2.setNumThreads(0)

BACKGROUND = 255  # behind transparent pixels and outside a moved image: white,
# so that drawings keep no visible edge; the published code leaves black

_DIRECTION = re.compile(r"\b(left|right)", re.IGNORECASE)
_JPEG_START, _JPEG_END = b"\xff\xd8", b"\xff\xd9"


class BadImage(errors.UserError):
  """Bytes that are not a whole, readable image; the caller names the record."""


def decode(data: bytes) -> np.ndarray:
  """Decodes PNG, JPEG or whatever Pillow reads into (Y, X, 3) uint8 RGB.

  Transparency is composited onto white, the EXIF orientation is applied.

  Raises:
    BadImage: not an image, or one that is cut off.
  """
  if data.startswith(_JPEG_START) and data.endswith(_JPEG_END):
    # Twice as fast; but it fills a cut-off file with grey, so only whole ones.
    image_YXC = cv2.imdecode(
      np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB
    )
    if image_YXC is not None:
      return image_YXC
  try:
    with Image.open(io.BytesIO(data)) as image:
      image.load()
      return _rgb(ImageOps.exif_transpose(image))
  except Exception as error:  # decoders raise many kinds
    raise BadImage(f"{type(error).__name__}: {error}") from error


def _rgb(image: Image.Image) -> np.ndarray:
  if image.mode == "RGB" and "transparency" not in image.info:
    return np.asarray(image)
  if not image.has_transparency_data:
    if image.mode.startswith("I;16"):  # Pillow would clip, not scale
      grey_YX = (np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8)
      return np.repeat(grey_YX[:, :, None], 3, axis=2)
    return np.asarray(image.convert("RGB"))
  layer = image.convert("RGBA")
  page = Image.new("RGBA", layer.size, (BACKGROUND,) * 3 + (255,))
  return np.asarray(Image.alpha_composite(page, layer).convert("RGB"))


def resize(image_YXC: np.ndarray, *, size: int) -> np.ndarray:
  """Bicubic, antialiased, to (size, size), not keeping the aspect ratio."""
  image = Image.fromarray(np.ascontiguousarray(image_YXC))
  return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))


def resize_fast(image_YXC: np.ndarray, *, size: int) -> np.ndarray:
  """OpenCV's, to (size, size), faster than `resize`.

  Cubic without antialiasing, which sides do not need that hardly shrink; a
  side of more than 1.5 `size` shrinks to means of areas first.
  """
  height, width = (
    size if side > 1.5 * size else side for side in image_YXC.shape[:2]
  )
  if (height, width) != image_YXC.shape[:2]:
    image_YXC = cv2.resize(
      image_YXC, (width, height), interpolation=cv2.INTER_AREA
    )
  return cv2.resize(image_YXC, (size, size), interpolation=cv2.INTER_CUBIC)


RESIZE = {"pillow": resize, "opencv": resize_fast}  # by data.augment.resize


def augment(
  rng: np.random.Generator,
  image_YXC: np.ndarray,
  caption: str,
  *,
  size: int,
  config: config_lib.AugmentConfig,
) -> np.ndarray:
  """The training view of an image: (size, size, 3) uint8.

  RandAugment on the whole image, then a random resized crop, then the flip,
  in the order of the published code; new colours last, so that the background
  changes with the drawing.
  """
  if config.randaugment_ops:
    image_YXC = randaugment(
      rng,
      image_YXC,
      num_ops=config.randaugment_ops,
      strength=config.randaugment_magnitude / 30,
      color=config.color,
    )
  if config.warp:
    image_YXC = warp(rng, image_YXC, strength=config.warp)
  else:
    image_YXC = random_crop(rng, image_YXC, config=config)
  # The coin is drawn in every mode, so that modes share all other draws.
  if rng.random() < 0.5 and may_flip(caption, mode=config.hflip):
    image_YXC = cv2.flip(image_YXC, 1)  # OpenCV reads no negative strides
  image_YXC = RESIZE[config.resize](image_YXC, size=size)
  if config.recolor:
    image_YXC = recolor(rng, image_YXC, strength=config.recolor)
  return image_YXC


def random_crop(
  rng: np.random.Generator,
  image_YXC: np.ndarray,
  *,
  config: config_lib.AugmentConfig,
) -> np.ndarray:
  """A random part of the image, see `crop_box`."""
  top, left, height, width = crop_box(
    rng,
    image_YXC.shape[0],
    image_YXC.shape[1],
    scale=config.crop_scale,
    ratio=config.crop_ratio,
  )
  return image_YXC[top : top + height, left : left + width]


def warp(
  rng: np.random.Generator,
  image_YXC: np.ndarray,
  *,
  strength: float,
) -> np.ndarray:
  """One random affine map; white comes in where the image ends.

  At strength 1: turned by up to 15 degrees, seen through a window of .75 to
  1.05 of its side, stretched by up to e^.2, sheared by up to .2 and moved by
  up to .075 of its side, all uniform.
  """
  height, width = image_YXC.shape[:2]
  angle = math.radians(15 * strength) * rng.uniform(-1, 1)
  zoom = 1 + strength * rng.uniform(-0.25, 0.05)
  stretch = math.exp(0.2 * strength * rng.uniform(-1, 1))
  shear = 0.2 * strength * rng.uniform(-1, 1)
  shift_2 = 0.075 * strength * rng.uniform(-1, 1, size=2)
  turn_22 = zoom * np.array(
    [
      [math.cos(angle) * stretch, shear - math.sin(angle)],
      [math.sin(angle), math.cos(angle) / stretch],
    ]
  )
  centre_2 = np.array([(width - 1) / 2, (height - 1) / 2])
  offset_2 = centre_2 - turn_22 @ centre_2 + shift_2 * (width, height)
  return _warp(image_YXC, np.column_stack([turn_22, offset_2]))


def recolor(
  rng: np.random.Generator, image_YXC: np.ndarray, *, strength: float
) -> np.ndarray:
  """Mixes the three colours at random: drawing styles differ in theirs most.

  Each new channel is a weighted mean of the old ones, weights I + strength
  N(0, 1); one image in five becomes grey. Then contrast times
  e^(1.2 strength N(0, 1)) about the middle and brightness plus .4 strength
  N(0, 1) of the range.
  """
  mix_33 = np.eye(3) + strength * rng.standard_normal((3, 3))
  mix_33 /= np.maximum(mix_33.sum(axis=1, keepdims=True), 0.3)
  if rng.random() < 0.2:
    mix_33 = np.tile(np.array([0.3, 0.59, 0.11]), (3, 1))
  contrast = math.exp(1.2 * strength * rng.standard_normal())
  shift = 255 * (0.5 - 0.5 * contrast + 0.4 * strength * rng.standard_normal())
  matrix_34 = np.column_stack([contrast * mix_33, np.full(3, shift)])
  return cv2.transform(image_YXC, matrix_34)


def phrase_subset(rng: np.random.Generator, caption: str) -> str:
  """Some of a caption's phrases: "a: b, c" may become "c, a".

  Phrases stand between colons and commas. Their number is uniform from 1 to
  all, the order random; a caption of one phrase stays as it is. So a text
  encoder meets each keyword with few others and must learn what it means.
  """
  phrases = [part.strip() for part in re.split(r"[:,]", caption)]
  phrases = [part for part in phrases if part]
  if len(phrases) < 2:
    return caption
  count = int(rng.integers(1, len(phrases) + 1))
  chosen = rng.permutation(len(phrases))[:count]
  return ", ".join(phrases[i] for i in chosen)


def may_flip(caption: str, *, mode: str) -> bool:
  """Whether a picture with this caption may be mirrored.

  "guarded" refuses captions with a word that begins with left or right.
  """
  if mode == "guarded":
    return _DIRECTION.search(caption) is None
  return mode == "always"


def crop_box(
  rng: np.random.Generator,
  height: int,
  width: int,
  *,
  scale: tuple[float, float],
  ratio: tuple[float, float],
) -> tuple[int, int, int, int]:
  """Draws (top, left, height, width) as torchvision's RandomResizedCrop.

  Args:
    rng: generator.
    height: of the image, pixels.
    width: of the image, pixels.
    scale: range of the crop's share of the area, uniform.
    ratio: range of width / height, uniform in the logarithm. After ten boxes
      that do not fit: the largest central crop within this range.
  """
  area = height * width
  low, high = math.log(ratio[0]), math.log(ratio[1])
  for _ in range(10):
    target = area * rng.uniform(*scale)
    aspect = math.exp(rng.uniform(low, high))
    box_width = round(math.sqrt(target * aspect))
    box_height = round(math.sqrt(target / aspect))
    if 0 < box_width <= width and 0 < box_height <= height:
      top = int(rng.integers(height - box_height + 1))
      left = int(rng.integers(width - box_width + 1))
      return top, left, box_height, box_width
  box_width, box_height = width, height
  if width / height < ratio[0]:
    box_height = min(height, max(1, round(width / ratio[0])))
  elif width / height > ratio[1]:
    box_width = min(width, max(1, round(height * ratio[1])))
  return (
    (height - box_height) // 2,
    (width - box_width) // 2,
    box_height,
    box_width,
  )


# --- RandAugment -----------------------------------------------------------


def randaugment(
  rng: np.random.Generator,
  image_YXC: np.ndarray,
  *,
  num_ops: int,
  strength: float,
  color: bool = True,
) -> np.ndarray:
  """Applies `num_ops` operations drawn with replacement, all of one strength.

  Args:
    rng: generator.
    image_YXC: uint8 RGB.
    num_ops: how many.
    strength: m in [0, 1]; what it means is in each operation's docstring. It
      is not "how far from the image": see `solarize` and `change_color`.
    color: False leaves out the operations that change colours.
  """
  names = tuple(OPS) if color else SHAPE_OPS
  for _ in range(num_ops):
    name = names[rng.integers(len(names))]
    sign = 1 if rng.random() < 0.5 else -1  # only shape operations use it
    image_YXC = OPS[name](image_YXC, strength, sign)
  return image_YXC


def auto_contrast(image_YXC, strength, sign):
  """Stretches each channel to 0..255."""
  del strength, sign
  table_AC = np.empty((256, 3), np.uint8)
  level_A = np.arange(256)
  for c in range(3):
    low, high = _bounds(image_YXC[:, :, c])
    scale = 255.0 / (high - low) if high > low else 1.0
    offset = low if high > low else 0
    table_AC[:, c] = np.clip(np.trunc(level_A * scale - offset * scale), 0, 255)
  return cv2.LUT(image_YXC, table_AC[None])


def equalize(image_YXC, strength, sign):
  """Flattens the histogram of each channel."""
  del strength, sign
  table_AC = np.empty((256, 3), np.uint8)
  for c in range(3):
    count_A = np.bincount(image_YXC[:, :, c].ravel(), minlength=256)
    present_M = count_A[count_A > 0]
    step = (count_A.sum() - present_M[-1]) // 255
    if len(present_M) <= 1 or step == 0:
      table_AC[:, c] = np.arange(256)
      continue
    before_A = np.cumsum(count_A) - count_A
    table_AC[:, c] = np.minimum((step // 2 + before_A) // step, 255)
  return cv2.LUT(image_YXC, table_AC[None])


def rotate(image_YXC, strength, sign):
  """By 30 m degrees about the centre."""
  height, width = image_YXC.shape[:2]
  centre = ((width - 1) / 2, (height - 1) / 2)
  return _warp(
    image_YXC, cv2.getRotationMatrix2D(centre, sign * 30 * strength, 1.0)
  )


def posterize(image_YXC, strength, sign):
  """Keeps the highest 8 - floor(4 m) bits."""
  del sign
  dropped = math.floor(4 * strength)
  return image_YXC & np.uint8(0xFF & (0xFF << dropped))


def solarize(image_YXC, strength, sign):
  """Inverts pixels of at least 256 m: m = 0 inverts all."""
  del sign
  level_A = np.arange(256)
  return _table(
    image_YXC, np.where(level_A < 256 * strength, level_A, 255 - level_A)
  )


def solarize_add(image_YXC, strength, sign):
  """Adds 110 m to pixels below 128."""
  del sign
  level_A = np.arange(256)
  added_A = np.minimum(level_A + int(110 * strength), 255)
  return _table(image_YXC, np.where(level_A < 128, added_A, level_A))


def change_color(image_YXC, strength, sign):
  """Saturation times .1 + 1.8 m: m = .5 leaves the image as it is."""
  del sign
  grey_YX = cv2.cvtColor(image_YXC, cv2.COLOR_RGB2GRAY)
  grey_YXC = cv2.cvtColor(grey_YX, cv2.COLOR_GRAY2RGB)
  return _blend(grey_YXC, image_YXC, _factor(strength))


def change_contrast(image_YXC, strength, sign):
  """Distance from the mean grey times .1 + 1.8 m."""
  del sign
  grey_YX = cv2.cvtColor(image_YXC, cv2.COLOR_RGB2GRAY)
  mean = math.floor(cv2.mean(grey_YX)[0] + 0.5)
  return _table(image_YXC, mean + _factor(strength) * (np.arange(256.0) - mean))


def change_brightness(image_YXC, strength, sign):
  """Values times .1 + 1.8 m."""
  del sign
  return _table(image_YXC, _factor(strength) * np.arange(256.0))


def change_sharpness(image_YXC, strength, sign):
  """Distance from the smoothed image times .1 + 1.8 m; the rim stays."""
  del sign
  kernel_33 = np.ones((3, 3), np.float32) / 13
  kernel_33[1, 1] = 5 / 13
  smooth_YXC = image_YXC.copy()
  smooth_YXC[1:-1, 1:-1] = cv2.filter2D(image_YXC, -1, kernel_33)[1:-1, 1:-1]
  return _blend(smooth_YXC, image_YXC, _factor(strength))


def shear_x(image_YXC, strength, sign):
  """Rows move by .3 m of their distance from the top."""
  slope = sign * 0.3 * strength
  return _warp(image_YXC, np.array([[1, slope, 0], [0, 1, 0]]))


def shear_y(image_YXC, strength, sign):
  """Columns move by .3 m of their distance from the left."""
  slope = sign * 0.3 * strength
  return _warp(image_YXC, np.array([[1, 0, 0], [slope, 1, 0]]))


def translate_x(image_YXC, strength, sign):
  """By 100 m pixels of the image as it is read, along the rows."""
  shift = sign * 100 * strength
  return _warp(image_YXC, np.array([[1, 0, shift], [0, 1, 0]]))


def translate_y(image_YXC, strength, sign):
  """By 100 m pixels of the image as it is read, along the columns."""
  shift = sign * 100 * strength
  return _warp(image_YXC, np.array([[1, 0, 0], [0, 1, shift]]))


SHAPE_OPS = (
  "Rotate",
  "Sharpness",
  "ShearX",
  "ShearY",
  "TranslateX",
  "TranslateY",
)
OPS: dict[str, Callable[[np.ndarray, float, int], np.ndarray]] = {
  "AutoContrast": auto_contrast,
  "Equalize": equalize,
  "Rotate": rotate,
  "Posterize": posterize,
  "Solarize": solarize,
  "SolarizeAdd": solarize_add,
  "Color": change_color,
  "Contrast": change_contrast,
  "Brightness": change_brightness,
  "Sharpness": change_sharpness,
  "ShearX": shear_x,
  "ShearY": shear_y,
  "TranslateX": translate_x,
  "TranslateY": translate_y,
}


def _factor(strength: float) -> float:
  return 0.1 + 1.8 * strength


def _bounds(channel_YX: np.ndarray) -> tuple[int, int]:
  return int(channel_YX.min()), int(channel_YX.max())


def _table(image_YXC: np.ndarray, table_A: np.ndarray) -> np.ndarray:
  return cv2.LUT(image_YXC, np.clip(table_A, 0, 255).astype(np.uint8))


def _blend(
  from_YXC: np.ndarray, to_YXC: np.ndarray, factor: float
) -> np.ndarray:
  return cv2.addWeighted(to_YXC, factor, from_YXC, 1 - factor, 0)


def _warp(image_YXC: np.ndarray, matrix_23: np.ndarray) -> np.ndarray:
  """`matrix_23` sends output pixels to input pixels; linear interpolation."""
  return cv2.warpAffine(
    image_YXC,
    np.asarray(matrix_23, np.float64),
    (image_YXC.shape[1], image_YXC.shape[0]),
    flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
    borderMode=cv2.BORDER_CONSTANT,
    borderValue=(BACKGROUND,) * 3,
  )
