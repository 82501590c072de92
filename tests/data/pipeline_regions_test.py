"""Batches of regions: what CMAL's rows hold, the same however they are made."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from glscl_jax import config as config_lib
from glscl_jax import types
from glscl_jax.data import pairs, pipeline, regions, sources
from glscl_jax.data import tokenizer as tokenizer_lib
from glscl_jax.systems import cmal_flops, registry
from tests.data import tiny_regions

NUM_RECORDS = 12
NUMBER = 6  # slots of an image
CAPTIONS = ("a dog with two red apples", "person, dog", "the knife , the knife")


ALWAYS = {
  "identity_BM",
  "text_ids_BT",
  "text_valid_BT",
  "region_BRP",
  "box_BR7",
  "region_valid_BR",
  "region_class_BR",
}
ANCHORS = ("anchor_pos_BA", "anchor_region_BA", "anchor_ok_BA")
WORDS = ("amc_ids_BT", "amc_pos_BJ", "amc_labels_BJ", "amc_ok_BJ")
HIDDEN = ("hidden_region_BR", "amc_region_BJ", "amc_region_ok_BJ")
PAIRS = ("pair_pos_BA", "pair_region_BA", "pair_ok_BA")
MLM = ("mlm_ids_BT", "mlm_pos_BJ", "mlm_labels_BJ", "mlm_ok_BJ")


def make_record(number):
  record = tiny_regions.make_record(number, captions=CAPTIONS)
  classes = ([1, 2, 2, 3], [4, 4, 1], [3, 1, 2, 2, 5, 4, 1], [5])[number % 4]
  return dataclasses.replace(
    record, regions=tiny_regions.make(classes, seed=number)
  )


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  records = [make_record(number) for number in range(NUM_RECORDS)]
  return tiny_regions.write(tmp_path_factory.mktemp("data") / "r", records)


@pytest.fixture(scope="module")
def tokenizer(data_dir):
  return tokenizer_lib.load(sources.tokenizer_path(data_dir))


@pytest.fixture
def config(data_dir, tokenizer):
  base = config_lib.cmal_defaults()
  return dataclasses.replace(
    base,
    model=dataclasses.replace(
      base.model,
      text=dataclasses.replace(
        base.model.text, vocab_size=tokenizer.vocab_size, max_length=12
      ),
      region=config_lib.RegionConfig(
        number=NUMBER,
        feature_width=tiny_regions.WIDTH,
        num_classes=len(tiny_regions.CLASSES),
      ),
    ),
    data=config_lib.DataConfig(dir=str(data_dir), batch_size=18),
    objectives=dataclasses.replace(
      base.objectives,
      neg_group=6,
      mltc_image_group=6,
      mltc_text_group=6,
      amc_pair_group=6,
    ),
  )


def change(config, section, **values):
  part = dataclasses.replace(getattr(config, section), **values)
  return dataclasses.replace(config, **{section: part})


def with_objectives(config, **weights):
  none = dict.fromkeys(config_lib.OBJECTIVES, 0.0)
  return change(config, "objectives", **(none | weights))


def take(config, tokenizer, number=1, **options):
  iterator = pipeline.make_train_iterator(config, tokenizer, **options)
  batches = [next(iterator) for _ in range(number)]
  iterator.close()
  return batches


def assert_equal(batch, other):
  assert batch.keys() == other.keys()
  for name, rows in batch.items():
    assert rows.dtype == other[name].dtype, name
    assert np.array_equal(rows, other[name]), name


def test_a_batch_holds_regions_and_no_image(config, tokenizer):
  (batch,) = take(config, tokenizer)
  shapes = {
    "region_BRP": (np.float32, (NUMBER, tiny_regions.WIDTH)),
    "box_BR7": (np.float32, (NUMBER, 7)),
    "region_valid_BR": (np.bool_, (NUMBER,)),
    "region_class_BR": (np.int32, (NUMBER,)),
    "hidden_region_BR": (np.bool_, (NUMBER,)),
    "amc_region_BJ": (np.int32, (NUMBER,)),
    "amc_region_ok_BJ": (np.bool_, (NUMBER,)),
    "anchor_pos_BA": (np.int32, (8,)),
    "anchor_region_BA": (np.int32, (8,)),
    "anchor_ok_BA": (np.bool_, (8,)),
    "amc_ids_BT": (np.int32, (12,)),
    "amc_pos_BJ": (np.int32, (18,)),
    "amc_labels_BJ": (np.int32, (18,)),
    "amc_ok_BJ": (np.bool_, (18,)),
    "pair_pos_BA": (np.int32, (32,)),
    "pair_region_BA": (np.int32, (32,)),
    "pair_ok_BA": (np.bool_, (32,)),
    "text_ids_BT": (np.int32, (12,)),
    "text_valid_BT": (np.bool_, (12,)),
    "identity_BM": (np.int32, (1,)),
  }
  found = {name: (a.dtype.type, a.shape[1:]) for name, a in batch.items()}
  assert found == shapes
  assert {len(array) for array in batch.values()} == {18}


@pytest.mark.parametrize(
  ("objective", "swap", "array"),
  [
    ("amc", "both", "amc_labels_BJ"),
    ("mlm", "text", "amc_labels_BJ"),
    ("mlm", "none", "mlm_labels_BJ"),
  ],
)
def test_the_words_whose_flops_are_counted_are_those_of_a_batch(
  config, tokenizer, objective, swap, array
):
  config = change(config, "masking", swap=swap)
  config = with_objectives(config, **{objective: 1.0})
  (batch,) = take(config, tokenizer)
  assert cmal_flops.count_words(objective, config) == batch[array].shape[1]


def test_rows_hold_the_regions_of_their_record(config, tokenizer, data_dir):
  # One epoch: each caption of each record once.
  first, second = take(config, tokenizer, 2)
  source = sources.open_source(data_dir, "train")
  stored = {source[i].image_id: source[i].regions for i in range(NUM_RECORDS)}
  seen = []
  for batch in (first, second):
    for row, identity in enumerate(batch["identity_BM"][:, 0].tolist()):
      seen.append(identity)
      expected = regions.pad(stored[identity], number=NUMBER)
      for name, array in expected.items():
        assert np.array_equal(batch[name][row], array), name
  assert sorted(seen) == sorted(3 * list(stored))


def test_anchors_and_masks_agree_with_each_other(config, tokenizer):
  mask_id, real_anchors = tokenizer.mask_id, 0
  for batch in take(config, tokenizer, 6):
    for i in range(18):
      row = {name: array[i] for name, array in batch.items()}
      ok = row["anchor_ok_BA"]
      slots, taken = row["anchor_pos_BA"][ok], row["anchor_region_BA"][ok]
      real_anchors += len(slots)
      assert len(set(taken.tolist())) == len(taken)
      assert (row["region_class_BR"][taken] > 0).all()
      assert row["text_valid_BT"][slots].all() and (slots > 0).all()
      # Anchors stay in the text of AMC, are targets, and are not hidden.
      ids = row["text_ids_BT"]
      assert np.array_equal(row["amc_ids_BT"][slots], ids[slots])
      targets = row["amc_pos_BJ"][row["amc_ok_BJ"]]
      assert set(slots.tolist()) <= set(targets.tolist())
      assert np.array_equal(
        row["amc_labels_BJ"][row["amc_ok_BJ"]], ids[targets]
      )
      changed = np.flatnonzero(row["amc_ids_BT"] != ids)
      assert set(changed.tolist()) <= set(targets.tolist())
      assert (row["amc_ids_BT"] == mask_id).sum() <= len(targets)
      hidden = np.flatnonzero(row["hidden_region_BR"])
      assert not set(hidden.tolist()) & set(taken.tolist())
      asked = row["amc_region_BJ"][row["amc_region_ok_BJ"]]
      assert set(asked.tolist()) == {*hidden.tolist(), *taken.tolist()}
      assert row["region_valid_BR"][asked].all() and len(asked)
      # Each anchor is a pair of WRC.
      pair_ok = row["pair_ok_BA"]
      assert row["region_valid_BR"][row["pair_region_BA"][pair_ok]].all()
      pair = zip(
        row["pair_pos_BA"][pair_ok].tolist(),
        row["pair_region_BA"][pair_ok].tolist(),
        strict=True,
      )
      assert set(zip(slots.tolist(), taken.tolist(), strict=True)) <= set(pair)
  assert real_anchors > 100


def test_the_rest_of_a_phrase_is_masked(config, tokenizer):
  red, apples = (tokenizer.encode(w, 4).ids_T[1] for w in ("red", "apples"))
  seen = 0
  for batch in take(config, tokenizer, 4):
    for i, slot in zip(*np.nonzero(batch["text_ids_BT"] == red), strict=True):
      anchored = batch["anchor_pos_BA"][i][batch["anchor_ok_BA"][i]]
      if slot in anchored:
        seen += 1
        assert batch["text_ids_BT"][i, slot + 1] == apples
        assert batch["amc_ids_BT"][i, slot + 1] == tokenizer.mask_id
  assert seen > 5


@pytest.mark.parametrize(
  ("name", "value", "array"),
  [
    ("anchors", "random", "anchor_pos_BA"),
    ("anchor_match", "piece", "anchor_pos_BA"),
    ("anchor_region", "random", "anchor_region_BA"),
    ("max_anchors", 1, "anchor_ok_BA"),
    ("max_pairs", 1, "pair_ok_BA"),
  ],
)
def test_rows_follow_the_rules_for_anchors(
  config, tokenizer, name, value, array
):
  (usual,) = take(config, tokenizer)
  (other,) = take(change(config, "masking", **{name: value}), tokenizer)
  assert not np.array_equal(usual[array], other[array])
  if name.startswith("max_"):
    assert other[array].shape[1] == 1


@pytest.mark.parametrize(
  ("objective", "swap", "names"),
  [
    ("amc", "both", {*ANCHORS, *WORDS, *HIDDEN}),
    ("amc", "none", {*ANCHORS, *WORDS, *HIDDEN}),
    ("wrc", "both", PAIRS),
    ("itm", "both", set()),
    ("mlm", "none", MLM),
    ("mlm", "image", MLM),
    ("mlm", "text", {*ANCHORS, *WORDS}),
    ("mlm", "both", {*ANCHORS, *WORDS}),
    ("mrc", "none", HIDDEN),
    ("mrc", "text", HIDDEN),
    ("mrc", "both", {*ANCHORS, *HIDDEN}),
    ("mrfr", "image", {*ANCHORS, *HIDDEN}),
  ],
)
def test_a_batch_holds_the_masks_that_objectives_read(
  config, tokenizer, objective, swap, names
):
  config = change(config, "masking", swap=swap)
  config = with_objectives(config, **{objective: 1.0})
  (batch,) = take(config, tokenizer)
  assert batch.keys() == ALWAYS | set(names)


@pytest.mark.parametrize("swap", ["both", "text", "image", "none"])
def test_the_system_finds_in_a_batch_what_it_reads(config, tokenizer, swap):
  model = dataclasses.replace(
    config.model,
    text=dataclasses.replace(config.model.text, width=64),
    fusion=dataclasses.replace(config.model.fusion, width=64, depth=1),
  )
  config = change(
    dataclasses.replace(config, model=model), "masking", swap=swap
  )
  system = registry.find(config)
  for name in config_lib.SYSTEM_OBJECTIVES["cmal"]:
    alone = with_objectives(config, **{name: 1.0})
    params = jax.eval_shape(
      lambda alone=alone: system.init(alone, jax.random.key(0))
    )
    (rows,) = take(alone, tokenizer)
    output = jax.eval_shape(
      functools.partial(
        system.loss, config=alone, key=jax.random.key(0), step=0
      ),
      params,
      types.Batch(**rows),
    )
    assert output.loss.shape == ()


def test_without_anchors_any_region_and_any_word_may_be_hidden(
  config, tokenizer
):
  config = change(config, "masking", swap="none")
  config = with_objectives(config, mrc=1.0)
  hidden = np.concatenate(
    [batch["hidden_region_BR"] for batch in take(config, tokenizer, 40)]
  )
  first = hidden[:, 0].mean()
  # Every image has a first region; 720 rows: deviation .02. Images of one or
  # two regions hide it more often: no row is without a hidden region.
  assert 0.25 < first < 0.55
  assert hidden.any(axis=1).all()


def test_anchors_are_hidden_where_nothing_is_swapped(config, tokenizer):
  config = change(config, "masking", swap="none")
  (batch,) = take(config, tokenizer)
  rows, slots = np.nonzero(batch["anchor_ok_BA"])
  assert len(rows)
  for row, slot in zip(rows, slots, strict=True):
    assert batch["hidden_region_BR"][row, batch["anchor_region_BA"][row, slot]]
    position = batch["anchor_pos_BA"][row, slot]
    assert batch["amc_ids_BT"][row, position] == tokenizer.mask_id


def test_words_that_keep_their_content_are_neither_masked_nor_asked(
  config, tokenizer
):
  config = change(config, "masking", swap="image", mlm_rate=0.0)
  (batch,) = take(config, tokenizer)
  anchored = batch["anchor_ok_BA"].any(axis=1)
  assert anchored.any()
  # Where nothing else is asked the first word of no anchor is masked.
  changed = (batch["amc_ids_BT"] != batch["text_ids_BT"]).sum(axis=1)
  asked = batch["amc_ok_BJ"].sum(axis=1)
  assert (changed[anchored] == 1).all() and (asked[anchored] == 1).all()
  slots = np.where(batch["amc_ok_BJ"], batch["amc_pos_BJ"], -1)
  anchors = np.where(batch["anchor_ok_BA"], batch["anchor_pos_BA"], -2)
  assert not (slots[:, :, None] == anchors[:, None, :]).any()


def test_longer_padding_changes_nothing_but_the_padding(config, tokenizer):
  (short,) = take(config, tokenizer)
  text = dataclasses.replace(config.model.text, max_length=19)
  region = dataclasses.replace(config.model.region, number=13)
  model = dataclasses.replace(config.model, text=text, region=region)
  (long,) = take(dataclasses.replace(config, model=model), tokenizer)
  sizes = {"text": 12, "amc_ids": 12, "region": NUMBER, "hidden": NUMBER}
  # One record has seven regions: the last one is beyond the shorter batch.
  fits = ~long["region_valid_BR"][:, NUMBER:].any(axis=1)
  assert fits.sum() > 9
  for name, rows in short.items():
    size = next((n for k, n in sizes.items() if name.startswith(k)), None)
    cut = long[name][:, : size or rows.shape[1]]
    assert np.array_equal(rows[fits], cut[fits]), name


@pytest.mark.parametrize("count", [2, 6])
def test_the_number_of_processes_changes_nothing(config, tokenizer, count):
  (whole,) = take(config, tokenizer)
  parts = [
    take(config, tokenizer, process_index=i, process_count=count)[0]
    for i in range(count)
  ]
  joined = {
    name: np.concatenate([part[name] for part in parts]) for name in whole
  }
  assert_equal(whole, joined)


def test_a_resumed_run_sees_the_same_rows(config, tokenizer):
  *_, third = take(config, tokenizer, 3)
  iterator = pipeline.make_train_iterator(config, tokenizer)
  iterator.set_state({"step": 2})
  assert_equal(next(iterator), third)
  iterator.close()


def test_the_hash_seed_of_python_changes_nothing(data_dir, config):
  script = (
    "import dataclasses, hashlib, sys\n"
    "from glscl_jax import config as c\n"
    "from glscl_jax.data import pipeline, sources, tokenizer\n"
    "config = c.from_json(sys.stdin.read())\n"
    "t = tokenizer.load(sources.tokenizer_path(config.data.dir))\n"
    "batch = next(pipeline.make_train_iterator(config, t))\n"
    "total = hashlib.sha256()\n"
    "for name in sorted(batch):\n"
    "  total.update(name.encode() + batch[name].tobytes())\n"
    "print(total.hexdigest())\n"
  )
  printed = {
    subprocess.run(
      [sys.executable, "-c", script],
      env={**os.environ, "PYTHONHASHSEED": seed, "JAX_PLATFORMS": "cpu"},
      input=config_lib.to_json(config),
      capture_output=True,
      check=True,
      timeout=120,
      text=True,
    ).stdout.strip()
    for seed in ("1", "2")
  }
  assert len(printed) == 1
  assert len(printed.pop()) == len(hashlib.sha256().hexdigest())


def test_images_beside_regions_are_not_decoded(config, tokenizer, tmp_path):
  records = [
    dataclasses.replace(make_record(number), image=b"no image %d" % number)
    for number in range(NUM_RECORDS)
  ]
  made = tiny_regions.write(tmp_path / "r", records, images=True)
  config = change(config, "data", dir=str(made), max_bad_share=0.0)
  (batch,) = take(config, tokenizer)
  assert "image_BYXC" not in batch


def test_a_directory_without_regions_is_refused(config, tokenizer, tmp_path):
  record = pairs.Record(id="a", split="train", image=b"x", captions=("a dog",))
  pairs.write(
    tmp_path / "p",
    splits={"train": lambda: iter([record])},
    source={"kind": "test"},
    finish=lambda directory, manifest: None,
  )
  config = change(config, "data", dir=str(tmp_path / "p"))
  with pytest.raises(config_lib.ConfigError, match="p/train: no regions, but"):
    take(config, tokenizer)


def test_a_directory_without_images_is_refused(tokenizer, data_dir):
  config = config_lib.Config(
    model=config_lib.ModelConfig(
      text=config_lib.TextConfig(vocab_size=tokenizer.vocab_size)
    ),
    data=config_lib.DataConfig(dir=str(data_dir)),
  )
  with pytest.raises(config_lib.ConfigError, match="regions without images"):
    take(config, tokenizer)


@pytest.mark.parametrize(
  ("name", "message"),
  [
    ("feature_width", "feature_width: is 99, but .*region.feature_width=6"),
    ("num_classes", "num_classes: is 99, but .*region.num_classes=5"),
  ],
)
def test_other_sizes_than_those_of_the_regions_are_named(
  config, tokenizer, name, message
):
  region = dataclasses.replace(config.model.region, **{name: 99})
  model = dataclasses.replace(config.model, region=region)
  with pytest.raises(config_lib.ConfigError, match=message):
    take(dataclasses.replace(config, model=model), tokenizer)
