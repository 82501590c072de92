"""Batches of random regions and captions, and the smallest CMAL for them.

Anchors, pairs and masks are made by hand: which word names which region is
drawn, not found.
"""

from __future__ import annotations

import numpy as np

from glscl_jax import config as config_lib
from glscl_jax.data import masking
from glscl_jax.types import Batch
from tests import random_pairs

REGION = config_lib.RegionConfig(number=6, feature_width=16, num_classes=20)
NAMES = ("amc", "wrc", "itm")


def config(*names: str, **options) -> config_lib.Config:
  """6 regions of 16 values, 10 tokens; `names`: objectives, by default CMAL's.

  `objectives`: further values of that section.
  """
  weights = random_pairs.only(*(names or NAMES))
  objectives = weights | options.pop("objectives", {})
  return random_pairs.config(
    system="cmal",
    objectives=objectives,
    masking={"max_anchors": 4, "max_pairs": 6, **options.pop("masking", {})},
    text={"norm_eps": 1e-12, **options.pop("text", {})},
    **{"region": REGION, **options},
  )


def batch(
  config: config_lib.Config,
  *,
  seed: int = 0,
  size: int | None = None,
  num_words: tuple[int, ...] | None = None,
  num_regions: tuple[int, ...] | None = None,
  num_anchors: tuple[int, ...] | None = None,
) -> Batch:
  """Distinct random samples.

  By default 4 words and more, 4 regions and more, and 1 to 3 anchors.
  """
  size = size or config.data.batch_size
  rng = np.random.default_rng([seed, 2])
  longest = config.model.text.max_length - 2
  if num_words is None:
    num_words = tuple(rng.integers(4, longest + 1, size))
  if num_regions is None:
    num_regions = tuple(rng.integers(4, config.model.region.number + 1, size))
  if num_anchors is None:
    num_anchors = tuple(rng.integers(1, 4, size))
  plain_ids_V = np.arange(
    random_pairs.FIRST_PLAIN, config.model.text.vocab_size - 1
  )
  region = config.model.region
  rows = []
  for index in range(size):
    count = num_regions[index]
    rows.append(
      sample(
        config,
        rng,
        words=rng.choice(plain_ids_V, num_words[index]),
        features=rng.standard_normal((count, region.feature_width)),
        classes=rng.integers(1, region.num_classes + 1, count),
        anchors=[
          (int(word), int(place))
          for word, place in zip(
            rng.permutation(num_words[index])[: num_anchors[index]],
            rng.permutation(count)[: num_anchors[index]],
            strict=True,
          )
        ],
        index=index,
      )
    )
  return Batch(**{k: np.stack([row[k] for row in rows]) for k in rows[0]})


def slots(items: list, number: int, dtype=np.int32):
  """The items in `number` slots, the rest 0; and which slots hold one."""
  values = np.zeros(number, dtype)
  values[: len(items)] = items
  return values, np.arange(number) < len(items)


def sample(
  config: config_lib.Config,
  rng: np.random.Generator,
  *,
  words: np.ndarray,
  features: np.ndarray,
  classes: np.ndarray,
  anchors: list[tuple[int, int]],
  index: int,
) -> dict[str, np.ndarray]:
  """One row of a batch; an anchor is (number of its word, its region).

  AMC masks one word and hides one region that are no anchors, where there are;
  `masking.swap` none hides the anchors too. WRC has a pair more: the first
  anchor's word and some region.
  """
  text, region, mask = config.model.text, config.model.region, config.masking
  mask_id, count = text.vocab_size - 1, len(words)
  position_T = np.arange(text.max_length)
  ids_T = np.full(text.max_length, random_pairs.PAD, np.int32)
  ids_T[: count + 2] = [random_pairs.START, *words, random_pairs.END]
  mlm = masking.mask_tokens(
    rng,
    ids_T,
    (position_T > 0) & (position_T <= count),
    rate=mask.mlm_rate,
    mask_id=mask_id,
    plain_ids_V=np.arange(random_pairs.FIRST_PLAIN, mask_id),
  )
  anchor_pos = [word + 1 for word, _ in anchors]
  anchor_region = [place for _, place in anchors]
  masked = [p for p in range(1, count + 1) if p not in anchor_pos][:1]
  hidden = [r for r in range(len(classes)) if r not in anchor_region][-1:]
  kept = mask.swap == "none"
  amc_ids_T = ids_T.copy()
  amc_ids_T[masked + anchor_pos * kept] = mask_id
  hidden_region_R = np.zeros(region.number, bool)
  hidden_region_R[hidden + anchor_region * kept] = True
  asked = anchor_pos + masked
  num_asked = masking.anchor_slots(
    text.max_length, rate=mask.mlm_rate, max_anchors=mask.max_anchors
  )
  pairs = [*zip(anchor_pos, anchor_region, strict=True)]
  if anchors and hidden:
    pairs.append((anchor_pos[0], hidden[0]))
  columns = {
    "anchor_pos_BA": (anchor_pos, mask.max_anchors),
    "anchor_region_BA": (anchor_region, mask.max_anchors),
    "amc_pos_BJ": (asked, num_asked),
    "amc_labels_BJ": (ids_T[asked], num_asked),
    "amc_region_BJ": (anchor_region + hidden, region.number),
    "pair_pos_BA": ([word for word, _ in pairs], mask.max_pairs),
    "pair_region_BA": ([place for _, place in pairs], mask.max_pairs),
    "region_class_BR": (classes, region.number),
  }
  made = {name: slots(*items) for name, items in columns.items()}
  corner = np.sort(rng.random((region.number, 2, 2)), axis=1)
  side = corner[:, 1] - corner[:, 0]
  box_R7 = np.concatenate(
    [corner[:, 0], corner[:, 1], side, np.prod(side, axis=1, keepdims=True)], 1
  )
  region_RP = np.zeros((region.number, region.feature_width), np.float32)
  region_RP[: len(features)] = features
  valid_R = made["region_class_BR"][1]
  return {name: values for name, (values, _) in made.items()} | {
    "identity_BM": np.array([index], np.int32),
    "text_ids_BT": ids_T,
    "text_valid_BT": position_T < count + 2,
    "mlm_ids_BT": mlm.ids_T,
    "mlm_pos_BJ": mlm.pos_J,
    "mlm_labels_BJ": mlm.labels_J,
    "mlm_ok_BJ": mlm.ok_J,
    "region_BRP": region_RP,
    "box_BR7": np.where(valid_R[:, None], box_R7, 0).astype(np.float32),
    "region_valid_BR": valid_R,
    "anchor_ok_BA": made["anchor_pos_BA"][1],
    "amc_ids_BT": amc_ids_T,
    "amc_ok_BJ": made["amc_pos_BJ"][1],
    "amc_region_ok_BJ": made["amc_region_BJ"][1],
    "hidden_region_BR": hidden_region_R,
    "pair_ok_BA": made["pair_pos_BA"][1],
  }
