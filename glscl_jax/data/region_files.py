"""Regions as detectors wrote them, image by image; nothing is held in memory.

Two formats, with the same features of 2048 values in use everywhere:

  TSV of bottom-up-attention, a line an image. Without a line of names its
  columns are image_id, image_w, image_h, num_boxes, boxes, features; dumps of
  LXMERT have img_id, img_h, img_w, objects_id, objects_conf, attrs_id,
  attrs_conf, num_boxes, boxes, features. Arrays are base64: boxes in pixels
  and features float32, objects_id int64 from 0, without the background.
  A folder of NPZ, as UNITER's, a file an image: norm_bb (K, 6 or 7) of the
  image's size, features, conf (K,), soft_labels (K, 1 + classes) of which the
  first is the background.

The caller counts and names what cannot be read.
"""

from __future__ import annotations

import abc
import base64
import hashlib
import os
import pathlib
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from absl import logging

from glscl_jax.data import ingest, pairs, progress
from glscl_jax.data import regions as regions_lib

_COLUMNS = (
  ("image_id", "image_w", "image_h", "num_boxes", "boxes", "features"),
  (
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
  ),
)
_UNREADABLE = (
  OSError,
  ValueError,
  TypeError,
  EOFError,
  zipfile.BadZipFile,
  zlib.error,
)
_ARRAYS = ("norm_bb", "features", "conf", "soft_labels")
_NEEDED = frozenset(_COLUMNS[0])
_SHORT = {"img_id": "image_id", "img_w": "image_w", "img_h": "image_h"}


class BadRegions(ValueError):
  """Regions of one image that cannot be used; the caller names the image."""


class Reader(abc.ABC):
  """The regions of many images, by the image's id."""

  path: pathlib.Path

  def __init__(self, path: pathlib.Path, num_classes: int):
    self.path, self._num_classes = path, num_classes

  @abc.abstractmethod
  def fingerprint(self, images: Iterable[str]) -> str:
    """A hash of names, sizes and times of the files that hold `images`."""

  @abc.abstractmethod
  def _read(self, image: str) -> regions_lib.Regions:
    """All regions of an image; may raise BadRegions."""

  def read(
    self, image: str, *, width: int | None = None
  ) -> regions_lib.Regions:
    """The confident regions of an image.

    Args:
      image: its id.
      width: of a feature; None: any.

    Raises:
      BadRegions: there are none, or they cannot be used.
    """
    found = self._read(image)
    asked = found.feature_RP.shape[-1] if width is None else width
    fault = regions_lib.find_fault(
      found, width=asked, num_classes=self._num_classes
    )
    if fault:
      raise BadRegions(fault)
    return regions_lib.keep_confident(found)


def open_reader(path: str | os.PathLike[str], *, num_classes: int) -> Reader:
  """Opens a .tsv file or a folder of .npz files.

  Raises:
    DataError: neither.
  """
  path = pathlib.Path(path)
  if path.is_dir():
    return _Folder(path, num_classes)
  if path.suffix == ".tsv" and path.is_file():
    return _Table(path, num_classes)
  raise pairs.DataError(
    f"--features={path}: expected a .tsv file of bottom-up-attention or a "
    "folder of .npz files"
  )


def find_width(reader: Reader, images: Iterable[str]) -> int:
  """How many values a feature has: of the first image that can be read.

  Raises:
    DataError: none can.
  """
  first = ""
  for image in images:
    try:
      return reader.read(image).feature_RP.shape[1]
    except BadRegions as error:
      first = first or f"{image}: {error}"
  raise pairs.DataError(
    f"{reader.path}: no image of the captions has regions; the first, {first}"
  )


def read_records(
  lines: Sequence[ingest.Line],
  reader: Reader,
  *,
  split: str,
  width: int,
  rejects: list[ingest.Reject],
) -> Iterator[pairs.Record]:
  """Yields one split's captions with their regions; appends to `rejects`."""
  chosen = [line for line in lines if line.split == split]
  for line in progress.bar(chosen, name=f"read {split}", total=len(chosen)):
    try:
      regions = reader.read(line.image, width=width)
    except BadRegions as error:
      reason = f"regions of image {line.image}: {error}"
      rejects.append(ingest.Reject(line=line.number, id=line.id, reason=reason))
      continue
    yield pairs.Record(
      id=line.id, split=split, captions=line.captions, regions=regions
    )


class _Folder(Reader):
  def fingerprint(self, images: Iterable[str]) -> str:
    total = hashlib.sha256()
    for image in sorted(set(images)):
      total.update(f"{image}\0{_seen(self._file(image))}\n".encode())
    return total.hexdigest()

  def _file(self, image: str) -> pathlib.Path:
    return self.path / (image if image.endswith(".npz") else f"{image}.npz")

  def _read(self, image: str) -> regions_lib.Regions:
    path = self._file(image)
    if not path.is_file():
      raise BadRegions(f"no file {path}")
    try:
      # Opened here: of a damaged file the library leaves its own open.
      with open(path, "rb") as file, np.load(file) as arrays:
        found = {name: arrays[name] for name in _ARRAYS if name in arrays}
    # The libraries raise many kinds.
    except _UNREADABLE as e:
      raise BadRegions(f"{path} is not readable ({e})") from e
    if missing := [name for name in _ARRAYS if name not in found]:
      raise BadRegions(f"{path} has no {', '.join(missing)}")
    for name, array in found.items():
      if array.dtype.kind not in "biuf":
        raise BadRegions(f"{path}, {name}: {array.dtype} are no numbers")
      asked = 1 if name == "conf" else 2
      if array.ndim != asked:
        raise BadRegions(
          f"{path}, {name}: {array.ndim} dimensions, expected {asked}"
        )
    shape, columns = found["soft_labels"].shape, self._num_classes + 1
    if shape[1] != columns:
      raise BadRegions(
        f"{path}, soft_labels: shape {shape}, expected {columns} columns, the "
        "background and those of --classes"
      )
    # The likeliest class would be the first that is no number.
    if not np.isfinite(found["soft_labels"]).all():
      raise BadRegions(f"{path}, soft_labels: not finite")
    shape = found["norm_bb"].shape
    if shape[1] not in (4, 6, 7):
      raise BadRegions(f"{path}, norm_bb: shape {shape}")
    return regions_lib.Regions(
      feature_RP=_half(found["features"]),
      box_R4=found["norm_bb"][:, :4].astype(np.float32),
      # Over all classes but the background, the last one too.
      class_R=1 + found["soft_labels"][:, 1:].argmax(axis=1).astype(np.int32),
      confidence_R=found["conf"].astype(np.float32),
    )


class _Table(Reader):
  def __init__(self, path: pathlib.Path, num_classes: int):
    super().__init__(path, num_classes)
    self._columns: dict[str, int] = {}
    self._starts: dict[str, int] = {}  # of each image's line, in bytes

  def fingerprint(self, images: Iterable[str]) -> str:
    del images  # one file holds them all
    seen = f"{self.path.name}\0{_seen(self.path)}"
    return hashlib.sha256(seen.encode()).hexdigest()

  def _index(self) -> None:
    """Finds the line of each image in one pass over the file."""
    repeated, start = 0, 0
    with open(self.path, "rb") as file:
      self._columns, named = _columns_of(file.readline(), self.path)
      place = self._columns["image_id"]
      file.seek(0)
      for line in progress.bar(file, name=f"index {self.path.name}"):
        if (start or not named) and line.strip():
          cells = line.split(b"\t", place + 1)
          cell = cells[min(place, len(cells) - 1)].rstrip(b"\r\n")
          image = cell.decode(errors="replace")
          repeated += image in self._starts
          self._starts.setdefault(image, start)
        start += len(line)
    if repeated:
      logging.info("%s: %d lines repeat an image", self.path, repeated)
    if "objects_id" not in self._columns:
      logging.warning(
        "%s has no column objects_id: its regions have no class, and no word "
        "names one",
        self.path,
      )

  def _read(self, image: str) -> regions_lib.Regions:
    if not self._columns:
      self._index()
    if image not in self._starts:
      raise BadRegions(f"no line of {self.path}")
    with open(self.path, "rb") as file:
      file.seek(self._starts[image])
      cells = file.readline().rstrip(b"\r\n").split(b"\t")
    if len(cells) != len(self._columns):
      raise BadRegions(
        f"{len(cells)} columns, the file has {len(self._columns)}"
      )
    return _regions_of(
      {name: cells[place] for name, place in self._columns.items()}
    )


def _columns_of(line: bytes, path: pathlib.Path) -> tuple[dict[str, int], bool]:
  """Which column holds what, and whether the line says so itself.

  Raises:
    DataError: neither a line of names nor one of the known layouts.
  """
  cells = line.rstrip(b"\r\n").split(b"\t")
  named = b"boxes" in cells and b"features" in cells
  if named:
    names: Sequence[str] = [cell.decode(errors="replace") for cell in cells]
  else:
    names = next((n for n in _COLUMNS if len(n) == len(cells)), ())
  places = {_SHORT.get(name, name): i for i, name in enumerate(names)}
  if not _NEEDED <= places.keys():
    known = " or ".join(", ".join(names) for names in _COLUMNS)
    raise pairs.DataError(
      f"{path}: {len(cells)} columns; expected those of bottom-up-attention, "
      f"{known}, or a first line that names them"
    )
  return places, named


def _regions_of(cells: Mapping[str, bytes]) -> regions_lib.Regions:
  try:
    width, height, count = (
      int(cells[name]) for name in ("image_w", "image_h", "num_boxes")
    )
  except ValueError as error:
    raise BadRegions(f"image_w, image_h, num_boxes: {error}") from error
  if min(width, height, count) < 1:
    raise BadRegions(f"{count} boxes in {width} x {height} pixels")
  box_RA = _array(cells, "boxes", np.float32, count)
  if box_RA.shape[1] != 4:
    raise BadRegions(f"boxes: {box_RA.size} values for {count} boxes")
  feature_RP = _array(cells, "features", np.float32, count)
  class_R = np.zeros(count, np.int32)
  confidence_R = np.ones(count, np.float32)
  if "objects_id" in cells:
    # From 0 and without the background, which is our 0.
    class_R = 1 + _array(cells, "objects_id", np.int64, count, flat=True)
  if "objects_conf" in cells:
    confidence_R = _array(cells, "objects_conf", np.float32, count, flat=True)
  size_4 = np.array([width, height, width, height], np.float32)
  return regions_lib.Regions(
    feature_RP=_half(feature_RP),
    box_R4=box_RA / size_4,
    class_R=class_R.astype(np.int32),
    confidence_R=confidence_R,
  )


def _array(
  cells: Mapping[str, bytes],
  name: str,
  dtype: type,
  count: int,
  *,
  flat: bool = False,
) -> np.ndarray:
  """A cell's values, a row a box; flat: one value a box.

  Raises:
    BadRegions: not base64, or not as many values as boxes ask for.
  """
  try:
    data = base64.b64decode(cells[name], validate=True)
    values_A = np.frombuffer(data, np.dtype(dtype).newbyteorder("<"))
  except ValueError as error:
    raise BadRegions(f"{name}: {error}") from error
  if (
    not values_A.size
    or values_A.size % count
    or (flat and values_A.size != count)
  ):
    raise BadRegions(f"{name}: {values_A.size} values for {count} boxes")
  values_A = values_A.astype(dtype)
  return values_A if flat else values_A.reshape(count, -1)


def _half(feature_RP: np.ndarray) -> np.ndarray:
  """As they are stored; what is too large is not finite, which is a fault."""
  with np.errstate(over="ignore"):
    return feature_RP.astype(np.float16)


def _seen(path: pathlib.Path) -> str:
  """Size and time of a file, or that there is none."""
  try:
    stat = path.stat()
  except OSError:
    return "missing"
  return f"{stat.st_size}\0{stat.st_mtime_ns}"
