"""Captions of the images of a split, as the model writes them.

Each image is encoded once and shows all its patches. How captions are searched
is in tasks/decoding.py. Captions are compared with those of the data by their
text alone: BLEU, CIDEr and the like are left to scorers that read the
predictions.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from glscl_jax import config as config_lib
from glscl_jax import errors
from glscl_jax.data import retrieval_set as retrieval_sets
from glscl_jax.data import tokenizer as tokenizers
from glscl_jax.systems import registry
from glscl_jax.tasks import decoding
from glscl_jax.types import Params, Visual

Decode = Literal["beam", "greedy"]
DECODES = get_args(Decode)


class CaptioningError(errors.UserError):
  """Captions that cannot be made; the message says why."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Protocol:
  """How captions are made; part of every result."""

  decode: Decode = "beam"
  beam: int = decoding.Options.beam  # of beam
  length_power: float = decoding.Options.length_power  # of beam
  max_tokens: int = decoding.Options.max_tokens
  min_tokens: int = decoding.Options.min_tokens

  @property
  def options(self) -> decoding.Options:
    """Of the search."""
    options = decoding.Options(
      beam=self.beam,
      max_tokens=self.max_tokens,
      min_tokens=self.min_tokens,
      length_power=self.length_power,
    )
    return decoding.greedy(options) if self.decode == "greedy" else options

  def describe(self) -> dict[str, Any]:
    """What a result file says about it."""
    return {
      "decode": self.decode,
      **dataclasses.asdict(self.options),
      "unit": "lengths are in tokens, with the end and without the start",
    }


def longest(config: config_lib.Config) -> int:
  """Tokens behind the start that the model has been trained on."""
  return config.model.text.max_length - 1


def check(config: config_lib.Config, protocol: Protocol) -> None:
  """Raises CaptioningError unless the model writes captions of that length."""
  if registry.find(config).begin_captions is None:
    raise CaptioningError(
      f"a model of system {config.system!r} writes no captions"
    )
  if config.objectives.ic == 0:
    raise CaptioningError(
      "the model was trained with objectives.ic = 0 and has no caption decoder"
    )
  most = longest(config)
  if protocol.max_tokens > most:
    raise CaptioningError(
      f"--max_tokens={protocol.max_tokens}: the model was trained on texts of "
      f"at most {most} tokens behind the start: --max_tokens={most}"
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Marks:
  """Tokens that stand for no text."""

  start: int
  end: int
  never: tuple[int, ...]  # all but the end, that of unknown words too


def marks_of(tokenizer: tokenizers.Tokenizer) -> Marks:
  """Those of a tokenizer."""
  never = tokenizer.special_ids - {tokenizer.end_id}
  if tokenizer.unknown_id is not None:
    never |= {tokenizer.unknown_id}
  return Marks(
    start=tokenizer.start_id,
    end=tokenizer.end_id,
    never=tuple(sorted(never)),
  )


def caption(
  params: Params,
  visual: Visual,
  *,
  config: config_lib.Config,
  marks: Marks,
  options: decoding.Options,
) -> decoding.Captions:
  """The best caption of each image; pure, one program."""
  system = registry.find(config)
  y_BID = system.encode_visual(params, visual, config=config)
  ids_B = jnp.full(y_BID.shape[0], marks.start, jnp.int32)
  logits_BV, past = system.begin_captions(
    params, ids_B, y_BID, length=options.max_tokens, config=config
  )
  return decoding.search(
    logits_BV,
    past,
    functools.partial(system.extend_captions, params, config=config),
    end_id=marks.end,
    never_ids=marks.never,
    options=options,
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Written:
  """The captions of a split, in the order of its images."""

  retrieval_set: retrieval_sets.RetrievalSet  # undecodable images left out
  texts: tuple[str, ...]
  ended: np.ndarray  # bool; others were cut at the limit
  length: np.ndarray  # tokens
  score: np.ndarray
  seconds: float


def write(
  params: Params,
  retrieval_set: retrieval_sets.RetrievalSet,
  *,
  config: config_lib.Config,
  tokenizer: tokenizers.Tokenizer,
  protocol: Protocol,
  batch_size: int,
  on_progress: Callable[[str, int, int], None] | None = None,
) -> Written:
  """A caption for every image of a split.

  Args:
    params: of the model that `config` describes.
    retrieval_set: the split.
    config: the run's.
    tokenizer: the one the model was trained with.
    protocol: how captions are made.
    batch_size: images a call.
    on_progress: called as (stage, done, total).

  Raises:
    CaptioningError: the model writes none, or gives scores that are not finite.
    RetrievalSetError: no image can be decoded.
  """
  check(config, protocol)
  started = time.perf_counter()
  marks = marks_of(tokenizer)
  program = jax.jit(
    functools.partial(
      caption, config=config, marks=marks, options=protocol.options
    )
  )
  total = retrieval_set.num_images
  found, ok, bad = [], [], []
  for batch in retrieval_sets.image_batches(
    retrieval_set,
    batch_size=batch_size,
    image_size=config.model.vision.image_size,
    num_threads=config.data.num_threads,
  ):
    found.append(jax.device_get(program(params, batch.visual)))
    ok.append(batch.ok_B)
    bad.extend(batch.bad)
    if on_progress:
      on_progress("captions", min(batch.start + batch_size, total), total)
  ok_U = np.concatenate(ok)[:total]
  joined = jax.tree.map(lambda *a: np.concatenate(a)[:total][ok_U], *found)
  if not np.isfinite(joined.score_B).all():
    raise CaptioningError(
      f"split {retrieval_set.split!r}: the model gives scores that are not "
      "finite"
    )
  words = [
    ids_L[:length]
    for ids_L, length in zip(joined.ids_BL, joined.length_B, strict=True)
  ]
  return Written(
    retrieval_set=retrieval_sets.keep_images(retrieval_set, ok_U, tuple(bad)),
    texts=tuple(tokenizer.text(ids_L[ids_L != marks.end]) for ids_L in words),
    ended=np.array([ids_L[-1] == marks.end for ids_L in words]),
    length=joined.length_B,
    score=joined.score_B,
    seconds=time.perf_counter() - started,
  )


def references(written: Written) -> list[list[str]]:
  """The captions that the data give each image."""
  found = [[] for _ in written.texts]
  for image, text in written.retrieval_set.fits:
    if written.retrieval_set.captions[text] not in found[image]:
      found[image].append(written.retrieval_set.captions[text])
  return found


def _plain(text: str) -> str:
  return " ".join(text.lower().split())


def report(written: Written, *, protocol: Protocol) -> dict[str, Any]:
  """What the result file says of a split, without lineage."""
  own = references(written)
  exact = [
    _plain(text) in map(_plain, texts)
    for text, texts in zip(written.texts, own, strict=True)
  ]
  bad = written.retrieval_set.bad
  return {
    "split": written.retrieval_set.split,
    "protocol": protocol.describe(),
    "metrics": {
      "exact": float(np.mean(exact)),
      "mean_tokens": float(np.mean(written.length)),
      "mean_score": float(np.mean(written.score)),
    },
    "num_images": len(written.texts),
    "num_distinct": len(set(written.texts)),
    "num_unended": int(np.sum(~written.ended)),
    "num_bad_records": len(bad),
    "bad_records": list(bad),
    "timing": {"seconds": round(written.seconds, 3)},
  }


def predictions(written: Written) -> dict[str, list[dict[str, Any]]]:
  """Every caption beside those of the data."""
  found = [
    {
      "image_id": name,
      "caption": text,
      "score": round(float(score), 6),
      "references": texts,
    }
    for name, text, score, texts in zip(
      written.retrieval_set.image_names,
      written.texts,
      written.score,
      references(written),
      strict=True,
    )
  ]
  return {"captions": found}
