"""From records to batches: the chain that feeds training.

A training example is one (image, caption) pair; an epoch is all pairs. Row k
of the run shows the pair that `order.py` says, whatever the number of
processes, threads or workers: process p of P makes rows [p B/P, (p+1) B/P) of
each global batch of B, so the global batches are the same arrays too. All
randomness of a row comes from (seed, epoch, pair), so a resumed run sees the
same augmentation and the same masks.

Bad records are replaced by others drawn from the row's own generator, and
travel with the batch as flags, which the iterator counts and names.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import grain
import jax
import numpy as np

from glscl_jax import config as config_lib
from glscl_jax import errors, types
from glscl_jax import sharding as sharding_lib
from glscl_jax.data import anchors as anchors_lib
from glscl_jax.data import masking, sources, transforms
from glscl_jax.data import order as order_lib
from glscl_jax.data import regions as regions_lib
from glscl_jax.data import tokenizer as tokenizer_lib

_log = logging.getLogger(__name__)

MAX_TRIES = 8  # records tried for one row before the run gives up
MIN_ROWS = 1000  # rows read before the share of bad ones is judged
NO_TEXT, NO_IMAGE = 1, 2  # why a record was replaced
REASONS = {NO_TEXT: "empty caption", NO_IMAGE: "unreadable image"}

# Of rows, beside the arrays of Batch.
TRUNCATED = "truncated"  # whether the caption was cut
REST = "anchor_rest_T"  # bool, tokens of anchors' phrases but the first
_BAD_PAIR, _BAD_REASON = "bad_pair", "bad_reason"


class BadDataError(errors.UserError):
  """Too many records cannot be used; the message lists the first ones."""


@dataclasses.dataclass(frozen=True)
class Pairs:
  """The (image, caption) pairs of a source, numbered record by record.

  A record without captions still counts as one pair: a bad one, reported.
  """

  source: sources.Source
  ends_A: np.ndarray  # int64, running total of pairs after each record

  def __len__(self) -> int:
    return int(self.ends_A[-1]) if len(self.ends_A) else 0

  def __getitem__(self, pair: int) -> tuple[sources.Example, str]:
    record = int(np.searchsorted(self.ends_A, pair, side="right"))
    example = self.source[record]
    first = int(self.ends_A[record - 1]) if record else 0
    captions = example.captions or ("",)
    return example, captions[pair - first]


def make_pairs(source: sources.Source) -> Pairs:
  """Numbers the captions of all records."""
  counts_A = np.maximum(1, source.count_captions())
  return Pairs(source, np.cumsum(counts_A, dtype=np.int64))


def identity(example: sources.Example, kind: str) -> np.ndarray:
  """The ids of an example, int32: who shares one with it shows the same.

  Its image; for "caption" also its first caption that is not blank.
  """
  ids = [example.image_id]
  if kind == "caption":
    name = next(filter(str.strip, example.captions))
    ids.append(zlib.crc32(name.encode()) >> 1)  # 31 bits: not negative
  return np.array(ids, np.int32)


def mask_kinds(config: config_lib.Config) -> frozenset[str]:
  """Which masks active objectives read.

  mlm, scl, keep, token, block, false; of CMAL mlm, anchors, amc, regions,
  pairs. Those of the versions that the systems encode, which data cannot
  import.
  """
  weight = config.objectives
  if reads_regions(config):
    return _region_kinds(config)
  image = weight.mgsc_image > 0 or weight.mltc_image > 0
  text = weight.mgsc_text > 0 or weight.mltc_text > 0
  kinds = set()
  if weight.mlm > 0:
    kinds |= {"mlm"}
  if weight.mgsc_image > 0:
    kinds |= {"keep"}
  if weight.mltc_image > 0:
    kinds |= {"token"}
  if text:
    kinds |= {"scl"}
  if weight.completion_targets == "partner_masked":
    # The complete input of one modality stands beside a masked one.
    kinds |= ({"scl"} if image else set()) | ({"keep"} if text else set())
  if weight.mim > 0:
    kinds |= {"block"}
  if weight.itm > 0 and weight.itm_negatives == "dataset":
    kinds |= {"false"}
  return frozenset(kinds)


def _region_kinds(config: config_lib.Config) -> frozenset[str]:
  weight, swap = config.objectives, config.masking.swap
  regions = weight.mrc > 0 or weight.mrfr > 0
  # Both ask for the anchors where their side is swapped, else for any.
  swapped_words = weight.mlm > 0 and swap in ("both", "text")
  swapped_regions = regions and swap in ("both", "image")
  kinds = {
    "mlm": weight.mlm > 0 and not swapped_words,
    "anchors": weight.amc > 0 or swapped_words or swapped_regions,
    "amc": weight.amc > 0 or swapped_words,
    "regions": weight.amc > 0 or regions,
    "pairs": weight.wrc > 0,
  }
  return frozenset(name for name, read in kinds.items() if read)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowMaker:
  """Makes row `position` of the run; picklable, so that workers can run it."""

  config: config_lib.Config
  tokenizer: tokenizer_lib.Tokenizer
  pairs: Pairs
  order: order_lib.Order
  plain_ids_V: np.ndarray  # int32 ids a random replacement is drawn from
  names: anchors_lib.Names | None  # of the classes of regions; None: images
  kinds: frozenset[str]  # of masks; "rest" beside "anchors" adds REST
  first: int  # of this process's rows in a global batch
  count: int  # of this process's rows in a global batch

  def __call__(self, local: int) -> dict[str, np.ndarray]:
    """Row number `local` among those of this process, counted from step 0."""
    step, offset = divmod(int(local), self.count)
    return self.row(step * self.config.data.batch_size + self.first + offset)

  def row(self, position: int) -> dict[str, np.ndarray]:
    """Row `position` of the run: arrays named as in Batch, and flags."""
    place = self.order(position)
    epoch, pair = place.epoch, place.pair
    bad: list[tuple[int, int]] = []
    example, caption, image_YXC = self._read(epoch, pair, "own", bad)
    pair_key = (self.config.data.seed, epoch, pair)
    tokens = self._tokens(pair_key, caption, place.length)
    row = {}
    if image_YXC is not None:
      row["image_BYXC"] = self._augment(pair_key, "augment", image_YXC, caption)
    row["identity_BM"] = identity(example, self.config.data.identity)
    row |= self._text(pair_key, tokens)
    if self.names is not None:
      return row | self._regions(pair_key, tokens, example) | _flags(bad)
    row |= self._patches(pair_key)
    if "false" in self.kinds:
      row |= self._false_image(position, pair_key, bad)
    return row | _flags(bad)

  def _read(
    self, epoch: int, pair: int, stream: str, bad: list[tuple[int, int]]
  ) -> tuple[sources.Example, str, np.ndarray | None]:
    """The pair, or the first usable one of those drawn from its own key.

    Systems that read regions get no image: it is not decoded.
    """
    seed, first = self.config.data.seed, pair
    tried = []
    for attempt in range(MAX_TRIES):
      if attempt:
        rng = masking.sample_rng(seed, epoch, first, f"{stream} {attempt}")
        pair = int(rng.integers(len(self.pairs)))
      example, caption = self.pairs[pair]
      if not caption.strip():
        tried.append((pair, NO_TEXT))
      else:
        try:
          image_YXC = (
            transforms.decode(example.image) if self.names is None else None
          )
        except transforms.BadImage:
          tried.append((pair, NO_IMAGE))
        else:
          bad.extend(tried)
          return example, caption, image_YXC
    names = "; ".join(
      f"{self.pairs[p][0].id}: {REASONS[reason]}" for p, reason in tried
    )
    raise BadDataError(
      f"{self.pairs.source.name}: {MAX_TRIES} records drawn one after another"
      f" cannot be used ({names}). Prepare the data again."
    )

  def _augment(
    self,
    pair_key: tuple[int, int, int],
    stream: str,
    image_YXC: np.ndarray,
    caption: str,
  ) -> np.ndarray:
    return transforms.augment(
      masking.sample_rng(*pair_key, stream),
      image_YXC,
      caption,
      size=self.config.model.vision.image_size,
      config=self.config.data.augment,
    )

  def _tokens(
    self, pair_key: tuple[int, int, int], caption: str, length: int | None
  ) -> tokenizer_lib.Tokens:
    if self.config.data.augment.phrases == "subset":
      rng = masking.sample_rng(*pair_key, "phrases")
      caption = transforms.phrase_subset(rng, caption)
    return self.tokenizer.encode(
      caption, length or self.config.model.text.max_length
    )

  def _text(
    self, pair_key: tuple[int, int, int], tokens: tokenizer_lib.Tokens
  ) -> dict[str, np.ndarray]:
    options = self.config.masking
    real_T = tokens.valid_T & (tokens.word_T >= 0)
    row = {
      "text_ids_BT": tokens.ids_T,
      "text_valid_BT": tokens.valid_T,
      TRUNCATED: np.bool_(tokens.truncated),
    }
    if "mlm" in self.kinds:
      masked = masking.mask_tokens(
        masking.sample_rng(*pair_key, "mlm"),
        tokens.ids_T,
        real_T,
        rate=options.mlm_rate,
        mask_id=self.tokenizer.mask_id,
        plain_ids_V=self.plain_ids_V,
        scheme=options.mlm_scheme,
        word_T=tokens.word_T if options.mlm_whole_word else None,
        padded_draw=options.mlm_padded_draw,
      )
      row |= {
        "mlm_ids_BT": masked.ids_T,
        "mlm_pos_BJ": masked.pos_J,
        "mlm_labels_BJ": masked.labels_J,
        "mlm_ok_BJ": masked.ok_J,
      }
    if "scl" in self.kinds:
      masked = masking.mask_completion(
        masking.sample_rng(*pair_key, "completion"),
        tokens.ids_T,
        real_T,
        rate=options.completion_text_rate,
        mask_id=self.tokenizer.mask_id,
        with_replacement=options.text_mask_with_replacement,
      )
      row |= {
        "scl_ids_BT": masked.ids_T,
        "scl_pos_BJ": masked.pos_J,
        "scl_ok_BJ": masked.ok_J,
      }
    return row

  def _regions(
    self,
    pair_key: tuple[int, int, int],
    tokens: tokenizer_lib.Tokens,
    example: sources.Example,
  ) -> dict[str, np.ndarray]:
    """What CMAL reads in place of an image, with its anchors and masks."""
    options, number = self.config.masking, self.config.model.region.number
    row = regions_lib.pad(example.regions, number=number)
    if "regions" in self.kinds and "anchors" not in self.kinds:
      row |= self._region_mask(pair_key, np.zeros(0, int), row)
    if not self.kinds & {"anchors", "pairs"}:
      return row
    found = anchors_lib.find_anchors(
      masking.sample_rng(*pair_key, "anchors"),
      tokens,
      example.regions,
      self.names,
      rules=anchors_lib.Rules(
        match=options.anchor_match,
        region=options.anchor_region,
        source=options.anchors,
        max_anchors=options.max_anchors,
        max_pairs=options.max_pairs,
      ),
      num_regions=number,
      unknown_id=self.tokenizer.unknown_id,
    )
    if "pairs" in self.kinds:
      row |= {
        "pair_pos_BA": found.pair_pos_J,
        "pair_region_BA": found.pair_region_J,
        "pair_ok_BA": found.pair_ok_J,
      }
    if "anchors" in self.kinds:
      row |= {
        "anchor_pos_BA": found.pos_A,
        "anchor_region_BA": found.region_A,
        "anchor_ok_BA": found.ok_A,
      }
      if "rest" in self.kinds:
        row[REST] = found.rest_T
      if "amc" in self.kinds:
        row |= self._amc(pair_key, tokens, found)
      if "regions" in self.kinds:
        row |= self._region_mask(pair_key, found.region_A[found.ok_A], row)
    return row

  def _amc(
    self,
    pair_key: tuple[int, int, int],
    tokens: tokenizer_lib.Tokens,
    found: anchors_lib.Anchors,
  ) -> dict[str, np.ndarray]:
    """The text around the anchors."""
    options = self.config.masking
    treat = {"both": "swap", "text": "swap", "image": "show", "none": "hide"}
    text = masking.mask_around_anchors(
      masking.sample_rng(*pair_key, "amc"),
      tokens.ids_T,
      tokens.valid_T & (tokens.word_T >= 0),
      found.pos_A[found.ok_A],
      found.rest_T,
      rate=options.mlm_rate,
      max_anchors=options.max_anchors,
      mask_id=self.tokenizer.mask_id,
      plain_ids_V=self.plain_ids_V,
      anchors=treat[options.swap],
    )
    return {
      "amc_ids_BT": text.ids_T,
      "amc_pos_BJ": text.pos_J,
      "amc_labels_BJ": text.labels_J,
      "amc_ok_BJ": text.ok_J,
    }

  def _region_mask(
    self,
    pair_key: tuple[int, int, int],
    anchor_W: np.ndarray,
    row: Mapping[str, np.ndarray],
  ) -> dict[str, np.ndarray]:
    """The regions that are hidden around the anchors' regions."""
    regions = masking.mask_regions(
      masking.sample_rng(*pair_key, "regions"),
      row["region_valid_BR"],
      anchor_W,
      rate=self.config.masking.region_mask_rate,
      hide_anchors=self.config.masking.swap == "none",
    )
    return {
      "amc_region_BJ": regions.pos_J,
      "amc_region_ok_BJ": regions.ok_J,
      "hidden_region_BR": regions.hidden_R,
    }

  def _patches(self, pair_key: tuple[int, int, int]) -> dict[str, np.ndarray]:
    options = self.config.masking
    num_patches = self.config.model.vision.num_patches
    row = {}
    if "keep" in self.kinds:
      row["keep_idx_BI"] = masking.drop_patches(
        masking.sample_rng(*pair_key, "drop"),
        num_patches,
        drop_ratio=options.image_drop_ratio,
      )
    if "token" in self.kinds:
      row["tok_idx_BI"] = masking.token_patches(
        masking.sample_rng(*pair_key, "token"),
        num_patches,
        ratio=options.image_token_ratio,
      )
    if "block" in self.kinds:
      row["block_idx_BI"] = masking.block_patches(
        masking.sample_rng(*pair_key, "block"),
        self.config.model.vision.image_size,
        self.config.model.vision.patch_size,
        block_size=options.image_block_size,
        ratio=options.image_block_ratio,
      )
    return row

  def _false_image(
    self,
    position: int,
    pair_key: tuple[int, int, int],
    bad: list[tuple[int, int]],
  ) -> dict[str, np.ndarray]:
    """ITM with a random training image where the label is 0."""
    seed, epoch, _ = pair_key
    group = min(self.config.objectives.neg_group, self.config.data.batch_size)
    number, offset = divmod(position, group)
    labels_G = masking.sample_rng(seed, 0, number, "itm").permutation(group)
    rng = masking.sample_rng(*pair_key, "false")
    other = int(rng.integers(len(self.pairs)))
    _, caption, image_YXC = self._read(epoch, other, "false", bad)
    return {
      "itm_labels_B": np.int32(labels_G[offset] < group // 2),
      "false_image_BYXC": self._augment(
        pair_key, "augment false", image_YXC, caption
      ),
    }


def _flags(bad: list[tuple[int, int]]) -> dict[str, np.ndarray]:
  """Fixed-size arrays that tell the main process which pairs were bad."""
  pair_A = np.full(2 * MAX_TRIES, -1, np.int64)
  reason_A = np.zeros(2 * MAX_TRIES, np.int8)
  for i, (pair, reason) in enumerate(bad):
    pair_A[i], reason_A[i] = pair, reason
  return {_BAD_PAIR: pair_A, _BAD_REASON: reason_A}


class TrainIterator:
  """Endless batches with an exact, tiny, process-independent state.

  Yields dicts from Batch field names to this process's rows of the global
  batch. Batches are made ahead by `config.data.num_threads` threads, or by
  `num_workers` processes with one thread each; neither changes a byte.
  """

  def __init__(self, make_row: RowMaker, *, max_bad_share: float):
    self._make_row = make_row
    self._max_bad_share = max_bad_share
    self._step = 0
    self._batches = None
    self._rows = 0
    self._truncated = 0
    self._bad_rows = 0
    self._bad: dict[int, tuple[str, str]] = {}

  @property
  def num_pairs(self) -> int:
    """Pairs of an epoch, of all processes."""
    return len(self._make_row.pairs)

  def __iter__(self) -> TrainIterator:
    return self

  def __next__(self) -> dict[str, np.ndarray]:
    if self._batches is None:
      self._batches = iter(self._dataset())
    batch = next(self._batches)
    self._count(
      batch.pop(_BAD_PAIR), batch.pop(_BAD_REASON), batch.pop(TRUNCATED)
    )
    self._step += 1  # last: a batch that was not delivered comes again
    return batch

  def get_state(self) -> dict[str, int]:
    """What JSON needs to continue here, the same in every process."""
    return {"step": self._step}

  def set_state(self, state: Mapping[str, int]) -> None:
    """Continues with the batch after the one `get_state` followed."""
    self.close()
    self._step = int(state["step"])

  def close(self) -> None:
    """Stops threads and workers; the iterator can be used again."""
    if self._batches is not None:
      self._batches.close()
      self._batches = None

  def report(self) -> dict[str, Any]:
    """What this process has met since it started (not since step 0).

    Returns:
      rows: delivered. bad_rows: of them, how many replaced a bad record (its
      own or its false image). truncated: rows whose caption was cut to the
      limit. bad_records: "id: reason" of each distinct bad record.
    """
    return {
      "rows": self._rows,
      "bad_rows": self._bad_rows,
      "truncated": self._truncated,
      "bad_records": [f"{name}: {why}" for name, why in self._bad.values()],
    }

  def _dataset(self) -> grain.IterDataset:
    data = self._make_row.config.data
    count = self._make_row.count
    # Batched before the threads and workers: their number changes no batch.
    dataset = (
      grain.MapDataset.range(self._step * count, sys.maxsize // count * count)
      .map(self._make_row)
      .batch(count, drop_remainder=True)
      .to_iter_dataset(
        grain.ReadOptions(
          num_threads=1 if data.num_workers else data.num_threads,
          prefetch_buffer_size=data.prefetch,
        )
      )
    )
    if data.num_workers:
      dataset = dataset.mp_prefetch(
        grain.MultiprocessingOptions(
          num_workers=data.num_workers,
          per_worker_buffer_size=max(1, data.prefetch // data.num_workers),
        )
      )
    return dataset

  def _count(
    self, pair_BA: np.ndarray, reason_BA: np.ndarray, truncated_B: np.ndarray
  ) -> None:
    self._rows += len(truncated_B)
    self._truncated += int(truncated_B.sum())
    self._bad_rows += int((pair_BA >= 0).any(axis=1).sum())
    found_BA = pair_BA >= 0
    for pair, reason in zip(
      pair_BA[found_BA].tolist(), reason_BA[found_BA].tolist(), strict=True
    ):
      if pair not in self._bad:
        name = self._make_row.pairs[pair][0].id
        self._bad[pair] = (name, REASONS[reason])
        _log.warning(
          "record %s of %s: %s; another one takes its place",
          name,
          self._make_row.pairs.source.name,
          REASONS[reason],
        )
    self._judge()

  def _judge(self) -> None:
    """Fails when more rows are bad than the limit explains.

    Three standard deviations above it, so that no set within the limit is
    failed by chance; with a limit of 0 the first bad row fails.
    """
    limit = self._max_bad_share * self._rows
    if self._max_bad_share > 0 and self._rows < MIN_ROWS:
      return
    if self._bad_rows > limit + 3 * limit**0.5:
      first = "; ".join(self.report()["bad_records"][:10])
      raise BadDataError(
        f"{self._make_row.pairs.source.name}: {self._bad_rows} of"
        f" {self._rows} rows met a bad record, config.data.max_bad_share is"
        f" {self._max_bad_share}. First ones: {first}. Prepare the data again"
        " or raise the limit."
      )


def check_named(config: config_lib.Config) -> None:
  """Raises ConfigError where no data directory is named."""
  if not config.data.dir:
    raise config_lib.ConfigError(
      "config.data.dir is empty: make a data directory with"
      " launch/prepare.py and name it with --config.data.dir=DIR"
    )


def reads_regions(config: config_lib.Config) -> bool:
  """Whether the system reads regions in place of images."""
  return config.system == "cmal"


def check_schema(config: config_lib.Config, source: sources.Source) -> None:
  """Checks that records hold what the system reads, regions or images.

  Raises:
    ConfigError: naming what is missing, or the sizes to set.
  """
  schema, system = source.schema, config.system
  if not reads_regions(config):
    if schema is not None and not schema.images:
      raise config_lib.ConfigError(
        f"{source.name}: regions without images, but system {system!r} reads"
        " images: name another data directory with --config.data.dir, or train"
        " --config.system=cmal"
      )
    return
  if schema is None:
    raise config_lib.ConfigError(
      f"{source.name}: no regions, but system {system!r} reads them in place of"
      " images: make the data directory with launch/prepare.py"
      " --source=regions or --source=scenes"
    )
  for name, found in (
    ("feature_width", schema.width),
    ("num_classes", len(schema.classes)),
  ):
    asked = getattr(config.model.region, name)
    if asked != found:
      raise config_lib.ConfigError(
        f"model.region.{name}: is {asked}, but the regions of {source.name}"
        f" have {found}: set --config.model.region.{name}={found}"
      )


def make_train_iterator(
  config: config_lib.Config,
  tokenizer: tokenizer_lib.Tokenizer,
  *,
  process_index: int = 0,
  process_count: int = 1,
  source: sources.Source | None = None,
) -> TrainIterator:
  """The training batches of one process.

  Args:
    config: the run's.
    tokenizer: whose vocabulary must be the model's.
    process_index: which of the `process_count` blocks of rows to make.
    process_count: how many blocks a global batch has; processes that hold the
      same rows (tensor parallel) ask for the same block.
    source: records to use instead of `config.data.train_split`.

  Raises:
    ConfigError: sizes that do not fit, a data directory that is not named or
      lacks what the system reads, a tokenizer of another vocabulary, or a split
      without records.
  """
  data = config.data
  check_batch(config, {}, process_count)
  if source is None:
    check_named(config)
    source = sources.open_source(data.dir, data.train_split)
  # First: data of another kind have another vocabulary too.
  check_schema(config, source)
  tokenizer_lib.check_vocab(config, tokenizer)
  pairs = make_pairs(source)
  if not len(pairs):
    raise config_lib.ConfigError(f"{source.name}: no records to train on")
  count = data.batch_size // process_count
  make_row = make_row_maker(
    config,
    tokenizer,
    pairs,
    order=_make_order(config, tokenizer, source, len(pairs)),
    kinds=mask_kinds(config),
    first=process_index * count,
    count=count,
  )
  return TrainIterator(make_row, max_bad_share=data.max_bad_share)


def _make_order(
  config: config_lib.Config,
  tokenizer: tokenizer_lib.Tokenizer,
  source: sources.Source,
  num_pairs: int,
) -> order_lib.Order:
  data = config.data
  if not data.text_lengths:
    return order_lib.Shuffled(num_pairs, seed=data.seed)
  return order_lib.ByLength(
    source.count_tokens(tokenizer),
    (*data.text_lengths, config.model.text.max_length),
    batch_size=data.batch_size,
    seed=data.seed,
  )


def make_row_maker(
  config: config_lib.Config,
  tokenizer: tokenizer_lib.Tokenizer,
  pairs: Pairs,
  *,
  order: order_lib.Order,
  kinds: frozenset[str],
  first: int,
  count: int,
) -> RowMaker:
  """What makes rows of these pairs; the arguments are RowMaker's."""
  schema = pairs.source.schema
  special = np.array(sorted(tokenizer.special_ids), np.int32)
  return RowMaker(
    config=config,
    tokenizer=tokenizer,
    pairs=pairs,
    order=order,
    plain_ids_V=np.setdiff1d(
      np.arange(tokenizer.vocab_size, dtype=np.int32), special
    ),
    names=(
      anchors_lib.make_names(schema.classes, tokenizer)
      if reads_regions(config)
      else None
    ),
    kinds=kinds,
    first=first,
    count=count,
  )


def check_batch(
  config: config_lib.Config, mesh_shape: Mapping[str, int], process_count: int
) -> None:
  """Checks that the global batch divides over processes and devices.

  Args:
    config: the run's.
    mesh_shape: size of each mesh axis; only "data" and "fsdp" split batches.
    process_count: number of blocks the batch is read in.

  Raises:
    ConfigError: naming the number that does not divide the batch.
  """
  batch_size = config.data.batch_size
  num_shards = 1
  for axis, size in mesh_shape.items():
    num_shards *= size if axis in ("data", "fsdp") else 1
  for name, number in (
    ("processes", process_count),
    ("shards of the mesh's data and fsdp axes", num_shards),
  ):
    if batch_size % number:
      raise config_lib.ConfigError(
        f"config.data.batch_size {batch_size} is not divisible by the"
        f" {number} {name}"
      )


def process_block(
  mesh: jax.sharding.Mesh, *, batch_size: int
) -> tuple[int, int]:
  """Which block of a batch's rows this process holds, and of how many.

  What `make_train_iterator` takes as process_index and process_count. It
  differs from jax's numbers where the tensor axis spans processes: those hold
  the same rows.

  Raises:
    ConfigError: the mesh gives this process rows that are not one block.
  """
  sharding = sharding_lib.batch_sharding(mesh)
  slices = sharding.addressable_devices_indices_map((batch_size,)).values()
  spans = [rows.indices(batch_size)[:2] for (rows,) in slices]
  return _block(spans, batch_size)


def _block(
  spans: Sequence[tuple[int, int]], batch_size: int
) -> tuple[int, int]:
  spans = sorted(set(spans))
  start, stop = spans[0][0], spans[-1][1]
  size = stop - start
  held = sum(last - first for first, last in spans)
  if held != size or start % size or batch_size % size:
    raise config_lib.ConfigError(
      f"config.mesh: this process would hold rows {spans} of a batch of"
      f" {batch_size}, which is not one block of equal blocks: order the"
      " mesh's devices by process"
    )
  return start // size, batch_size // size


def global_batch(
  local: Mapping[str, np.ndarray], mesh: jax.sharding.Mesh
) -> types.Batch:
  """Makes global arrays, split over the mesh's data and fsdp axes, of rows."""
  sharding = sharding_lib.batch_sharding(mesh)
  return types.Batch(
    **{
      name: jax.make_array_from_process_local_data(sharding, rows)
      for name, rows in local.items()
    }
  )
