"""Anchors: words of a caption and regions of its image that name each other.

CMAL (2410.12595) swaps them. On the host, from a caption as the tokenizer cut
it and the classes of the regions; pure given the generator, and independent of
the padding of either.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import numpy as np

from glscl_jax.data import regions as regions_lib
from glscl_jax.data import tokenizer as tokenizer_lib

_MAX_WORDS = 3  # of a phrase
_IRREGULAR = {
  "men": "man",
  "women": "woman",
  "children": "child",
  "people": "person",
  "feet": "foot",
  "teeth": "tooth",
  "mice": "mouse",
  "geese": "goose",
}
_ENDINGS = (("s", ""), ("es", ""), ("ies", "y"), ("ves", "f"), ("ves", "fe"))
_WORD = re.compile(r"\w")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
  """Which words and regions become anchors: fields of MaskingConfig."""

  match: Literal["phrase", "piece"]  # piece: as the published code
  region: Literal["confident", "random"]  # of those that a word may take
  source: Literal["found", "random"]  # random: a control, of equal counts
  max_anchors: int
  max_pairs: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Names:
  """What the classes are called, as one tokenizer writes it."""

  phrases: Mapping[str, frozenset[int]]  # words joined by spaces -> classes
  pieces: Mapping[int, frozenset[int]]  # id of a token -> classes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Anchors:
  """Slots of a text and regions, one to one, and what else belongs to them.

  Slots that are not ok hold 0. All in the order of the text.
  """

  pos_A: np.ndarray  # int32, first token of the word or phrase
  region_A: np.ndarray  # int32, each at most once
  ok_A: np.ndarray  # bool
  rest_T: np.ndarray  # bool, the other tokens of these words
  pair_pos_J: np.ndarray  # int32, first token
  pair_region_J: np.ndarray  # int32, any region that the word names
  pair_ok_J: np.ndarray  # bool


@dataclasses.dataclass(frozen=True)
class _Unit:
  """Tokens that stand for one thing: a word, a phrase, or a piece."""

  first: int  # slot
  end: int  # slot after the last one
  text: str  # as written

  @property
  def is_mark(self) -> bool:
    """Whether no letter or digit is in it."""
    return not _WORD.search(self.text)


@dataclasses.dataclass(frozen=True)
class _Found:
  """A unit with its region, and all regions it names."""

  unit: _Unit
  region: int
  named: tuple[int, ...]


def make_names(
  classes: Sequence[str], tokenizer: tokenizer_lib.Tokenizer
) -> Names:
  """Reads the lines of region_classes.txt for `find_anchors`.

  phrases: each alias, lower-cased. pieces, the rule of the published code:
  parts of a name between spaces, also with s or es added or taken away, where
  they are one whole entry of the vocabulary.
  """
  phrases, pieces = (collections.defaultdict(set) for _ in range(2))
  for number, line in enumerate(classes, start=1):
    for alias in regions_lib.aliases(line):
      lower = alias.lower()
      words = tokenizer.encode(lower, 2 + len(lower)).words
      phrases[_key(words)].add(number)
      for form in _forms(lower):
        if (piece := _whole_piece(form, tokenizer)) is not None:
          pieces[piece].add(number)
  return Names(phrases=_freeze(phrases), pieces=_freeze(pieces))


def _freeze(found: Mapping) -> dict:
  return {key: frozenset(numbers) for key, numbers in found.items()}


def _forms(name: str) -> Iterator[str]:
  for part in name.split():
    yield from (part, f"{part}s", f"{part}es")
    yield from (part.removesuffix(end) for end in ("s", "es"))


def _whole_piece(text: str, tokenizer: tokenizer_lib.Tokenizer) -> int | None:
  """The id of a text that is one token, and no unknown one."""
  if not text:
    return None
  tokens = tokenizer.encode(text, 2 + len(text))
  ids = tokens.ids_T[tokens.word_T >= 0].tolist()
  return ids[0] if len(ids) == 1 and not tokens.unknown else None


def _key(words: Sequence[Sequence[str]]) -> str:
  """Words as they are compared; marks before and after them do not count."""
  text = " ".join("".join(word) for word in words).lower()
  return re.sub(r"^\W+|\W+$", "", text)


@functools.lru_cache(maxsize=2**16)  # captions say the same again and again
def singulars(phrase: str) -> tuple[str, ...]:
  """What a phrase may be the plural of; many of these are no words."""
  *before, last = phrase.split(" ")
  found = [_IRREGULAR[last]] if last in _IRREGULAR else []
  found += [
    last.removesuffix(ending) + instead
    for ending, instead in _ENDINGS
    if last.endswith(ending) and last != ending
  ]
  return tuple(" ".join((*before, word)) for word in found)


def find_anchors(
  rng: np.random.Generator,
  tokens: tokenizer_lib.Tokens,
  regions: regions_lib.Regions,
  names: Names,
  *,
  rules: Rules,
  num_regions: int,
  unknown_id: int | None,
) -> Anchors:
  """The anchors of one caption and one image.

  A phrase of up to three words, longer ones first, or its singular that equals
  a name of a class takes a region of this class that is free. Words that the
  limit cut, or that have no piece of their own, take none: there is no label.

  Args:
    rng: of this sample and this use.
    tokens: the caption.
    regions: of the image.
    names: by the same tokenizer.
    rules: which of them; at most `max_anchors` and `max_pairs` by the
      confidence of the region.
    num_regions: regions of a batch; what comes after them is not there.
    unknown_id: the tokenizer's.
  """
  class_R = regions.class_R[:num_regions]
  confidence_R = regions.confidence_R[:num_regions]
  words = _words(tokens, unknown_id)
  if rules.match == "phrase":
    candidates = _phrases(words, names)
  else:
    candidates = _pieces(tokens, unknown_id, names)
  found = _assign(rng, candidates, class_R, confidence_R, rules.region)
  found.sort(key=lambda anchor: -confidence_R[anchor.region])
  found = found[: rules.max_anchors]
  if rules.source == "random":
    units = [word for word in words if word is not None]
    if rules.match == "piece":
      units = _tokens(tokens, unknown_id)
    units = [unit for unit in units if not unit.is_mark]
    found = _shuffle(rng, found, units, np.flatnonzero(class_R > 0))
  found.sort(key=lambda anchor: anchor.unit.first)
  return _arrays(found, confidence_R, rules, len(tokens.ids_T))


def _words(
  tokens: tokenizer_lib.Tokens, unknown_id: int | None
) -> list[_Unit | None]:
  """The words of the caption, marks too; None for what has no label."""
  slot, num_slots = 1, len(tokens.ids_T)
  found: list[_Unit | None] = []
  for word in tokens.words:
    end = slot + len(word)
    inner = [i for i, text in enumerate(word) if _WORD.search(text)]
    first, last = (inner[0], inner[-1]) if inner else (0, len(word) - 1)
    known = end < num_slots and unknown_id not in tokens.ids_T[slot:end]
    unit = _Unit(slot + first, slot + last + 1, "".join(word))
    found.append(unit if known else None)
    slot = end
  return found


def _tokens(
  tokens: tokenizer_lib.Tokens, unknown_id: int | None
) -> list[_Unit]:
  """The tokens of the caption, each by itself."""
  written = [text for word in tokens.words for text in word]
  return [
    _Unit(slot, slot + 1, written[slot - 1])
    for slot in np.flatnonzero(tokens.word_T >= 0).tolist()
    if tokens.ids_T[slot] != unknown_id
  ]


_Candidate = tuple[_Unit, frozenset[int], range]  # and the words it takes


def _phrases(
  words: Sequence[_Unit | None], names: Names
) -> Iterator[_Candidate]:
  """Phrases that name a class, the longest first."""
  for count in range(_MAX_WORDS, 0, -1):
    for start in range(len(words) - count + 1):
      part = words[start : start + count]
      if None in part or part[0].is_mark or part[-1].is_mark:
        continue
      key = _key([(word.text,) for word in part])
      classes = frozenset().union(
        *(names.phrases.get(form, ()) for form in (key, *singulars(key)))
      )
      if classes:
        unit = _Unit(part[0].first, part[-1].end, key)
        yield unit, classes, range(start, start + count)


def _pieces(
  tokens: tokenizer_lib.Tokens, unknown_id: int | None, names: Names
) -> Iterator[_Candidate]:
  """Tokens that are a part of a class's name."""
  for number, unit in enumerate(_tokens(tokens, unknown_id)):
    piece = int(tokens.ids_T[unit.first])
    if piece in names.pieces and not unit.is_mark:
      yield unit, names.pieces[piece], range(number, number + 1)


def _assign(
  rng: np.random.Generator,
  candidates: Iterator[_Candidate],
  class_R: np.ndarray,
  confidence_R: np.ndarray,
  choice: str,
) -> list[_Found]:
  """Gives candidates, in their order, a region that no other one has."""
  found, words, taken = [], set(), set()
  class_of = class_R.tolist()
  for unit, classes, used in candidates:
    if not words.isdisjoint(used):
      continue
    named = [region for region, c in enumerate(class_of) if c in classes]
    free = [region for region in named if region not in taken]
    if not free:
      continue
    if choice == "random":
      region = free[int(rng.integers(len(free)))]
    else:
      region = max(free, key=lambda number: confidence_R[number])
    words.update(used)
    taken.add(region)
    found.append(_Found(unit, region, tuple(named)))
  return found


def _shuffle(
  rng: np.random.Generator,
  found: Sequence[_Found],
  units: Sequence[_Unit],
  region_A: np.ndarray,
) -> list[_Found]:
  """As many anchors and pairs, of words and regions drawn at random."""
  unit_M = rng.permutation(len(units))[: len(found)]
  region_M = rng.permutation(region_A)[: len(found)]
  drawn = []
  for anchor, unit, region in zip(found, unit_M, region_M, strict=True):
    others_J = rng.permutation(region_A[region_A != region])
    named = (region, *others_J[: len(anchor.named) - 1])
    drawn.append(_Found(units[unit], int(region), tuple(map(int, named))))
  return drawn


def _arrays(
  found: Sequence[_Found],
  confidence_R: np.ndarray,
  rules: Rules,
  num_slots: int,
) -> Anchors:
  rest_T = np.zeros(num_slots, bool)
  for anchor in found:
    rest_T[anchor.unit.first + 1 : anchor.unit.end] = True
  pairs = [(a.unit.first, region) for a in found for region in a.named]
  pairs.sort(key=lambda pair: -confidence_R[pair[1]])
  pairs = sorted(pairs[: rules.max_pairs])
  return Anchors(
    pos_A=_fill([a.unit.first for a in found], rules.max_anchors),
    region_A=_fill([a.region for a in found], rules.max_anchors),
    ok_A=np.arange(rules.max_anchors) < len(found),
    rest_T=rest_T,
    pair_pos_J=_fill([pos for pos, _ in pairs], rules.max_pairs),
    pair_region_J=_fill([region for _, region in pairs], rules.max_pairs),
    pair_ok_J=np.arange(rules.max_pairs) < len(pairs),
  )


def _fill(values: Sequence[int], size: int) -> np.ndarray:
  filled_A = np.zeros(size, np.int32)
  filled_A[: len(values)] = values
  return filled_A
