"""What a system puts in the place of what it does not see.

Patches: masked images completed from their own caption and from another one,
and by how much the own one is better over many images. Words: the likeliest
ones at masked places, from the image and from a blank one.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import numpy as np

from glscl_jax import config as config_lib
from glscl_jax.data import masking, sources, transforms
from glscl_jax.data import tokenizer as tokenizers
from glscl_jax.export import attention, pictures
from glscl_jax.export.weights import Weights
from glscl_jax.systems import registry
from glscl_jax.types import Batch

BATCH = 32  # images a call
TOP = 5  # words a place


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completion:
  """One image; pictures are uint8 and as large as the model's input."""

  image_YXC: np.ndarray
  hidden_I: np.ndarray  # bool
  caption: str
  other: str  # another image's caption
  by_caption_YXC: np.ndarray  # hidden patches as predicted, the others as seen
  by_other_YXC: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Completions:
  """Some images, and the pixel loss of many by itself."""

  shown: tuple[Completion, ...]
  error_A: np.ndarray  # from the own caption
  other_error_A: np.ndarray  # from another one, the same patches hidden


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
  """A token that may stand at a masked place."""

  name: str  # not its own alone: with and without a space before it
  probability: float
  right: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guess:
  """A masked word, and the likeliest ones."""

  word: str
  by_image: tuple[Candidate, ...]
  by_blank: tuple[Candidate, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedText:
  """One image and its masked caption, piece by piece."""

  image_YXC: np.ndarray
  pieces: tuple[str, ...]
  guesses: tuple[Guess, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedTexts:
  """Some captions, and how often the likeliest word is right in many."""

  shown: tuple[MaskedText, ...]
  num_words: int
  by_image: float  # share
  by_blank: float


def choose(
  source: sources.Source, *, count: int, seed: int
) -> list[sources.Example]:
  """Random examples with a caption, the same for the same seed."""
  chosen = []
  for record in np.random.default_rng(seed).permutation(len(source)):
    if len(chosen) == count:
      break
    example = source[int(record)]
    if example.captions and example.captions[0].strip():
      chosen.append(example)
  return chosen


def swap(captions: Sequence[str]) -> list[str]:
  """For each caption the next one that says something else.

  Raises:
    ValueError: all are the same.
  """
  found = []
  for i in range(len(captions)):
    rest = [*captions[i + 1 :], *captions[:i]]
    found.append(next((c for c in rest if c != captions[i]), None))
  if None in found:
    raise ValueError("all captions are the same")
  return found


def complete(
  weights: Weights,
  examples: Sequence[sources.Example],
  *,
  num_shown: int,
  seed: int,
) -> Completions:
  """Completes each image from its own caption and from another one.

  Args:
    weights: of a system with `complete_patches`.
    examples: at least two different captions; the first ones are shown.
    num_shown: how many.
    seed: of the masks.
  """
  config = weights.config
  captions = [example.captions[0] for example in examples]
  others = swap(captions)
  tokenizer = tokenizers.load(weights.tokenizer_path)
  program = jax.jit(
    functools.partial(registry.find(config).complete_patches, config=config)
  )
  batches = _batches(weights, examples, seed=seed)
  pairs = []
  for number, batch in enumerate(batches):
    key = jax.random.fold_in(jax.random.key(seed), number)
    run = functools.partial(program, weights.params, batch, key=key)
    other = _encode(tokenizer, others[number * BATCH :][:BATCH], config)
    own = batch.text_ids_BT, batch.text_valid_BT
    pairs.append([jax.device_get(run(*text)) for text in (own, other)])
  own, swapped = (
    jax.tree.map(lambda *a: np.concatenate(a)[: len(examples)], *found)
    for found in zip(*pairs, strict=True)
  )
  images = np.concatenate([batch.image_BYXC for batch in batches])
  num_patches = config.model.vision.num_patches
  return Completions(
    shown=tuple(
      Completion(
        image_YXC=images[i],
        hidden_I=np.isin(np.arange(num_patches), own.hidden_BJ[i]),
        caption=captions[i],
        other=others[i],
        by_caption_YXC=_fill(images[i], own, i, config),
        by_other_YXC=_fill(images[i], swapped, i, config),
      )
      for i in range(min(num_shown, len(examples)))
    ),
    error_A=own.error_B,
    other_error_A=swapped.error_B,
  )


def _fill(image_YXC, completed, row, config: config_lib.Config) -> np.ndarray:
  """The image with its hidden patches as they were predicted."""
  pixel_JPC = completed.pixel_BJP[row].reshape(
    len(completed.hidden_BJ[row]), -1, 3
  )
  mean_11C, std_11C = (
    np.array(values, np.float32)[None, None]
    for values in (config.data.mean, config.data.std)
  )
  value_JPC = np.clip(255 * (pixel_JPC * std_11C + mean_11C), 0, 255)
  return pictures.put_patches(
    image_YXC,
    completed.hidden_BJ[row],
    np.round(value_JPC).astype(np.uint8),
    patch_size=config.model.vision.patch_size,
  )


def guess(
  weights: Weights,
  examples: Sequence[sources.Example],
  *,
  num_shown: int,
  seed: int,
) -> MaskedTexts:
  """The likeliest words at masked places of each example's caption.

  All masked words are hidden from the model, unlike in training, which leaves
  some as they are. A blank image has the mean colour everywhere.

  Args:
    weights: of a system with `word_logits`.
    examples: the first ones are shown.
    num_shown: how many.
    seed: of the masks.
  """
  tokenizer = tokenizers.load(weights.tokenizer_path)
  batches = _batches(weights, examples, seed=seed)
  by_image, by_blank = (
    _predict(weights, batches, blank=blank) for blank in (False, True)
  )
  rows = jax.tree.map(lambda *a: np.concatenate(a), *batches)
  counts_BJ = rows.mlm_ok_BJ.copy()
  counts_BJ[len(examples) :] = False  # padding

  def one_word(row: int, place: int) -> Guess:
    label = int(rows.mlm_labels_BJ[row, place])
    return Guess(
      word=_names(tokenizer, np.array([label]))[0],
      by_image=by_image.at(tokenizer, row, place, label=label),
      by_blank=by_blank.at(tokenizer, row, place, label=label),
    )

  def one(row: int) -> MaskedText:
    there_T = rows.text_valid_BT[row]
    return MaskedText(
      image_YXC=rows.image_BYXC[row],
      pieces=_names(tokenizer, rows.mlm_ids_BT[row][there_T][1:-1]),
      guesses=tuple(
        one_word(row, place) for place in np.flatnonzero(counts_BJ[row])
      ),
    )

  return MaskedTexts(
    shown=tuple(one(row) for row in range(min(num_shown, len(examples)))),
    num_words=int(counts_BJ.sum()),
    by_image=by_image.share_right(rows.mlm_labels_BJ, counts_BJ),
    by_blank=by_blank.share_right(rows.mlm_labels_BJ, counts_BJ),
  )


@dataclasses.dataclass(frozen=True)
class _Likeliest:
  id_BJA: np.ndarray  # the likeliest first
  probability_BJA: np.ndarray

  def at(
    self, tokenizer: tokenizers.Tokenizer, row: int, place: int, *, label: int
  ) -> tuple[Candidate, ...]:
    ids = self.id_BJA[row, place]
    return tuple(
      Candidate(name=name, probability=float(p), right=int(i) == label)
      for i, name, p in zip(
        ids,
        _names(tokenizer, ids),
        self.probability_BJA[row, place],
        strict=True,
      )
    )

  def share_right(self, label_BJ: np.ndarray, counts_BJ: np.ndarray) -> float:
    right_BJ = self.id_BJA[:, :, 0] == label_BJ
    return float(right_BJ[counts_BJ].mean())


def _predict(
  weights: Weights, batches: Sequence[Batch], *, blank: bool
) -> _Likeliest:
  config = weights.config
  system = registry.find(config)

  @jax.jit
  def run(params, batch):
    logits_BJV = system.word_logits(params, batch, config=config)
    return jax.lax.top_k(jax.nn.softmax(logits_BJV), TOP)

  found = []
  for batch in batches:
    if blank:  # floats are taken as normalised pixels
      empty_BYXC = np.zeros(batch.image_BYXC.shape, np.float32)
      batch = dataclasses.replace(batch, image_BYXC=empty_BYXC)
    found.append(run(weights.params, batch))
  probabilities, ids = zip(*found, strict=True)
  return _Likeliest(np.concatenate(ids), np.concatenate(probabilities))


def _names(tokenizer: tokenizers.Tokenizer, ids: np.ndarray) -> tuple[str, ...]:
  """Pieces without the mark of a space; that mark alone is "_"."""
  return tuple(
    piece.strip("\u2581\u0120 ") or "_" for piece in tokenizer.pieces(ids)
  )


def _encode(
  tokenizer: tokenizers.Tokenizer,
  texts: Sequence[str],
  config: config_lib.Config,
) -> tuple[np.ndarray, np.ndarray]:
  """Ids and validity of a batch of texts, padded as `_batches`."""
  tokens = [
    tokenizer.encode(text, config.model.text.max_length) for text in texts
  ]
  tokens += tokens[:1] * (-len(tokens) % BATCH)
  return (
    np.stack([item.ids_T for item in tokens]),
    np.stack([item.valid_T for item in tokens]),
  )


def _batches(
  weights: Weights, examples: Sequence[sources.Example], *, seed: int
) -> list[Batch]:
  """Whole images and first captions with masks; the last one is padded.

  The masks of an example depend on its place and the seed alone.
  """
  tokenizer = tokenizers.load(weights.tokenizer_path)
  rows = [
    _row(weights.config, tokenizer, example, (seed, 0, number))
    for number, example in enumerate(examples)
  ]
  rows += rows[:1] * (-len(rows) % BATCH)
  return [
    Batch(
      **{
        name: np.stack([row[name] for row in rows[first : first + BATCH]])
        for name in rows[0]
      }
    )
    for first in range(0, len(rows), BATCH)
  ]


def _row(
  config: config_lib.Config,
  tokenizer: tokenizers.Tokenizer,
  example: sources.Example,
  place: tuple[int, int, int],
) -> dict[str, np.ndarray]:
  vision, options = config.model.vision, config.masking
  tokens = tokenizer.encode(example.captions[0], config.model.text.max_length)
  words = masking.mask_tokens(
    masking.sample_rng(*place, "report words"),
    tokens.ids_T,
    tokens.valid_T & (tokens.word_T >= 0),
    rate=options.mlm_rate,
    mask_id=tokenizer.mask_id,
    plain_ids_V=np.zeros(0, np.int32),  # not read by this scheme
    scheme="all",
  )
  row = {
    "image_BYXC": transforms.resize(
      attention.decode(example), size=vision.image_size
    ),
    "identity_BM": np.array(place[2:], np.int32),
    "text_ids_BT": tokens.ids_T,
    "text_valid_BT": tokens.valid_T,
    "mlm_ids_BT": words.ids_T,
    "mlm_pos_BJ": words.pos_J,
    "mlm_labels_BJ": words.labels_J,
    "mlm_ok_BJ": words.ok_J,
  }
  if config.objectives.mim > 0:
    row["block_idx_BI"] = masking.block_patches(
      masking.sample_rng(*place, "report blocks"),
      vision.image_size,
      vision.patch_size,
      block_size=options.image_block_size,
      ratio=options.image_block_ratio,
    )
  return row
