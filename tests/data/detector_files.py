"""Files as detectors write them, of small features: TSV rows and NPZ."""

from __future__ import annotations

import base64
import csv
import dataclasses

import numpy as np

from tests.data import tiny_regions

CLASSES = tiny_regions.CLASSES
OLD = ("image_id", "image_w", "image_h", "num_boxes", "boxes", "features")
NEW = (
  "img_id",
  "img_h",
  "img_w",
  "objects_id",
  "objects_conf",
  "attrs_id",
  "attrs_conf",
  "num_boxes",
  "boxes",
  "features",
)


@dataclasses.dataclass(frozen=True)
class Detections:
  """What a detector says of one image; classes from 0."""

  boxes: np.ndarray  # pixels
  features: np.ndarray
  objects: np.ndarray
  confidence: np.ndarray
  width: int = 200
  height: int = 100


def make(seed, *, count=12, width=tiny_regions.WIDTH):
  rng = np.random.default_rng(seed)
  corner = rng.random((count, 2)) * (100, 50)
  boxes = np.concatenate([corner, corner + rng.random((count, 2)) * 50], 1)
  return Detections(
    boxes=boxes.astype(np.float32),
    features=rng.random((count, width)).astype(np.float32),
    objects=rng.integers(0, len(CLASSES), count),
    confidence=rng.permutation(np.linspace(0.25, 0.95, count)),
  )


def _cell(array, dtype):
  return base64.b64encode(np.ascontiguousarray(array, dtype)).decode()


def row_of(image, found):
  """The cells of a line, by the names of both layouts."""
  count = len(found.boxes)
  row = {
    "num_boxes": count,
    "boxes": _cell(found.boxes, np.float32),
    "features": _cell(found.features, np.float32),
    "objects_id": _cell(found.objects, np.int64),
    "objects_conf": _cell(found.confidence, np.float32),
    "attrs_id": _cell(np.zeros(count), np.int64),
    "attrs_conf": _cell(np.zeros(count), np.float32),
  }
  for names in (
    ("image_id", "image_w", "image_h"),
    ("img_id", "img_w", "img_h"),
  ):
    row |= dict(zip(names, (image, found.width, found.height), strict=True))
  return row


def write_tsv(path, rows, *, columns=NEW, header=False):
  """As `tools/generate_tsv.py` of bottom-up-attention writes it."""
  with open(path, "w", newline="") as file:
    writer = csv.DictWriter(
      file, delimiter="\t", fieldnames=columns, extrasaction="ignore"
    )
    if header:
      writer.writeheader()
    writer.writerows(rows)
  return path


def write_npz(path, found, **changes):
  """As UNITER's files are: float16, boxes with width and height."""
  size = np.array([found.width, found.height] * 2)
  box = found.boxes / size
  soft = np.full((len(box), 1 + len(CLASSES)), 0.01)
  soft[:, 0] = 0.9  # the background is never the class
  soft[np.arange(len(box)), 1 + found.objects] = 0.5
  arrays = {
    "norm_bb": np.concatenate([box, box[:, 2:] - box[:, :2]], axis=1),
    "features": found.features,
    "conf": found.confidence,
    "soft_labels": soft,
  }
  arrays = {name: a.astype(np.float16) for name, a in arrays.items()}
  arrays |= changes
  np.savez_compressed(
    path, **{k: a for k, a in arrays.items() if a is not None}
  )
  return path
