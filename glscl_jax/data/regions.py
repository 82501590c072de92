"""Regions of an image: boxes with a feature, a class and a confidence each.

Any detector's table, exact boxes, or drawings composed into scenes: the
schema is all that the rest knows (CMAL, 2410.12595; cmal@ef02306). Kept by
`pairs.py` beside or instead of an image, padded here for batches.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping

import numpy as np

CLASSES = "region_classes.txt"  # in the data directory: line n names class n
MIN_CONFIDENCE = 0.2  # of a box that is kept [code]
NUM_KEPT = 10, 100  # at least and at most, where there are as many [code]
_OUTSIDE = 0.01  # of an image: what pixels and float16 round


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Regions:
  """What is known of one image's regions, at least one."""

  feature_RP: np.ndarray  # float16
  box_R4: np.ndarray  # float32; x1, y1, x2, y2, of the image's size
  class_R: np.ndarray  # int32; a line of region_classes.txt, 0: unknown
  confidence_R: np.ndarray  # float32, of 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schema:
  """What the regions of a data directory have in common."""

  width: int  # P, of a feature
  classes: tuple[str, ...]  # lines of region_classes.txt
  images: bool  # whether the images are there too

  def describe(self) -> dict[str, object]:
    """What the manifest says of it."""
    return {
      "feature_width": self.width,
      "num_classes": len(self.classes),
      "classes_sha256": hashlib.sha256(self.text().encode()).hexdigest(),
      "images": self.images,
    }

  def text(self) -> str:
    """The content of region_classes.txt."""
    return "".join(f"{line}\n" for line in self.classes)


def find_fault(regions: Regions, *, width: int, num_classes: int) -> str:
  """Why the arrays cannot be used; empty when they can."""
  count = len(regions.box_R4)
  if not count:
    return "no region"
  shapes = {
    "features": (regions.feature_RP, (count, width)),
    "boxes": (regions.box_R4, (count, 4)),
    "classes": (regions.class_R, (count,)),
    "confidence": (regions.confidence_R, (count,)),
  }
  for name, (array, shape) in shapes.items():
    if array.shape != shape:
      return f"{name}: shape {array.shape}, expected {shape}"
    if not np.isfinite(array).all():
      return f"{name}: not finite"
  box_R4 = regions.box_R4
  if (box_R4[:, 2:] < box_R4[:, :2]).any():
    return "boxes: one ends before it begins; expected x1, y1, x2, y2"
  if box_R4.min() < -_OUTSIDE or box_R4.max() > 1 + _OUTSIDE:
    return (
      f"boxes: from {box_R4.min():g} to {box_R4.max():g} of the image's size"
    )
  if regions.class_R.min() < 0 or regions.class_R.max() > num_classes:
    return (
      f"classes: from {regions.class_R.min()} to {regions.class_R.max()}, but "
      f"the list has {num_classes}"
    )
  return ""


def keep_confident(regions: Regions) -> Regions:
  """The boxes above MIN_CONFIDENCE, their number clamped to NUM_KEPT.

  Highest confidence first; of equal ones, the earlier first.
  """
  low, high = NUM_KEPT
  confident = int((regions.confidence_R > MIN_CONFIDENCE).sum())
  order_R = np.argsort(-regions.confidence_R, kind="stable")
  chosen_J = order_R[: min(max(confident, low), high)]
  return Regions(
    feature_RP=regions.feature_RP[chosen_J],
    box_R4=np.clip(regions.box_R4[chosen_J], 0.0, 1.0),
    class_R=regions.class_R[chosen_J],
    confidence_R=regions.confidence_R[chosen_J],
  )


def to_row(regions: Regions) -> dict[str, np.ndarray]:
  """As they are stored."""
  return {
    "features": regions.feature_RP,
    "boxes": regions.box_R4,
    "classes": regions.class_R,
    "confidence": regions.confidence_R,
  }


def from_row(row: Mapping[str, np.ndarray]) -> Regions:
  """What `to_row` gave."""
  return Regions(
    feature_RP=row["features"],
    box_R4=row["boxes"],
    class_R=row["classes"],
    confidence_R=row["confidence"],
  )


def digest(regions: Regions) -> bytes:
  """A hash of all arrays, the same on every machine."""
  total = hashlib.sha256()
  for name, array in to_row(regions).items():
    little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    total.update(json.dumps([name, little.dtype.str, array.shape]).encode())
    total.update(little.tobytes())
  return total.digest()


def aliases(line: str) -> tuple[str, ...]:
  """The names that a line of region_classes.txt gives its class."""
  return tuple(filter(None, map(str.strip, line.split(","))))


def add_sizes(box_R4: np.ndarray) -> np.ndarray:
  """x1, y1, x2, y2, w, h, w h of each box, float32."""
  box_R4 = box_R4.astype(np.float32)
  size_R2 = box_R4[:, 2:] - box_R4[:, :2]
  area_R1 = size_R2[:, :1] * size_R2[:, 1:]
  return np.concatenate([box_R4, size_R2, area_R1], axis=1)


def pad(regions: Regions, *, number: int) -> dict[str, np.ndarray]:
  """The first `number` regions, with empty slots after them, as in Batch."""
  used = min(len(regions.box_R4), number)

  def fill(array: np.ndarray, dtype: type) -> np.ndarray:
    padded = np.zeros((number, *array.shape[1:]), dtype)
    padded[:used] = array[:used]
    return padded

  return {
    "region_BRP": fill(regions.feature_RP, np.float32),
    "box_BR7": fill(add_sizes(regions.box_R4), np.float32),
    "region_valid_BR": np.arange(number) < used,
    "region_class_BR": fill(regions.class_R, np.int32),
  }


def read_classes(text: str) -> tuple[str, ...]:
  """The lines of a list of classes, a class a line.

  Raises:
    ValueError: no line, or one without a name.
  """
  lines = tuple(map(str.strip, text.rstrip().split("\n")))
  for number, line in enumerate(lines, start=1):
    if not aliases(line):
      raise ValueError(f"line {number} names no class")
  return lines
