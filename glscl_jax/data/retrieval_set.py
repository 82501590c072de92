"""A split as retrieval sees it: unique images, unique captions, who fits whom.

Records of one image (equal `image_id`) are one image; captions of equal text
are one caption, even when they come from different images, because no score
could tell them apart. So an image may have several captions and a caption
several images. Pictures stay encoded until `image_batches` decodes each once.

Shape letters beside those of types.py: U images of the split, Z captions.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
from collections.abc import Iterator
from typing import Literal

import numpy as np

from glscl_jax import config as config_lib
from glscl_jax import errors
from glscl_jax.data import masking, sources, transforms
from glscl_jax.data import regions as regions_lib
from glscl_jax.types import Visual

CaptionChoice = Literal["first", "all"]


class RetrievalSetError(errors.UserError):
  """A split that cannot be evaluated; the message names it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RetrievalSet:
  """What a split asks, without pixels."""

  source: sources.Source
  split: str
  record_U: np.ndarray  # record whose picture stands for the image
  image_names: tuple[str, ...]  # id of that record
  captions: tuple[str, ...]
  fits: np.ndarray  # (pairs, 2): an image and a caption that fits it
  bad: tuple[str, ...] = ()  # "id: reason" of each record left out

  @property
  def num_images(self) -> int:
    """U."""
    return len(self.image_names)

  @property
  def num_captions(self) -> int:
    """Z."""
    return len(self.captions)

  @functools.cached_property
  def relevant_UZ(self) -> np.ndarray:
    """True where the caption fits the image; a bank of queries needs none."""
    relevant_UZ = np.zeros((self.num_images, self.num_captions), bool)
    relevant_UZ[tuple(self.fits.T)] = True
    return relevant_UZ


@dataclasses.dataclass(frozen=True, kw_only=True)
class ImageBatch:
  """Consecutive images; rows that are not `ok` are zero and count not."""

  visual: Visual  # pixels, or regions with their validity
  ok_B: np.ndarray  # bool; False for padding and undecodable pictures
  start: int  # index in the set of row 0
  bad: tuple[str, ...]  # "id: reason"


def read(
  data_dir: str,
  split: str,
  *,
  captions: CaptionChoice = "first",
  limit: int = 0,
) -> RetrievalSet:
  """Reads the ids and captions of a split; decodes nothing.

  Args:
    data_dir: a directory made by launch/prepare.py.
    split: one of its splits.
    captions: "first" takes the first caption of each record (for the emoji
      data the name alone), "all" takes every caption.
    limit: how many images, from the first stored on; 0: all of them.

  Raises:
    RetrievalSetError: nothing is left of the split, or `captions` is unknown.
  """
  if captions not in ("first", "all"):
    raise RetrievalSetError(f"captions={captions!r} is not 'first' or 'all'")
  source = sources.open_source(data_dir, split)
  images: dict[int, int] = {}  # image id -> row
  texts: dict[str, int] = {}  # caption -> column
  records, names, bad, pairs = [], [], [], []
  for record in range(len(source)):
    example = source[record]
    found = [text.strip() for text in example.captions if text.strip()]
    if not found:
      bad.append(f"{example.id}: no caption")
      continue
    if example.image_id not in images:
      if len(images) == limit > 0:
        continue
      images[example.image_id] = len(images)
      records.append(record)
      names.append(example.id)
    row = images[example.image_id]
    for text in found[:1] if captions == "first" else found:
      pairs.append((row, texts.setdefault(text, len(texts))))
  if not pairs:
    raise RetrievalSetError(
      f"{data_dir}, split {split!r}: none of {len(source)} records has a "
      "caption"
    )
  return RetrievalSet(
    source=source,
    split=split,
    record_U=np.array(records, np.int64),
    image_names=tuple(names),
    captions=tuple(texts),
    fits=np.array(pairs),
    bad=tuple(bad),
  )


def image_batches(
  retrieval_set: RetrievalSet,
  *,
  batch_size: int,
  image_size: int,
  num_threads: int = 2,
  num_regions: int | None = None,
  view: int = 0,
  augment: config_lib.AugmentConfig | None = None,
) -> Iterator[ImageBatch]:
  """Decodes every image once, `batch_size` at a time, the last one padded.

  With `num_regions`, the first so many regions of each image stand for it.
  View 0 is the whole image, resized; each other number is a random view of it
  by `augment`, which it needs, the same in every call.
  """
  total = retrieval_set.num_images
  with concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
    for start in range(0, total, batch_size):
      rows = range(start, min(start + batch_size, total))
      if num_regions is None:
        load = functools.partial(
          _load, retrieval_set, size=image_size, view=view, augment=augment
        )
        empty = {"image_BYXC": np.zeros((image_size, image_size, 3), np.uint8)}
      else:
        load = functools.partial(
          _load_regions, retrieval_set, number=num_regions
        )
        empty = {k: np.zeros_like(a) for k, a in load(start).items()}
      found, bad = list(pool.map(load, rows)), []
      for row, item in zip(rows, found, strict=True):
        if isinstance(item, str):
          bad.append(f"{retrieval_set.image_names[row]}: {item}")
      found += ["padding"] * (batch_size - len(found))
      ok_B = np.array([not isinstance(item, str) for item in found])
      shown = [empty if isinstance(item, str) else item for item in found]
      yield ImageBatch(
        visual=Visual(
          **{name: np.stack([item[name] for item in shown]) for name in empty}
        ),
        ok_B=ok_B,
        start=start,
        bad=tuple(bad),
      )


def _load_regions(
  retrieval_set: RetrievalSet, row: int, *, number: int
) -> dict[str, np.ndarray]:
  """The regions that stand for an image, as in Visual."""
  example = retrieval_set.source[int(retrieval_set.record_U[row])]
  arrays = regions_lib.pad(example.regions, number=number)
  names = {field.name for field in dataclasses.fields(Visual)}
  return {name: a for name, a in arrays.items() if name in names}


def _load(
  retrieval_set: RetrievalSet,
  row: int,
  *,
  size: int,
  view: int,
  augment: config_lib.AugmentConfig | None,
) -> dict[str, np.ndarray] | str:
  """The picture, or why there is none."""
  encoded = retrieval_set.source[int(retrieval_set.record_U[row])].image
  if encoded is None:
    raise RetrievalSetError(
      f"split {retrieval_set.split!r}: regions without images, which "
      "the system cannot read"
    )
  try:
    image_YXC = transforms.decode(encoded)
  except transforms.BadImage as error:
    return str(error)
  if view == 0:
    return {"image_BYXC": transforms.resize(image_YXC, size=size)}
  rng = masking.sample_rng(0, 0, row, f"view {view}")
  image_YXC = transforms.augment(rng, image_YXC, "", size=size, config=augment)
  return {"image_BYXC": image_YXC}


def keep_images(
  retrieval_set: RetrievalSet, ok_U: np.ndarray, bad: tuple[str, ...]
) -> RetrievalSet:
  """Leaves out images that could not be decoded, and captions left alone.

  Raises:
    RetrievalSetError: no image is left.
  """
  if not ok_U.any():
    raise RetrievalSetError(
      f"split {retrieval_set.split!r}: none of its {len(ok_U)} images can be "
      f"decoded, first: {bad[0]}"
    )
  image, caption = retrieval_set.fits[ok_U[retrieval_set.fits[:, 0]]].T
  ok_Z = np.zeros(retrieval_set.num_captions, bool)
  ok_Z[caption] = True
  new_row_U, new_row_Z = np.cumsum(ok_U) - 1, np.cumsum(ok_Z) - 1
  return dataclasses.replace(
    retrieval_set,
    record_U=retrieval_set.record_U[ok_U],
    image_names=_where(retrieval_set.image_names, ok_U),
    captions=_where(retrieval_set.captions, ok_Z),
    fits=np.stack([new_row_U[image], new_row_Z[caption]], axis=1),
    bad=retrieval_set.bad + bad,
  )


def _where(items: tuple[str, ...], ok_A: np.ndarray) -> tuple[str, ...]:
  return tuple(item for item, ok in zip(items, ok_A, strict=True) if ok)
