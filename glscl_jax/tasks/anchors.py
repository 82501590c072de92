"""What a model says of the words and regions that name each other (CMAL).

Of the first caption of each image: which word, which class stood where anchors
are swapped, and where words and regions are hidden; and whether a word's state
is nearest to a region it names. Rows are made by the code of the training, with
a seed of their own. Anchors are found by one rule whatever the model was
trained on, so that results of models are of the same words.

Shape letter beside those of types.py: U samples of the split.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from glscl_jax import config as config_lib
from glscl_jax import errors
from glscl_jax.data import order as order_lib
from glscl_jax.data import pipeline, sources
from glscl_jax.data import regions as regions_lib
from glscl_jax.data import tokenizer as tokenizers
from glscl_jax.systems import registry
from glscl_jax.systems.answers import Slots
from glscl_jax.types import Batch, Params

KINDS = ("anchor", "rest", "masked")  # of slots
_METRICS = {  # by kind, of words and of classes
  "words": dict(
    zip(KINDS, ("word_", "rest_word_", "masked_word_"), strict=True)
  ),
  "classes": dict(
    zip(KINDS, ("class_", "rest_class_", "masked_class_"), strict=True)
  ),
}


class AnchorError(errors.UserError):
  """Anchors that cannot be asked for; the message says why."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Protocol:
  """What is asked; part of every result."""

  seed: int = 0  # of what is masked

  def describe(self, config: config_lib.Config) -> dict[str, Any]:
    """What a result file says about it."""
    options = _ask(config, self).masking
    return {
      "captions": "first",
      "seed": self.seed,
      "anchors": f"{options.anchors}, {options.anchor_match}, "
      f"{options.anchor_region}",
      "swap": options.swap,
      "mlm_rate": options.mlm_rate,
      "region_mask_rate": options.region_mask_rate,
      "ties": "count against the model",
    }


def check(config: config_lib.Config) -> None:
  """Raises AnchorError unless an objective trains what is asked."""
  system = registry.find(config)
  if system.answer is None:
    raise AnchorError(
      f"a model of system {config.system!r} knows no words and regions that "
      "name each other"
    )
  if not system.answered(config):
    raise AnchorError(
      f"the model was trained by {', '.join(config.objectives.active)} alone, "
      "which tells nothing of single words and regions"
    )


def _ask(config: config_lib.Config, protocol: Protocol) -> config_lib.Config:
  """The configuration of the rows: one rule for anchors, whole captions."""
  rule = config_lib.MaskingConfig()
  masking = dataclasses.replace(
    config.masking,
    anchors=rule.anchors,
    anchor_match=rule.anchor_match,
    anchor_region=rule.anchor_region,
  )
  augment = dataclasses.replace(config.data.augment, phrases="all")
  data = dataclasses.replace(config.data, seed=protocol.seed, augment=augment)
  return dataclasses.replace(config, masking=masking, data=data)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Samples:
  """Images of a split with their first captions, and rows made of them."""

  source: sources.Source
  record_U: tuple[int, ...]
  captions: tuple[str, ...]
  bad: tuple[str, ...]  # "id: reason" of each record left out
  make_row: Callable[[int], dict[str, np.ndarray]]

  def example(self, number: int) -> sources.Example:
    """The record of a sample."""
    return self.source[self.record_U[number]]


def read(
  source: sources.Source,
  *,
  config: config_lib.Config,
  tokenizer: tokenizers.Tokenizer,
  protocol: Protocol,
  record_U: Sequence[int] | None = None,
) -> Samples:
  """Finds the captions; makes no row yet.

  Args:
    source: the split.
    config: the model's.
    tokenizer: the one it was trained with.
    protocol: seed of the masks.
    record_U: some records, in this order; None: all.

  Raises:
    AnchorError: nothing to ask of this model, or no caption.
    ConfigError: records without regions, or regions of other sizes.
  """
  check(config)
  pipeline.check_schema(config, source)
  tokenizers.check_vocab(config, tokenizer)
  pairs = pipeline.make_pairs(source)
  records, order, captions, bad = [], [], [], []
  for record in range(len(source)) if record_U is None else record_U:
    example = source[record]
    found = [i for i, text in enumerate(example.captions) if text.strip()]
    if not found:
      bad.append(f"{example.id}: no caption")
      continue
    before = int(pairs.ends_A[record - 1]) if record else 0
    records.append(int(record))
    order.append(before + found[0])
    captions.append(example.captions[found[0]])
  if not records:
    raise AnchorError(f"{source.name}: none of its records has a caption")
  asked = _ask(config, protocol)
  kinds = pipeline.mask_kinds(asked) | {"rest"}
  if "cosine_BTR" in registry.find(config).answered(config):
    kinds |= {"pairs"}
  make_row = pipeline.make_row_maker(
    asked,
    tokenizer,
    pairs,
    order=order_lib.Listed(order),
    kinds=kinds,
    first=0,
    count=asked.data.batch_size,
  )
  return Samples(
    source=source,
    record_U=tuple(records),
    captions=tuple(captions),
    bad=tuple(bad),
    make_row=make_row.row,
  )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Said:
  """Slots that were asked for, and what was said."""

  index_BJ: jax.Array | np.ndarray  # token, or region
  label_BJ: jax.Array | np.ndarray
  said_BJ: jax.Array | np.ndarray  # the likeliest
  right_BJ: jax.Array | np.ndarray  # the label is likelier than all others
  ok_BJ: jax.Array | np.ndarray
  anchor_BJ: jax.Array | np.ndarray


def judge(slots: Slots) -> Said:
  """Which slots are answered rightly; a tie is not."""
  logits_BJV = slots.logits_BJV
  number_V = jnp.arange(logits_BJV.shape[2], dtype=slots.labels_BJ.dtype)
  own_BJV = number_V[None, None, :] == slots.labels_BJ[:, :, None]
  label_BJ = jnp.max(jnp.where(own_BJV, logits_BJV, -jnp.inf), axis=2)
  other_BJ = jnp.max(jnp.where(own_BJV, -jnp.inf, logits_BJV), axis=2)
  return Said(
    index_BJ=slots.index_BJ,
    label_BJ=slots.labels_BJ,
    said_BJ=jnp.argmax(logits_BJV, axis=2),
    right_BJ=label_BJ > other_BJ,
    ok_BJ=slots.ok_BJ,
    anchor_BJ=slots.anchor_BJ,
  )


@dataclasses.dataclass(frozen=True)
class Pair:
  """A word, and the region that its state is most similar to."""

  pos: int  # first token
  named: tuple[int, ...]  # regions it names
  best: int
  right: bool  # a region it names is more similar than all others
  chance: float  # of a random region


def judge_pairs(
  cosine_TR: np.ndarray,
  valid_R: np.ndarray,
  pos_A: np.ndarray,
  region_A: np.ndarray,
) -> tuple[Pair, ...]:
  """The anchored words of a sample, each once.

  Args:
    cosine_TR: of each token with each region.
    valid_R: regions that are there.
    pos_A: first token of each word and region that match.
    region_A: the region.
  """
  found = []
  for pos in np.unique(pos_A):
    named_R = np.zeros_like(valid_R)
    named_R[region_A[pos_A == pos]] = True
    named_R &= valid_R
    score_R = cosine_TR[pos]
    others_R = valid_R & ~named_R
    best = float(score_R[named_R].max())
    right = not others_R.any() or best > float(score_R[others_R].max())
    found.append(
      Pair(
        pos=int(pos),
        named=tuple(np.flatnonzero(named_R).tolist()),
        best=int(np.argmax(np.where(valid_R, score_R, -np.inf))),
        right=right,
        chance=float(named_R.sum() / valid_R.sum()),
      )
    )
  return tuple(found)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
  """What was said of each sample; None: nothing trains it."""

  samples: Samples
  rows: Mapping[str, np.ndarray]  # as in Batch, and what RowMaker adds
  words: Said | None
  classes: Said | None
  cosine_UTR: np.ndarray | None
  pairs: tuple[tuple[Pair, ...], ...] | None  # of each sample
  seconds: float


def measure(
  params: Params,
  samples: Samples,
  *,
  config: config_lib.Config,
  batch_size: int,
  on_progress: Callable[[str, int, int], None] | None = None,
) -> Found:
  """Asks for all samples, `batch_size` at a time, the last ones padded.

  Raises:
    AnchorError: the model gives scores that are not finite.
  """
  started = time.perf_counter()
  program = jax.jit(functools.partial(_run, config=config))
  total = len(samples.record_U)
  rows, answers = [], []
  for start in range(0, total, batch_size):
    numbers = range(start, min(start + batch_size, total))
    chunk = [samples.make_row(number) for number in numbers]
    rows += chunk
    padded = chunk + chunk[:1] * (batch_size - len(chunk))
    answers.append(jax.device_get(program(params, _to_batch(padded))))
    if on_progress:
      on_progress("anchors", start + len(chunk), total)
  joined = jax.tree.map(lambda *a: np.concatenate(a)[:total], *answers)
  said, cosine_UTR, finite_U = joined
  if not finite_U.all():
    raise AnchorError(
      f"{samples.source.name}: the model gives scores that are not finite"
    )
  stacked = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
  return Found(
    samples=samples,
    rows=stacked,
    words=said["words"],
    classes=said["classes"],
    cosine_UTR=cosine_UTR,
    pairs=None if cosine_UTR is None else _all_pairs(cosine_UTR, stacked),
    seconds=time.perf_counter() - started,
  )


def _to_batch(rows: Sequence[Mapping[str, np.ndarray]]) -> Batch:
  names = {field.name for field in dataclasses.fields(Batch)} & rows[0].keys()
  return Batch(
    **{name: np.stack([row[name] for row in rows]) for name in names}
  )


def _run(params: Params, batch: Batch, *, config: config_lib.Config):
  """What is said, the similarities, and which samples are all finite."""
  found = registry.find(config).answer(params, batch, config=config)
  finite_B = jnp.ones(len(batch.text_ids_BT), bool)
  if found.cosine_BTR is not None:
    finite_B &= jnp.isfinite(found.cosine_BTR).all(axis=(1, 2))
  said = {"words": None, "classes": None}
  for name, slots in (("words", found.words), ("classes", found.classes)):
    if slots is not None:
      finite_B &= jnp.isfinite(slots.logits_BJV).all(axis=(1, 2))
      said[name] = judge(slots)
  return said, found.cosine_BTR, finite_B


def _all_pairs(cosine_UTR, rows) -> tuple[tuple[Pair, ...], ...]:
  ok_UA = rows["pair_ok_BA"]
  return tuple(
    judge_pairs(
      cosine_UTR[i],
      rows["region_valid_BR"][i],
      rows["pair_pos_BA"][i, ok_UA[i]],
      rows["pair_region_BA"][i, ok_UA[i]],
    )
    for i in range(len(ok_UA))
  )


def split_kinds(
  said: Said, rest_UT: np.ndarray | None
) -> dict[str, np.ndarray]:
  """Slots by kind: anchors, what their phrases have besides, masked ones.

  Args:
    said: of words, or of classes.
    rest_UT: tokens of the second kind; None: there are none, as of regions.
  """
  rest_BJ = np.zeros_like(said.ok_BJ)
  if rest_UT is not None:
    rest_BJ = np.take_along_axis(rest_UT, said.index_BJ, axis=1)
    rest_BJ = rest_BJ & said.ok_BJ & ~said.anchor_BJ
  masked_BJ = said.ok_BJ & ~said.anchor_BJ & ~rest_BJ
  return dict(zip(KINDS, (said.anchor_BJ, rest_BJ, masked_BJ), strict=True))


def _kinds_of(found: Found) -> Iterator[tuple[str, Said, dict]]:
  rest_UT = found.rows[pipeline.REST] if pipeline.REST in found.rows else None
  if found.words is not None:
    yield "words", found.words, split_kinds(found.words, rest_UT)
  if found.classes is not None:
    yield "classes", found.classes, split_kinds(found.classes, None)


def report(
  found: Found, *, config: config_lib.Config, protocol: Protocol
) -> dict[str, Any]:
  """What the result file says of a split, without lineage.

  What was not asked for even once is absent.
  """
  metrics, chance, counts = {}, {}, {}
  for side, said, kinds in _kinds_of(found):
    for kind, ok_BJ in kinds.items():
      if ok_BJ.any():
        name = f"{_METRICS[side][kind]}accuracy"
        counts[name] = int(ok_BJ.sum())
        metrics[name] = float(said.right_BJ[ok_BJ].mean())
        # A model that always gives one answer.
        times_V = np.unique(said.label_BJ[ok_BJ], return_counts=True)[1]
        chance[name] = float(times_V.max() / times_V.sum())
  pairs = [pair for sample in found.pairs or () for pair in sample]
  if pairs:
    counts["pair_accuracy"] = len(pairs)
    metrics["pair_accuracy"] = float(np.mean([pair.right for pair in pairs]))
    chance["pair_accuracy"] = float(np.mean([pair.chance for pair in pairs]))
  if "anchor_ok_BA" in found.rows:
    ok_UA = found.rows["anchor_ok_BA"]
    counts["anchors"] = int(ok_UA.sum())
    metrics["anchors_per_sample"] = float(ok_UA.sum(axis=1).mean())
  bad = found.samples.bad
  return {
    "split": found.samples.source.name.rpartition("/")[2],
    "protocol": protocol.describe(config),
    "metrics": metrics,
    "chance": chance,
    "counts": counts,
    "num_samples": len(found.samples.record_U),
    "num_truncated_captions": int(found.rows[pipeline.TRUNCATED].sum()),
    "num_bad_records": len(bad),
    "bad_records": list(bad),
    "timing": {"seconds": round(found.seconds, 3)},
  }


def class_name(source: sources.Source, number: int) -> str:
  """The first name of a class; 0 is the background."""
  if not number:
    return "background"
  return regions_lib.aliases(source.schema.classes[number - 1])[0]


def piece_name(tokenizer: tokenizers.Tokenizer, number: int) -> str:
  """What a token writes, without the mark of a space; that alone is "_"."""
  (piece,) = tokenizer.pieces([int(number)])
  return piece.strip("\u2581\u0120 ") or "_"


def predictions(
  found: Found, tokenizer: tokenizers.Tokenizer
) -> dict[str, list[dict[str, Any]]]:
  """Everything that was asked of each sample, and what was said."""
  samples = found.samples
  name_of = {
    "words": functools.partial(piece_name, tokenizer),
    "classes": functools.partial(class_name, samples.source),
  }
  listed = [
    {"image_id": samples.example(i).id, "caption": caption}
    for i, caption in enumerate(samples.captions)
  ]
  for side, said, kinds in _kinds_of(found):
    for i, entry in enumerate(listed):
      entry[side] = [
        {
          "at": int(said.index_BJ[i, j]),
          "kind": kind,
          "own": name_of[side](int(said.label_BJ[i, j])),
          "said": name_of[side](int(said.said_BJ[i, j])),
          "right": bool(said.right_BJ[i, j]),
        }
        for kind, ok_BJ in kinds.items()
        for j in np.flatnonzero(ok_BJ[i])
      ]
  for entry, pairs in zip(listed, found.pairs or (), strict=False):
    entry["pairs"] = [
      {
        "at": pair.pos,
        "regions": list(pair.named),
        "nearest": pair.best,
        "right": pair.right,
      }
      for pair in pairs
    ]
  return {"samples": listed}
