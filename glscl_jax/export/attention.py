"""Text-to-image attention of the last fusion layer, word by word.

The image's class column is left out and the strongest head is taken for each
patch. A word has the mean over the rows of its pieces.

Shape letters beside those of types.py: G patches a side.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np

from glscl_jax import config as config_lib
from glscl_jax.data import pairs, sources, transforms
from glscl_jax.data import tokenizer as tokenizers
from glscl_jax.export.weights import Weights
from glscl_jax.systems import registry
from glscl_jax.types import Visual


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attention:
  """One picture, the words of its caption and where each looks."""

  image_YXC: np.ndarray  # uint8, as stored
  words: tuple[str, ...]
  maps_WGG: np.ndarray  # float32; even attention is 1 / (G * G + 1)


def choose(
  source: sources.Source, *, count: int, max_words: int, seed: int
) -> list[sources.Example]:
  """Random examples whose first caption has two to `max_words` words."""
  chosen: list[sources.Example] = []
  for record in np.random.default_rng(seed).permutation(len(source)):
    if len(chosen) == count:
      break
    example = source[int(record)]
    if example.captions and 2 <= len(example.captions[0].split()) <= max_words:
      chosen.append(example)
  return chosen


def attend(
  weights: Weights, examples: Sequence[sources.Example]
) -> list[Attention]:
  """The attention of each example's first caption over its picture."""
  if not examples:
    return []
  config = weights.config
  vision = config.model.vision
  tokenizer = tokenizers.load(weights.tokenizer_path)
  tokens = [
    tokenizer.encode(example.captions[0], config.model.text.max_length)
    for example in examples
  ]
  decoded = [decode(example) for example in examples]
  resized = [
    transforms.resize(image, size=vision.image_size) for image in decoded
  ]
  probabilities = _make_program(config)(
    weights.params,
    np.stack(resized),
    np.stack([item.ids_T for item in tokens]),
    np.stack([item.valid_T for item in tokens]),
  )
  attention_BHTM = np.asarray(probabilities, np.float32)
  grid = vision.image_size // vision.patch_size
  return [
    Attention(
      image_YXC=decoded[i],
      words=_words(example.captions[0], tokens[i], tokenizer),
      maps_WGG=word_maps(attention_BHTM[i], tokens[i].word_T, grid),
    )
    for i, example in enumerate(examples)
  ]


def decode(example: sources.Example) -> np.ndarray:
  """The picture of a record.

  Raises:
    DataError: it is damaged; names the record.
  """
  try:
    return transforms.decode(example.image)
  except transforms.BadImage as error:
    raise pairs.DataError(f"record {example.id!r}: {error}") from error


@functools.lru_cache(maxsize=2)
def _make_program(config: config_lib.Config) -> Callable[..., jax.Array]:
  """Compiled once: (params, images, ids, validity) to (B, H, T, 1 + N)."""
  system = registry.find(config)

  def run(params, image_BYXC, ids_BT, valid_BT):
    y_BID = system.encode_visual(
      params, Visual(image_BYXC=image_BYXC), config=config
    )
    x_BLD = system.encode_text(params, ids_BT, valid_BT, config=config)
    return system.cross_attention(params, x_BLD, valid_BT, y_BID, config=config)

  return jax.jit(run)


def word_maps(
  attention_HTM: np.ndarray, word_T: np.ndarray, grid: int
) -> np.ndarray:
  """Attention of each word over the patches, (W, G, G).

  Args:
    attention_HTM: softmax probabilities; column 0 is the class token.
    word_T: word number of each piece, -1 for specials and padding.
    grid: G.
  """
  strongest_TI = attention_HTM[:, :, 1:].max(0)
  words = range(int(word_T.max()) + 1)
  return np.stack(
    [strongest_TI[word_T == word].mean(0).reshape(grid, grid) for word in words]
  )


def _words(
  caption: str, tokens: tokenizers.Tokens, tokenizer: tokenizers.Tokenizer
) -> tuple[str, ...]:
  """Words as written; as their pieces where the tokenizer splits elsewhere."""
  count = int(tokens.word_T.max()) + 1
  words = tuple(caption.split())
  if len(words) == count:
    return words
  pieces = tokenizer.pieces(tokens.ids_T)
  return tuple(
    "".join(
      piece.strip("\u2581\u0120 ")
      for piece, number in zip(pieces, tokens.word_T, strict=True)
      if number == word
    )
    for word in range(count)
  )
