"""Masks of text tokens, image patches and regions, drawn on the host.

Every function is pure given its generator, hides an exact number of items and
returns arrays whose shapes depend on the configuration only: positions in
`pos_J` with a boolean twin `ok_J`; slots that are not ok hold 0. The pipeline
draws each mask from its own `sample_rng`, so a mask depends on nothing but
the sample: not on the batch, the number of processes, the padding length or
the other masks (the two draws of the published code excepted, as their text
says).
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import Literal

import numpy as np


@dataclass(frozen=True, kw_only=True)
class TextMask:
  """One text with some tokens hidden."""

  ids_T: np.ndarray  # int32, the text after masking
  pos_J: np.ndarray  # int32, masked positions, ascending; 0 where not ok
  labels_J: np.ndarray  # int32, original ids there; 0 where not ok
  ok_J: np.ndarray  # bool


def floor_eps(value: float) -> int:
  """floor(value + 1e-6): 100 * (1 - .8) counts as 20, not 19."""
  return math.floor(value + 1e-6)


def round_half_up(value: float) -> int:
  """floor(value + .5), unlike Python's round to even."""
  return math.floor(value + 0.5)


def sample_rng(
  seed: int, epoch: int, index: int, stream: str
) -> np.random.Generator:
  """A generator of its own for one use (`stream`) of one sample.

  Args:
    seed: of the run's data.
    epoch: how often the sample was seen before.
    index: of the sample in the data set, not in the batch.
    stream: name of the use; uses do not share numbers.
  """
  return np.random.default_rng(
    [seed, epoch, index, zlib.crc32(stream.encode())]
  )


# --- image patches ---------------------------------------------------------


def num_kept(num_patches: int, drop_ratio: float) -> int:
  """How many patches `drop_patches` keeps: floor_eps(N (1 - r))."""
  return floor_eps(num_patches * (1.0 - drop_ratio))


def num_hidden(num_patches: int, ratio: float) -> int:
  """How many patches `token_patches` hides: floor_eps(N r)."""
  return floor_eps(num_patches * ratio)


def drop_patches(
  rng: np.random.Generator, num_patches: int, *, drop_ratio: float
) -> np.ndarray:
  """Indices (int32) of the patches that stay, in noise order (MGSC).

  A uniform number per patch; the `num_kept` smallest stay. Ratio 0 keeps all.
  """
  noise_I = rng.random(num_patches)
  order_I = np.argsort(noise_I, kind="stable")
  return order_I[: num_kept(num_patches, drop_ratio)].astype(np.int32)


def token_patches(
  rng: np.random.Generator, num_patches: int, *, ratio: float
) -> np.ndarray:
  """Indices (int32) of the patches replaced by the mask vector (MLTC)."""
  order_I = rng.permutation(num_patches)
  return order_I[: num_hidden(num_patches, ratio)].astype(np.int32)


def num_blocks(image_size: int, *, block_size: int, ratio: float) -> int:
  """How many blocks `block_patches` hides: ceil(r blocks)."""
  blocks = (image_size // block_size) ** 2
  # As floor_eps: .55 of 100 blocks are 55, not 56.
  return math.ceil(blocks * ratio - 1e-6)


def num_block_patches(
  image_size: int, patch_size: int, *, block_size: int, ratio: float
) -> int:
  """How many patches `block_patches` hides."""
  hidden = num_blocks(image_size, block_size=block_size, ratio=ratio)
  return hidden * (block_size // patch_size) ** 2


def block_patches(
  rng: np.random.Generator,
  image_size: int,
  patch_size: int,
  *,
  block_size: int,
  ratio: float,
) -> np.ndarray:
  """Indices (int32, ascending) of the patches hidden in square blocks (MIM).

  `num_blocks` of the blocks that tile the image, drawn without replacement
  (SimMIM, 2111.09886); a block hides all its patches.

  Args:
    rng: of this sample and this mask.
    image_size: pixels; a multiple of `block_size`.
    patch_size: pixels; divides `block_size`.
    block_size: pixels.
    ratio: share of the blocks.
  """
  side, scale = image_size // block_size, block_size // patch_size
  count = num_blocks(image_size, block_size=block_size, ratio=ratio)
  hidden_A = np.zeros(side * side, bool)
  hidden_A[rng.permutation(side * side)[:count]] = True
  hidden_YX = hidden_A.reshape(side, side)
  for axis in (0, 1):
    hidden_YX = np.repeat(hidden_YX, scale, axis=axis)
  return np.flatnonzero(hidden_YX).astype(np.int32)


# --- text ------------------------------------------------------------------


def num_masked(num_real: int, rate: float) -> int:
  """How many of `num_real` tokens are masked; at least one if there is any."""
  if num_real == 0:
    return 0
  return max(1, round_half_up(rate * num_real))


def mlm_slots(
  max_length: int,
  *,
  rate: float,
  whole_word: bool = False,
  padded_draw: bool = False,
) -> int:
  """The static J of `mask_tokens` for texts of `max_length` with specials.

  Whole words can go past the rate by all but one token of the longest word,
  which may fill the text, so they need a slot for every real token.
  """
  if padded_draw:
    return max(1, round_half_up(rate * max_length))
  if whole_word:
    return max_length - 2
  return max(1, round_half_up(rate * (max_length - 2)))


def completion_slots(
  max_length: int, *, rate: float, with_replacement: bool = False
) -> int:
  """The static J of `mask_completion`."""
  num_real = max_length - 2
  if with_replacement:
    return min(num_real, math.floor(rate * num_real) + 1)
  return max(1, round_half_up(rate * num_real))


def mask_tokens(
  rng: np.random.Generator,
  ids_T: np.ndarray,
  real_T: np.ndarray,
  *,
  rate: float,
  mask_id: int,
  plain_ids_V: np.ndarray,
  scheme: Literal["801010", "all"] = "801010",
  word_T: np.ndarray | None = None,
  padded_draw: bool = False,
) -> TextMask:
  """The masked-language-model text (T_mlm).

  Args:
    rng: of this sample and this mask.
    ids_T: token ids of one text, padded.
    real_T: True at tokens of the text; False at specials and pads.
    rate: share of real tokens.
    mask_id: what a masked token becomes.
    plain_ids_V: the ids a random replacement is drawn from (no specials).
    scheme: "801010": 80% mask id, 10% a uniform plain id (which may be the
      original one), 10% unchanged; "all": always the mask id.
    word_T: number of the word at each real token; given, whole words are
      masked until the count is reached, the last one kept whole.
    padded_draw: published code: round(rate T) of all T positions are drawn
      and specials and pads discarded, so this depends on the padding length.
  """
  if padded_draw:
    drawn_A = rng.permutation(len(ids_T))[: round_half_up(rate * len(ids_T))]
    chosen_J = np.sort(drawn_A[real_T[drawn_A]])
  elif word_T is not None:
    chosen_J = _draw_words(rng, real_T, word_T, rate=rate)
  else:
    chosen_J = _draw_positions(rng, real_T, rate=rate)
  masked_T = ids_T.copy()
  masked_T[chosen_J] = _replacements(
    rng, ids_T[chosen_J], mask_id, plain_ids_V, scheme
  )
  num_slots = mlm_slots(
    len(ids_T),
    rate=rate,
    whole_word=word_T is not None,
    padded_draw=padded_draw,
  )
  return _text_mask(ids_T, masked_T, chosen_J, num_slots)


def mask_completion(
  rng: np.random.Generator,
  ids_T: np.ndarray,
  real_T: np.ndarray,
  *,
  rate: float,
  mask_id: int,
  with_replacement: bool = False,
) -> TextMask:
  """The text that MGSC and MLTC complete (T_40): all masked by the mask id.

  `with_replacement` (published code) draws floor(rate n) + 1 times with
  replacement, so fewer than the rate are masked.
  """
  if with_replacement:
    real_A = np.flatnonzero(real_T)
    num_draws = math.floor(rate * len(real_A)) + 1 if len(real_A) else 0
    drawn_M = rng.integers(max(len(real_A), 1), size=num_draws)
    chosen_J = real_A[np.unique(drawn_M)]
  else:
    chosen_J = _draw_positions(rng, real_T, rate=rate)
  masked_T = ids_T.copy()
  masked_T[chosen_J] = mask_id
  num_slots = completion_slots(
    len(ids_T), rate=rate, with_replacement=with_replacement
  )
  return _text_mask(ids_T, masked_T, chosen_J, num_slots)


def anchor_slots(max_length: int, *, rate: float, max_anchors: int) -> int:
  """The static J of `mask_around_anchors`."""
  return 2 * max_anchors + mlm_slots(max_length, rate=rate)


def mask_around_anchors(
  rng: np.random.Generator,
  ids_T: np.ndarray,
  real_T: np.ndarray,
  anchor_W: np.ndarray,
  rest_T: np.ndarray,
  *,
  rate: float,
  max_anchors: int,
  mask_id: int,
  plain_ids_V: np.ndarray,
  anchors: Literal["swap", "hide", "show"] = "swap",
) -> TextMask:
  """The text of AMC; targets are anchors and what is masked.

  Of the tokens that belong to no anchor round_half_up(rate n) are masked as by
  `mask_tokens`. Where that leaves no target, the first of them is masked.

  Args:
    rng: of this sample and this mask.
    ids_T: token ids of one text, padded.
    real_T: True at tokens of the text; False at specials and pads.
    anchor_W: first tokens of the anchors, as many as there are.
    rest_T: the other tokens of these words: all masked. Targets are as many of
      them as there may be anchors, the first ones.
    rate: share of the tokens of no anchor.
    max_anchors: static; at least the number of anchors.
    mask_id: what a masked token becomes.
    plain_ids_V: as for `mask_tokens`.
    anchors: what becomes of their first tokens. swap: they stay, since a
      region's content takes their place later; hide: they are masked; show:
      they stay, and neither they nor their rest is masked or a target.
  """
  first_T = np.zeros_like(real_T)
  first_T[anchor_W] = True
  other_A = np.flatnonzero(real_T & ~first_T & ~rest_T)
  count = round_half_up(rate * len(other_A))
  chosen_J = other_A[np.sort(rng.permutation(len(other_A))[:count])]
  masked_T = ids_T.copy()
  masked_T[chosen_J] = _replacements(
    rng, ids_T[chosen_J], mask_id, plain_ids_V, "801010"
  )
  target_T = np.zeros_like(real_T)
  target_T[chosen_J] = True
  if anchors != "show":
    masked_T[rest_T] = mask_id
    target_T |= first_T
    target_T[np.flatnonzero(rest_T)[:max_anchors]] = True
  if anchors == "hide":
    masked_T[first_T] = mask_id
  if len(other_A) and not target_T.any():
    target_T[other_A[0]], masked_T[other_A[0]] = True, mask_id
  slots = anchor_slots(len(ids_T), rate=rate, max_anchors=max_anchors)
  return _text_mask(ids_T, masked_T, np.flatnonzero(target_T), slots)


# --- regions ---------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class RegionMask:
  """The regions of one image that are hidden, and those asked for."""

  hidden_R: np.ndarray  # bool
  pos_J: np.ndarray  # int32, anchors' and hidden ones; 0 where not ok. J is R
  ok_J: np.ndarray  # bool


def mask_regions(
  rng: np.random.Generator,
  valid_R: np.ndarray,
  anchor_W: np.ndarray,
  *,
  rate: float,
  hide_anchors: bool,
) -> RegionMask:
  """Hides each valid region of no anchor with probability `rate`.

  Where that leaves neither an anchor nor a hidden region, one valid region is
  hidden, any alike (cmal@ef02306).

  Args:
    rng: of this sample and this mask.
    valid_R: True at regions, which come first; False at padding.
    anchor_W: regions of anchors, as many as there are.
    rate: a probability.
    hide_anchors: hide them too; else they stay, to be swapped.
  """
  count, size = int(valid_R.sum()), len(valid_R)
  anchored_R, hidden_R = np.zeros(size, bool), np.zeros(size, bool)
  anchored_R[anchor_W] = True
  hidden_R[:count] = rng.random(count) < rate
  hidden_R &= ~anchored_R
  if count and not (hidden_R | anchored_R).any():
    hidden_R[rng.integers(count)] = True
  asked_A = np.flatnonzero(hidden_R | anchored_R)
  pos_J = np.zeros(size, np.int32)
  pos_J[: len(asked_A)] = asked_A
  if hide_anchors:
    hidden_R |= anchored_R
  return RegionMask(
    hidden_R=hidden_R, pos_J=pos_J, ok_J=np.arange(size) < len(asked_A)
  )


def _draw_positions(
  rng: np.random.Generator, real_T: np.ndarray, *, rate: float
) -> np.ndarray:
  real_A = np.flatnonzero(real_T)
  drawn_J = rng.permutation(len(real_A))[: num_masked(len(real_A), rate)]
  return real_A[np.sort(drawn_J)]


def _draw_words(
  rng: np.random.Generator,
  real_T: np.ndarray,
  word_T: np.ndarray,
  *,
  rate: float,
) -> np.ndarray:
  goal = num_masked(int(real_T.sum()), rate)
  words_W = np.unique(word_T[real_T])
  chosen_T = np.zeros_like(real_T)
  for word in words_W[rng.permutation(len(words_W))]:
    if chosen_T.sum() >= goal:
      break
    chosen_T |= real_T & (word_T == word)
  return np.flatnonzero(chosen_T)


def _replacements(
  rng: np.random.Generator,
  ids_J: np.ndarray,
  mask_id: int,
  plain_ids_V: np.ndarray,
  scheme: str,
) -> np.ndarray:
  if scheme == "all":
    return np.full_like(ids_J, mask_id)
  choice_J = rng.random(len(ids_J))
  random_J = plain_ids_V[rng.integers(len(plain_ids_V), size=len(ids_J))]
  return np.where(
    choice_J < 0.8, mask_id, np.where(choice_J < 0.9, random_J, ids_J)
  )


def _text_mask(
  ids_T: np.ndarray,
  masked_T: np.ndarray,
  chosen_A: np.ndarray,
  num_slots: int,
) -> TextMask:
  pos_J = np.zeros(num_slots, np.int32)
  labels_J = np.zeros(num_slots, np.int32)
  pos_J[: len(chosen_A)] = chosen_A
  labels_J[: len(chosen_A)] = ids_T[chosen_A]
  return TextMask(
    ids_T=masked_T,
    pos_J=pos_J,
    labels_J=labels_J,
    ok_J=np.arange(num_slots) < len(chosen_A),
  )
