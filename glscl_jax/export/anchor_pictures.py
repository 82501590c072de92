"""Some images with their anchors: words and regions in the same colours.

Beside each anchor stands what a model says of its swapped slots, and how near
the word's state is to each region. Measured by tasks/anchors.py.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from glscl_jax.data import pipeline, sources, transforms
from glscl_jax.data import tokenizer as tokenizers
from glscl_jax.export import attention, pictures
from glscl_jax.export.weights import Weights
from glscl_jax.tasks import anchors

BATCH = 32  # images a call
SIZE = 512  # pixels a side of a picture


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
  """What is said of a slot."""

  said: str
  own: str
  right: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Near:
  """A region beside a word."""

  region: int
  cosine: float
  named: bool  # whether the word names it


@dataclasses.dataclass(frozen=True, kw_only=True)
class Anchor:
  """An anchored word; None and empty: no objective trains it."""

  phrase: str
  region: int
  word: Answer | None  # of its slot in the text
  classed: Answer | None  # of its region's slot
  near: tuple[Near, ...]  # all regions of the image, in their order


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scene:
  """An image, its caption word by word, and the anchors of both."""

  image_YXC: np.ndarray  # uint8, with the boxes of all regions
  classes: tuple[str, ...]  # of the regions
  words: tuple[tuple[str, int | None], ...]  # and the anchor it belongs to
  anchors: tuple[Anchor, ...]


def look(example: sources.Example) -> np.ndarray:
  """The picture of a record; white where the data have regions alone."""
  if example.image is None:
    return np.full((SIZE, SIZE, 3), transforms.BACKGROUND, np.uint8)
  return attention.decode(example)


def make_scenes(
  weights: Weights,
  source: sources.Source,
  *,
  num_shown: int,
  num_tried: int,
  seed: int,
) -> tuple[Scene, ...]:
  """Random images with an anchor, as the model sees them.

  Args:
    weights: of a system with `answer`, trained to.
    source: the split.
    num_shown: how many, at most.
    num_tried: images among which they are looked for.
    seed: of the choice; masks are those of the evaluation.
  """
  tokenizer = tokenizers.load(weights.tokenizer_path)
  order = np.random.default_rng(seed).permutation(len(source))[:num_tried]
  found = anchors.measure(
    weights.params,
    anchors.read(
      source,
      config=weights.config,
      tokenizer=tokenizer,
      protocol=anchors.Protocol(),
      record_U=order.tolist(),
    ),
    config=weights.config,
    batch_size=BATCH,
  )
  length = weights.config.model.text.max_length
  scenes = (
    _make_scene(found, number, tokenizer, length)
    for number in range(len(found.samples.record_U))
    if _pairs_of(found, number)
  )
  return tuple(
    scene for scene, _ in zip(scenes, range(num_shown), strict=False)
  )


def _pairs_of(found: anchors.Found, number: int) -> list[tuple[int, int]]:
  """First token and region of each anchor."""
  rows = found.rows
  if "anchor_ok_BA" in rows:
    ok_A = rows["anchor_ok_BA"][number]
    pos_A = rows["anchor_pos_BA"][number, ok_A].tolist()
    region_A = rows["anchor_region_BA"][number, ok_A].tolist()
    return list(zip(pos_A, region_A, strict=True))
  # Nothing is swapped: the first of the regions that a word names.
  pairs = found.pairs[number] if found.pairs is not None else ()
  return [(pair.pos, pair.named[0]) for pair in pairs]


def _make_scene(
  found: anchors.Found,
  number: int,
  tokenizer: tokenizers.Tokenizer,
  length: int,
) -> Scene:
  samples, rows = found.samples, found.rows
  example, pairs = samples.example(number), _pairs_of(found, number)
  tokens = tokenizer.encode(samples.captions[number], length)
  count = int(rows["region_valid_BR"][number].sum())
  colours: list[str | None] = [None] * count
  slots = {}  # token -> anchor
  for index, (pos, region) in enumerate(pairs):
    colours[region] = pictures.anchor_colour(index)
    slots[pos] = index
  if pipeline.REST in rows:
    for slot in np.flatnonzero(rows[pipeline.REST][number]).tolist():
      if slot not in slots and slot - 1 in slots:
        slots[slot] = slots[slot - 1]
  words, slot = [], 1
  for word in tokens.words:
    own = {slots[s] for s in range(slot, slot + len(word)) if s in slots}
    words.append(("".join(word), min(own) if own else None))
    slot += len(word)
  return Scene(
    image_YXC=pictures.draw_boxes(
      look(example), rows["box_BR7"][number, :count, :4], colours, size=SIZE
    ),
    classes=tuple(
      anchors.class_name(samples.source, int(label))
      for label in rows["region_class_BR"][number, :count]
    ),
    words=tuple(words),
    anchors=tuple(
      Anchor(
        phrase=" ".join(word for word, own in words if own == index),
        region=region,
        word=_answer(found.words, number, pos, found, tokenizer),
        classed=_answer(found.classes, number, region, found, None),
        near=_near(found, number, pos, count),
      )
      for index, (pos, region) in enumerate(pairs)
    ),
  )


def _answer(
  said: anchors.Said | None,
  number: int,
  slot: int,
  found: anchors.Found,
  tokenizer: tokenizers.Tokenizer | None,
) -> Answer | None:
  """What is said at an anchor's slot; of regions without a tokenizer."""
  if said is None:
    return None
  here_J = said.anchor_BJ[number] & (said.index_BJ[number] == slot)
  if not here_J.any():
    return None
  place = number, int(np.argmax(here_J))

  def name(value: int) -> str:
    if tokenizer is None:
      return anchors.class_name(found.samples.source, int(value))
    return anchors.piece_name(tokenizer, int(value))

  return Answer(
    said=name(said.said_BJ[place]),
    own=name(said.label_BJ[place]),
    right=bool(said.right_BJ[place]),
  )


def _near(
  found: anchors.Found, number: int, pos: int, count: int
) -> tuple[Near, ...]:
  if found.pairs is None:
    return ()
  named = {pair.pos: pair.named for pair in found.pairs[number]}
  if pos not in named:  # beyond masking.max_pairs
    return ()
  cosine_R = found.cosine_UTR[number, pos, :count]
  return tuple(
    Near(region=region, cosine=float(cosine), named=region in named[pos])
    for region, cosine in enumerate(cosine_R)
  )
