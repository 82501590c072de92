"""Pictures of several drawings, whose regions are known exactly.

What CMAL needs without a detector: each scene shows two to five drawings of a
prepared emoji directory side by side on white. A region is a drawing: its
exact box, as its feature what a trained image encoder says of the cut-out, and
as its class the drawing's name. Captions name some of the drawings.

A scene mixes drawings of one split, so what is held out stays held out.
Everything but the features depends on the seed and the drawings alone.
"""

from __future__ import annotations

import collections
import dataclasses
import io
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from PIL import Image

from glscl_jax.data import masking, pairs, progress, sources, transforms
from glscl_jax.data import regions as regions_lib

RULES = 1  # raised when pictures or captions change: older data are made again
NUM_DRAWINGS = 2, 5  # of a scene, at least and at most
NUM_CAPTIONS = 2  # of a scene
_NAMED = 2, 3  # things that a caption names, at least and at most
_SIDES = 0.22, 0.48  # of a drawing's longer side, of the scene's
_TWICE = 0.3  # probability that two drawings show the same
_PLACES = 40  # tried before a drawing gets smaller
_BRIGHT = 247  # of 255; from here on a pixel is background
_CHUNK = 64  # scenes whose cut-outs are encoded together
_NAME = re.compile(r"[A-Za-z]+(?:[ -][A-Za-z]+)*", re.ASCII)
_MAX_WORDS = 3  # of a name: as many as anchors.py looks for, marks too

_IRREGULAR = {
  "man": "men",
  "woman": "women",
  "child": "children",
  "person": "people",
  "foot": "feet",
  "tooth": "teeth",
  "mouse": "mice",
  "goose": "geese",
}
_VES = frozenset("calf elf half knife leaf life loaf scarf shelf wolf".split())
_NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoder:
  """A trained image encoder, frozen."""

  encode: Callable[[np.ndarray], np.ndarray]  # (B, Y, X, 3) uint8 -> (B, P)
  size: int  # pixels of a side of the images it takes
  width: int  # P
  sha256: str  # of its weights
  about: Mapping[str, Any]  # for the manifest: system, step, lineage


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """How many scenes, and how large."""

  num_train: int
  num_held_out: int  # of each other split
  size: int  # pixels of a side
  seed: int


@dataclasses.dataclass(frozen=True)
class Drawing:
  """A drawing without the white around it."""

  name: str  # of what it shows
  image_YXC: np.ndarray


@dataclasses.dataclass(frozen=True)
class Scene:
  """A picture of drawings, each with its place."""

  image_YXC: np.ndarray
  names: tuple[str, ...]
  boxes: tuple[tuple[int, int, int, int], ...]  # x1, y1, x2, y2, pixels
  captions: tuple[str, ...]


def find_names(
  data_dir: str, splits: Mapping[str, int]
) -> dict[str, tuple[str, ...]]:
  """The names that drawings of each split have and scenes can use, sorted."""
  found = {}
  for split in splits:
    source = sources.open_source(data_dir, split)
    names = {source[i].captions[0] for i in range(len(source))}
    found[split] = tuple(sorted(filter(_is_usable, names)))
  return found


def _is_usable(name: str) -> bool:
  """Whether captions can speak of it, and anchors find it."""
  words = re.findall(r"\w+|[^\w\s]", name)
  return bool(_NAME.fullmatch(name)) and len(words) <= _MAX_WORDS


def choose_splits(names: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
  """The splits with enough to make scenes of; says which are left out."""
  chosen = tuple(s for s in names if len(names[s]) >= NUM_DRAWINGS[0])
  if left := sorted(names.keys() - set(chosen)):
    logging.warning("no scenes of splits with fewer than two names: %s", left)
  return chosen


def read_drawings(data_dir: str, split: str) -> dict[str, list[Drawing]]:
  """The drawings of a split by their names, in the order of the names."""
  source = sources.open_source(data_dir, split)
  found = collections.defaultdict(list)
  examples = [source[i] for i in range(len(source))]
  for example in sorted(examples, key=lambda example: example.id):
    name = example.captions[0]
    if _is_usable(name):
      image_YXC = _cut(transforms.decode(example.image))
      if image_YXC is not None:
        found[name].append(Drawing(name, image_YXC))
  return dict(sorted(found.items()))


def _cut(image_YXC: np.ndarray) -> np.ndarray | None:
  """Without the white around; None: all is white."""
  drawn_YX = image_YXC.min(axis=2) < _BRIGHT
  if not drawn_YX.any():
    return None
  top, bottom = np.flatnonzero(drawn_YX.any(axis=1))[[0, -1]]
  left, right = np.flatnonzero(drawn_YX.any(axis=0))[[0, -1]]
  return image_YXC[top : bottom + 1, left : right + 1]


def make_records(
  data_dir: str,
  split: str,
  *,
  encoder: Encoder,
  classes: Mapping[str, int],
  options: Options,
) -> Iterator[pairs.Record]:
  """Yields the scenes of a split.

  Args:
    data_dir: of the drawings.
    split: theirs and the scenes'.
    encoder: gives the features.
    classes: name -> class, from 1.
    options: how many and how large.
  """
  drawings = read_drawings(data_dir, split)
  train = split == "train"
  total = options.num_train if train else options.num_held_out
  numbers = progress.bar(range(total), name=f"draw {split}", total=total)
  scenes = (
    make_scene(
      masking.sample_rng(options.seed, 0, number, f"scene {split}"),
      drawings,
      size=options.size,
    )
    for number in numbers
  )
  done = 0
  while chunk := list(itertools.islice(scenes, _CHUNK)):
    for scene, regions in zip(
      chunk, _encode(chunk, encoder, classes), strict=True
    ):
      yield pairs.Record(
        id=f"{split}-{done:06d}",
        split=split,
        image=_to_png(scene.image_YXC),
        captions=scene.captions,
        regions=regions,
      )
      done += 1


def _encode(
  chunk: Sequence[Scene], encoder: Encoder, classes: Mapping[str, int]
) -> Iterator[regions_lib.Regions]:
  crops = [
    transforms.resize(
      _to_square(_crop(scene.image_YXC, box)), size=encoder.size
    )
    for scene in chunk
    for box in scene.boxes
  ]
  features = iter(encoder.encode(np.stack(crops)).astype(np.float16))
  for scene in chunk:
    count = len(scene.boxes)
    yield regions_lib.Regions(
      feature_RP=np.stack(list(itertools.islice(features, count))),
      box_R4=np.array(scene.boxes, np.float32) / scene.image_YXC.shape[0],
      class_R=np.array([classes[name] for name in scene.names], np.int32),
      confidence_R=np.ones(count, np.float32),
    )


def _crop(image_YXC: np.ndarray, box: Sequence[int]) -> np.ndarray:
  left, top, right, bottom = box
  return image_YXC[top:bottom, left:right]


def _to_square(image_YXC: np.ndarray) -> np.ndarray:
  """Centred on a white square, as the encoder has seen drawings."""
  height, width = image_YXC.shape[:2]
  side = max(height, width)
  above, left = (side - height) // 2, (side - width) // 2
  return np.pad(
    image_YXC,
    ((above, side - height - above), (left, side - width - left), (0, 0)),
    constant_values=transforms.BACKGROUND,
  )


def _to_png(image_YXC: np.ndarray) -> bytes:
  out = io.BytesIO()
  Image.fromarray(image_YXC).save(out, "PNG", compress_level=1)
  return out.getvalue()


def make_scene(
  rng: np.random.Generator,
  drawings: Mapping[str, Sequence[Drawing]],
  *,
  size: int,
) -> Scene:
  """Draws one scene: what it shows, where, and what captions say.

  Args:
    rng: of this scene.
    drawings: name -> drawings that show it; at least two names.
    size: pixels of a side.
  """
  names = _choose(rng, tuple(drawings))
  image_YXC = np.full((size, size, 3), transforms.BACKGROUND, np.uint8)
  boxes: list[tuple[int, int, int, int]] = []
  for name in names:
    found = drawings[name]
    drawing = found[int(rng.integers(len(found)))].image_YXC
    left, top, right, bottom = _find_place(rng, drawing, boxes, size)
    boxes.append((left, top, right, bottom))
    # Boxes do not overlap: a drawing never covers another.
    picture = Image.fromarray(np.ascontiguousarray(drawing)).resize(
      (right - left, bottom - top), Image.Resampling.BICUBIC
    )
    image_YXC[top:bottom, left:right] = np.asarray(picture)
  return Scene(
    image_YXC=image_YXC,
    names=names,
    boxes=tuple(boxes),
    captions=tuple(make_caption(rng, names) for _ in range(NUM_CAPTIONS)),
  )


def _choose(rng: np.random.Generator, names: Sequence[str]) -> tuple[str, ...]:
  """Different names, or one of them twice where it has a plural."""
  low, high = NUM_DRAWINGS
  count = min(int(rng.integers(low, high + 1)), len(names))
  chosen = [names[i] for i in rng.permutation(len(names))[:count]]
  twice = rng.random() < _TWICE
  if twice and has_plural(chosen[0]):
    chosen[-1] = chosen[0]
  return tuple(chosen)


def _find_place(
  rng: np.random.Generator,
  drawing_YXC: np.ndarray,
  boxes: Sequence[tuple[int, int, int, int]],
  size: int,
) -> tuple[int, int, int, int]:
  """A box of random size where none of `boxes` is; smaller where it is full."""
  height, width = drawing_YXC.shape[:2]
  side = rng.uniform(*_SIDES) * size
  while True:
    scale = side / max(height, width)
    box_Y, box_X = (max(1, math.floor(n * scale)) for n in (height, width))
    for _ in range(_PLACES):
      left = int(rng.integers(size - box_X + 1))
      top = int(rng.integers(size - box_Y + 1))
      box = (left, top, left + box_X, top + box_Y)
      if not any(_overlap(box, other) for other in boxes):
        return box
    side *= 0.8


def _overlap(one: Sequence[int], other: Sequence[int]) -> bool:
  return (
    one[0] < other[2]
    and other[0] < one[2]
    and one[1] < other[3]
    and other[1] < one[3]
  )


def make_caption(rng: np.random.Generator, names: Sequence[str]) -> str:
  """Names some of the things of a scene, each with its number.

  Forms: "a red apple and two dogs", "dog next to a red apple", "red apple,
  dogs", "a picture of a red apple with two dogs".
  """
  counts = collections.Counter(names)
  different = sorted(counts)
  least, most = (min(number, len(different)) for number in _NAMED)
  number = int(rng.integers(least, most + 1))
  order = rng.permutation(len(different))[:number]
  things = [(different[i], counts[different[i]]) for i in order]
  full = [_with_number(*thing) for thing in things]
  bare = [_bare(*thing) for thing in things]
  form = int(rng.integers(4))
  if form == 0:
    return _join(full)
  if form == 1:
    return " next to ".join(filter(None, (bare[0], _join(full[1:]))))
  if form == 2:
    return ", ".join(bare)
  return "a picture of " + " with ".join(
    filter(None, (full[0], _join(full[1:])))
  )


def _join(texts: Sequence[str]) -> str:
  *first, last = texts or ("",)
  return f"{', '.join(first)} and {last}" if first else last


def _with_number(name: str, count: int) -> str:
  if count > 1:
    return f"{_NUMBERS[count]} {plural(name)}"
  if _is_plural(name):
    return name
  return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


def _bare(name: str, count: int) -> str:
  return plural(name) if count > 1 else name


def has_plural(name: str) -> bool:
  """Whether it can be counted: "dog", not "scissors" or "man running"."""
  return not _is_plural(name) and not name.endswith("ing")


def _is_plural(name: str) -> bool:
  last = name.rpartition(" ")[2]
  return last in _IRREGULAR.values() or (
    last.endswith("s") and not last.endswith(("ss", "us", "is"))
  )


def plural(name: str) -> str:
  """The plural of a name's last word, which `anchors.singulars` undoes."""
  before, space, last = name.rpartition(" ")
  if last in _IRREGULAR:
    last = _IRREGULAR[last]
  elif last in _VES:
    last = re.sub("fe?$", "ves", last)
  elif re.search("[^aeiou]y$", last):
    last = f"{last[:-1]}ies"
  else:
    last += "es" if last.endswith(("s", "x", "z", "ch", "sh")) else "s"
  return f"{before}{space}{last}"
