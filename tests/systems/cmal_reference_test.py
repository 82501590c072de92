"""CMAL against an independent NumPy version of its equations, in float64."""

from __future__ import annotations

import itertools

import jax
import numpy as np
import pytest
import scipy.special

from glscl_jax import config as config_lib
from tests import random_pairs, random_regions
from tests.systems.maskvlm_reference_test import (
  attention,
  cross_entropy,
  dense,
  gelu,
  layer,
  mlp,
  norm,
)

EVERY = config_lib.SYSTEM_OBJECTIVES["cmal"]
SIZE, T = 4, 10


def make_config(swap="both", layers=(0, 0), rescale=False, **objectives):
  # Groups of two samples: who is shown the other's regions is all that is left
  # to the draw. Two heads.
  return random_regions.config(
    *EVERY,
    depth=2,
    width=128,
    batch_size=SIZE,
    unimodal_layers=layers,
    objectives={"neg_group": 2, **objectives},
    masking={"swap": swap, "swap_rescale": rescale},
  )


def blocks(p, x, valid):
  for i in range(len(p["layers"]["norm1"]["scale"])):
    b = layer(p, i)
    x = norm(b["norm1"], x + attention(b["attention"], x, x, valid), 1e-12)
    x = norm(b["norm2"], x + mlp(b["mlp"], x), 1e-12)
  return x


class Reference:
  """One batch, sample by sample."""

  def __init__(self, params, batch, swap, *, rescale=False):
    self.p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    self.batch, self.swap, self.rescale = batch, swap, rescale

  def text_place(self, b):
    p, valid = self.p["text"], self.batch.text_valid_BT[b]
    rows = np.where(valid, np.cumsum(valid) - 1, 0)
    return p["position_embedding"][rows] + p["type_embedding"][0]

  def region_place(self, b):
    p = self.p["region"]
    box = norm(p["box_norm"], dense(p["box"], self.batch.box_BR7[b]), 1e-12)
    return box + self.p["text"]["type_embedding"][1]

  def words(self, b, ids):
    p = self.p["text"]
    x = p["word_embedding"][ids]
    if "blocks" in p:
      x = norm(p["first_norm"], x + self.text_place(b), 1e-12)
      x = blocks(p["blocks"], x, self.batch.text_valid_BT[b])
    return x

  def regions(self, b, hide=False):
    p = self.p["region"]
    features = self.batch.region_BRP[b].astype(float)
    if hide:
      features[self.batch.hidden_region_BR[b]] = p["mask_feature"]["value"]
    x = norm(p["feature_norm"], dense(p["feature"], features), 1e-12)
    if "blocks" in p:
      x = norm(p["first_norm"], x + self.region_place(b), 1e-12)
      x = blocks(p["blocks"], x, self.batch.region_valid_BR[b])
    return x

  def run(self, b, words, regions, sides=(), c=None):
    """H of text b with regions of sample c, after a swap of some sides."""
    c, batch = b if c is None else c, self.batch
    words, regions = words.copy(), regions.copy()
    old_words, old_regions = words.copy(), regions.copy()
    for a in np.flatnonzero(batch.anchor_ok_BA[b]):
      t, r = batch.anchor_pos_BA[b, a], batch.anchor_region_BA[b, a]
      longer = np.linalg.norm(old_regions[r]) / np.linalg.norm(old_words[t])
      if not self.rescale:
        longer = 1.0
      if "text" in sides:
        words[t] = old_regions[r] / longer
      if "image" in sides:
        regions[r] = old_words[t] * longer
    x = np.concatenate(
      [
        norm(self.p["text"]["norm"], words + self.text_place(b), 1e-12),
        norm(self.p["region"]["norm"], regions + self.region_place(c), 1e-12),
      ]
    )
    valid = np.concatenate([batch.text_valid_BT[b], batch.region_valid_BR[c]])
    return blocks(self.p["encoder"], x, valid)

  def head(self, name, x):
    p = self.p[name]
    return norm(p["norm"], gelu(dense(p["fc1"], x)), 1e-12)

  def word_losses(self, b, states, positions, labels):
    table = self.p["text"]["word_embedding"]
    logits = self.head("word_head", states) @ table.T
    logits += self.p["word_head"]["bias"]
    return [
      cross_entropy(logits[t], label)
      for t, label in zip(positions, labels, strict=True)
    ]

  def asked_words(self, b, shown):
    """Positions and labels of AMC; without anchors where they are shown."""
    batch = self.batch
    anchors = set(batch.anchor_pos_BA[b][batch.anchor_ok_BA[b]].tolist())
    found = [
      (int(t), int(label))
      for t, label, ok in zip(
        batch.amc_pos_BJ[b],
        batch.amc_labels_BJ[b],
        batch.amc_ok_BJ[b],
        strict=True,
      )
      if ok and not (shown and int(t) in anchors)
    ]
    return [t for t, _ in found], [label for _, label in found]

  def asked_regions(self, b, shown):
    batch = self.batch
    anchors = set(batch.anchor_region_BA[b][batch.anchor_ok_BA[b]].tolist())
    return [
      int(r)
      for r in batch.amc_region_BJ[b][batch.amc_region_ok_BJ[b]]
      if not (shown and int(r) in anchors)
    ]

  def class_losses(self, b, states, slots):
    x = self.head("region_head", states[T:])
    logits = dense(self.p["region_head"]["fc2"], x)
    classes = self.batch.region_class_BR[b]
    return [cross_entropy(logits[r], classes[r]) for r in slots if classes[r]]

  def feature_losses(self, b, states, slots):
    kernel = self.p["region"]["feature"]["kernel"]
    x = self.head("feature_head", states[T:]) @ kernel.T
    x += self.p["feature_head"]["bias"]
    wanted = self.batch.region_BRP[b]
    return [np.mean((x[r] - wanted[r]) ** 2) for r in slots]

  def pair_loss(self, b, states):
    batch = self.batch
    unit = states / np.linalg.norm(states, axis=1, keepdims=True)
    words = np.flatnonzero(batch.text_valid_BT[b])
    places = np.flatnonzero(batch.region_valid_BR[b])
    logits = unit[:T] @ unit[T:].T / self.p["temperature"]["value"]
    total = scipy.special.logsumexp(logits[np.ix_(words, places)])
    pairs = batch.pair_ok_BA[b]
    if not pairs.any():
      return []
    cells = logits[batch.pair_pos_BA[b][pairs], batch.pair_region_BA[b][pairs]]
    return [np.mean(total - cells)]

  def match_loss(self, b, c):
    states = self.run(
      b, self.words(b, self.batch.text_ids_BT[b]), self.regions(c), c=c
    )
    pooled = np.tanh(dense(self.p["pooler"], states[0]))
    logits = dense(self.p["match_head"]["fc"], pooled)
    return cross_entropy(logits, int(b == c))

  def losses(self):
    """Means of each objective; ITM: one value for each possible draw."""
    batch, sides = (
      self.batch,
      {"both": ("text", "image"), "none": ()}.get(self.swap, (self.swap,)),
    )
    text_side, image_side = (
      (side,) * (side in sides) for side in ("text", "image")
    )
    shown = {
      side: bool(sides) and side not in sides for side in ("text", "image")
    }
    found = {name: [] for name in ("amc_words", "amc_regions", *EVERY)}
    for b in range(SIZE):
      full, amc = (
        self.words(b, ids[b]) for ids in (batch.text_ids_BT, batch.amc_ids_BT)
      )
      hidden, seen = self.regions(b, hide=True), self.regions(b)
      words = self.asked_words(b, shown["text"])
      slots = self.asked_regions(b, shown["image"])
      states = self.run(b, amc, hidden, sides)
      found["amc_words"] += self.word_losses(b, states, *words)
      found["amc_regions"] += self.class_losses(b, states, slots)
      if text_side:
        states = self.run(b, amc, seen, text_side)
      else:
        states = self.run(b, self.words(b, batch.mlm_ids_BT[b]), seen)
        ok = batch.mlm_ok_BJ[b]
        words = batch.mlm_pos_BJ[b][ok], batch.mlm_labels_BJ[b][ok]
      found["mlm"] += self.word_losses(b, states, *words)
      states = self.run(b, full, hidden, image_side)
      found["mrc"] += self.class_losses(b, states, slots)
      found["mrfr"] += self.feature_losses(b, states, slots)
      found["wrc"] += self.pair_loss(b, self.run(b, full, seen))
    means = {name: np.mean(v) if v else 0.0 for name, v in found.items()}
    means["amc"] = means["amc_words"] + means["amc_regions"]
    # In each pair of samples the one keeps its regions, the other does not.
    own = [self.match_loss(b, b) for b in range(SIZE)]
    false = [self.match_loss(b, b ^ 1) for b in range(SIZE)]
    means["itm"] = [
      np.mean(
        [
          loss
          for group, kept in enumerate(choice)
          for loss in (own[2 * group + kept], false[2 * group + 1 - kept])
        ]
      )
      for choice in itertools.product((0, 1), repeat=SIZE // 2)
    ]
    return means


def check(config, batch, swap="both"):
  params = random_pairs.spread_params(config)
  found = random_pairs.loss_function(config)(params, batch, jax.random.key(0))
  rescale = config.masking.swap_rescale
  expected = Reference(params, batch, swap, rescale=rescale).losses()
  itm = float(found.metrics["itm"])
  assert min(abs(itm - value) for value in expected.pop("itm")) < 1e-4
  for name, value in expected.items():
    assert float(found.metrics[name]) == pytest.approx(value, rel=2e-4), name
  parts = [float(found.metrics[name]) for name in EVERY]
  assert float(found.loss) == pytest.approx(np.mean(parts), rel=1e-5)


@pytest.mark.parametrize("swap", ["both", "text", "image", "none"])
def test_each_loss_is_that_of_the_reference(swap):
  config = make_config(swap)
  check(config, random_regions.batch(config), swap)


def test_with_blocks_of_each_side_alone_too():
  config = make_config(layers=(1, 2))
  check(config, random_regions.batch(config))


@pytest.mark.parametrize(
  "sizes",
  [
    {"num_anchors": (0, 2, 0, 1)},
    {"num_anchors": (0, 0, 0, 0)},
    {"num_words": (1, 2, 8, 3), "num_anchors": (1, 1, 2, 0)},
    {"num_regions": (1, 1, 6, 2), "num_anchors": (1, 0, 3, 2)},
  ],
  ids=["some without anchors", "no anchor", "short texts", "few regions"],
)
def test_uneven_batches_too(sizes):
  config = make_config()
  check(config, random_regions.batch(config, **sizes))


def test_rescaled_contents_too():
  config = make_config(rescale=True)
  check(config, random_regions.batch(config))


def test_the_contrast_of_anchors_is_of_their_states_in_the_group():
  config = random_regions.config(
    "amc",
    width=128,
    batch_size=SIZE,
    objectives={"amc_pair": 0.5, "amc_pair_group": 2},
  )
  batch = random_regions.batch(config, num_anchors=(2, 3, 1, 3))
  params = random_pairs.spread_params(config)
  own = Reference(params, batch, "both")
  total = 0.0
  for group in ((0, 1), (2, 3)):
    words, places, classes = [], [], []
    for b in group:
      states = own.run(
        b,
        own.words(b, batch.amc_ids_BT[b]),
        own.regions(b, hide=True),
        ("text", "image"),
      )
      states /= np.linalg.norm(states, axis=1, keepdims=True)
      ok = batch.anchor_ok_BA[b]
      words += [*states[batch.anchor_pos_BA[b][ok]]]
      places += [*states[T + batch.anchor_region_BA[b][ok]]]
      classes += [*batch.region_class_BR[b][batch.anchor_region_BA[b][ok]]]
    logits = np.array(words) @ np.array(places).T
    logits /= own.p["temperature"]["value"]
    alike = np.equal.outer(classes, classes) & ~np.eye(len(classes), dtype=bool)
    logits[alike] = -np.inf
    for side in (logits, logits.T):
      losses = scipy.special.logsumexp(side, axis=1) - np.diag(side)
      total += losses.mean() / 4  # groups and directions
  metrics = random_pairs.loss_function(config)(
    params, batch, jax.random.key(0)
  ).metrics
  assert float(metrics["amc_pair"]) == pytest.approx(total, rel=2e-4)
  assert float(metrics["amc"]) == pytest.approx(
    float(metrics["amc_words"] + metrics["amc_regions"]) + 0.5 * total, rel=2e-4
  )


def test_the_mean_is_by_weight():
  config = random_regions.config(
    objectives={"amc": 3.0, "wrc": 2.0, "itm": 1.0}
  )
  output = random_pairs.loss_function(config)(
    random_pairs.spread_params(config),
    random_regions.batch(config),
    jax.random.key(0),
  )
  amc, wrc, itm = (float(output.metrics[n]) for n in ("amc", "wrc", "itm"))
  assert float(output.loss) == pytest.approx(
    (3 * amc + 2 * wrc + itm) / 6, rel=1e-5
  )
