"""Anchors of a split by the command line, on tiny exports."""

from __future__ import annotations

import contextlib
import dataclasses
import io

import jax
import numpy as np
import pytest

from glscl_jax import config as config_lib
from glscl_jax.data import order, pipeline, sources
from glscl_jax.data import tokenizer as tokenizers
from glscl_jax.systems.answers import Slots
from glscl_jax.tasks import anchors, results
from launch import evaluate as launcher
from tests import random_regions, tiny
from tests.data import tiny_regions

CAPTIONS = ("a dog with two red apples", "person, dog")
NUM = 7


def make_record(split, number):
  record = tiny_regions.make_record(number, captions=CAPTIONS, split=split)
  classes = ([1, 2, 2, 3], [4, 2, 1], [3, 1, 2, 2, 5, 4], [5])[number % 4]
  return dataclasses.replace(
    record, regions=tiny_regions.make(classes, seed=number)
  )


def make_config(data_dir, *names, **options):
  region = config_lib.RegionConfig(
    number=6,
    feature_width=tiny_regions.WIDTH,
    num_classes=len(tiny_regions.CLASSES),
  )
  return tiny.of_system(
    data_dir,
    lambda **sizes: random_regions.config(
      *names, region=region, **sizes, **options
    ),
  )


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  records = [
    make_record(split, 100 * s + number)
    for s, split in enumerate(("train", "test"))
    for number in range(NUM)
  ]
  blank = dataclasses.replace(make_record("test", 99), captions=(" ",))
  return tiny_regions.write(
    tmp_path_factory.mktemp("anchors") / "data", [*records, blank]
  )


@pytest.fixture(scope="module")
def work(data_dir):
  return tiny.save(data_dir.parent / "export", make_config(data_dir))


def run(*arguments):
  out, err = io.StringIO(), io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    code = launcher.main(["launch/evaluate.py", *arguments])
  return code, out.getvalue(), err.getvalue()


def measure(data_dir, config, *, batch_size=4, **options):
  tokenizer = tokenizers.load(data_dir / "tokenizer.model")
  samples = anchors.read(
    sources.open_source(data_dir, "test"),
    config=config,
    tokenizer=tokenizer,
    protocol=anchors.Protocol(),
    **options,
  )
  return anchors.measure(
    tiny.params(config), samples, config=config, batch_size=batch_size
  )


def report(found, config):
  return anchors.report(found, config=config, protocol=anchors.Protocol())


def test_results_hold_every_figure_with_chance_and_lineage(work):
  code, out, err = run(
    f"--workdir={work}", "--task=anchors", "--splits=test", "--batch_size=3"
  )
  assert code == 0, err
  folder = work / "eval" / "anchors"
  (splits,) = results.read(folder / results.METRICS)["results"].values()
  result = splits["test"]["swap_both"]
  assert result["num_samples"] == NUM
  assert result["bad_records"] == ["test-99: no caption"]
  assert result["lineage"]["step"] == 7
  # Of each four records three have a dog and apples, one of them two.
  assert result["counts"]["anchors"] == result["counts"]["word_accuracy"] == 12
  assert result["metrics"]["anchors_per_sample"] == pytest.approx(12 / NUM)
  # Dogs are one of 4, 3, 6, 4, 3, 6 regions, apples 2, 1, 2, 2, 1, 2 of them.
  assert result["chance"]["pair_accuracy"] == pytest.approx(
    np.mean([1 / 4, 1 / 3, 1 / 6] * 2 + [2 / 4, 1 / 3, 2 / 6] * 2)
  )
  assert result["chance"]["word_accuracy"] == 0.5  # always dog, or red
  assert result["chance"].keys() == {
    "word_accuracy",
    "rest_word_accuracy",
    "masked_word_accuracy",
    "class_accuracy",
    "masked_class_accuracy",
    "pair_accuracy",
  }
  assert result["counts"]["rest_word_accuracy"] == 6  # apples of red apples
  (splits,) = results.read(folder / results.PREDICTIONS)["results"].values()
  found = splits["test"]["swap_both"]["samples"]
  anchored = [
    s for s in found if any(w["kind"] == "anchor" for w in s["words"])
  ]
  assert len(anchored) == 6
  for sample in anchored:
    own = [w["own"] for w in sample["words"] if w["kind"] == "anchor"]
    classes = [w["own"] for w in sample["classes"] if w["kind"] == "anchor"]
    assert own == ["dog", "red"]
    assert sorted(classes) == ["dog", "red apple"]
  assert "pair_accuracy" in out and "test-99: no caption" in out


def test_right_answers_are_counted_by_hand(data_dir):
  config = make_config(data_dir)
  found = measure(data_dir, config)
  given = report(found, config)["metrics"]
  tokenizer = tokenizers.load(data_dir / "tokenizer.model")
  samples = anchors.predictions(found, tokenizer)["samples"]
  for side, name in (("words", "word"), ("classes", "class")):
    for kind, before in (("anchor", ""), ("masked", "masked_")):
      said = [
        item["said"] == item["own"]
        for sample in samples
        for item in sample[side]
        if item["kind"] == kind
      ]
      assert given[f"{before}{name}_accuracy"] == np.mean(said)
  right = []
  for i, sample in enumerate(samples):
    for pair in sample["pairs"]:
      score = found.cosine_UTR[i, pair["at"]]
      right.append(int(np.argmax(score)) in pair["regions"])
  assert given["pair_accuracy"] == np.mean(right)


def test_neither_the_batch_nor_the_other_records_change_an_answer(data_dir):
  config = make_config(data_dir)
  one, other = (measure(data_dir, config, batch_size=n) for n in (3, 7))
  some = measure(data_dir, config, record_U=[4, 1])
  for whole in (one, other):
    np.testing.assert_array_equal(whole.words.ok_BJ, one.words.ok_BJ)
    np.testing.assert_allclose(whole.cosine_UTR, one.cosine_UTR, atol=1e-5)
  records = [one.samples.record_U.index(n) for n in some.samples.record_U]
  np.testing.assert_allclose(
    some.cosine_UTR, one.cosine_UTR[records], atol=1e-5
  )
  np.testing.assert_array_equal(
    some.rows["amc_ids_BT"], one.rows["amc_ids_BT"][records]
  )


@pytest.mark.parametrize(
  ("names", "masking", "measured"),
  [
    (("wrc", "itm"), {}, {"pair_accuracy"}),
    (
      ("mlm", "mrc", "itm"),
      {"swap": "none"},
      {"masked_word_accuracy", "masked_class_accuracy"},
    ),
    (
      ("amc",),
      {"swap": "text"},
      {
        "word_accuracy",
        "rest_word_accuracy",
        "masked_word_accuracy",
        "masked_class_accuracy",
        "anchors_per_sample",
      },
    ),
  ],
)
def test_what_nothing_trains_is_absent(data_dir, names, masking, measured):
  config = make_config(data_dir, *names, masking=masking)
  result = report(measure(data_dir, config), config)
  assert result["metrics"].keys() == measured
  assert result["chance"].keys() == measured - {"anchors_per_sample"}


def assert_same_rows(one, other):
  assert one.keys() == other.keys()
  for name, rows in one.items():
    np.testing.assert_array_equal(rows, other[name], err_msg=name)


@pytest.mark.parametrize(
  "masking",
  [
    {"anchors": "random"},
    {"anchor_match": "piece"},
    {"anchor_region": "random"},
  ],
  ids=str,
)
def test_models_of_other_anchors_are_asked_like_the_usual_one(
  tmp_path, masking
):
  records = [
    dataclasses.replace(
      make_record("test", n), regions=tiny_regions.make([1, 1, 1, 1, 2, 2])
    )
    for n in range(3)
  ]
  data = tiny_regions.write(tmp_path / "data", records)
  configs = (make_config(data, masking=m) for m in ({}, masking))
  assert_same_rows(*(measure(data, config).rows for config in configs))


def test_of_captions_the_first_that_says_something_is_asked(tmp_path):
  texts = ("a dog", "a person", "red apples", "person, dog")
  records = [
    dataclasses.replace(make_record("test", n), captions=(" ", text))
    for n, text in enumerate(texts)
  ]
  data = tiny_regions.write(tmp_path / "data", records)
  found = measure(data, make_config(data))
  assert set(found.samples.captions) == set(texts)
  tokenizer = tokenizers.load(data / "tokenizer.model")
  for caption, ids_T in zip(
    found.samples.captions, found.rows["text_ids_BT"], strict=True
  ):
    own = tokenizer.encode(caption, len(ids_T)).ids_T
    np.testing.assert_array_equal(ids_T, own)


def test_captions_are_whole_whatever_part_of_them_the_training_sees(tmp_path):
  records = [
    dataclasses.replace(make_record("test", n), captions=("apple, red, dog",))
    for n in range(3)
  ]
  data = tiny_regions.write(tmp_path / "data", records)
  config = make_config(data)
  augment = dataclasses.replace(config.data.augment, phrases="subset")
  part = dataclasses.replace(
    config, data=dataclasses.replace(config.data, augment=augment)
  )
  assert_same_rows(*(measure(data, c).rows for c in (config, part)))


def test_masks_depend_on_the_seed_of_the_protocol_alone(data_dir):
  config = make_config(data_dir)
  data = dataclasses.replace(config.data, seed=5)
  other = dataclasses.replace(config, data=data)
  one, same = (measure(data_dir, c).rows["amc_ids_BT"] for c in (config, other))
  np.testing.assert_array_equal(one, same)


def test_ties_count_against_the_model():
  valid_R = np.array([True, True, True, False])
  pos_A, region_A = np.array([2, 2, 5]), np.array([0, 2, 1])
  same_TR = np.zeros((6, 4))
  found = anchors.judge_pairs(same_TR, valid_R, pos_A, region_A)
  assert [(p.pos, p.right, p.named) for p in found] == [
    (2, False, (0, 2)),
    (5, False, (1,)),
  ]
  assert [p.chance for p in found] == pytest.approx([2 / 3, 1 / 3])
  better_TR = same_TR.copy()
  better_TR[2, 2], better_TR[5, 3] = 0.1, 0.9  # the latter is padding
  found = anchors.judge_pairs(better_TR, valid_R, pos_A, region_A)
  assert [p.right for p in found] == [True, False]
  assert [p.best for p in found] == [2, 0]
  ones_BJ = np.ones((1, 2), bool)
  said = anchors.judge(
    Slots(
      index_BJ=np.array([[1, 2]], np.int32),
      labels_BJ=np.array([[1, 2]], np.int32),
      ok_BJ=ones_BJ,
      anchor_BJ=ones_BJ,
      logits_BJV=np.array([[[0.0, 1.0, 1.0], [0.0, 1.0, 1.5]]], np.float32),
    )
  )
  assert said.right_BJ.tolist() == [[False, True]]


def test_random_similarities_are_right_as_often_as_chance_says():
  rng = np.random.default_rng(0)
  valid_R = np.array([True] * 5 + [False])
  found = [
    pair
    for _ in range(600)
    for pair in anchors.judge_pairs(
      rng.normal(size=(4, 6)), valid_R, np.array([1, 1, 3]), np.array([0, 3, 4])
    )
  ]
  chance = np.mean([pair.chance for pair in found])
  assert chance == pytest.approx(0.3)
  assert abs(np.mean([pair.right for pair in found]) - chance) < 0.05


def test_a_word_that_names_all_regions_is_no_test_and_chance_says_so():
  valid_R = np.array([True, True])
  (pair,) = anchors.judge_pairs(
    np.zeros((2, 2)), valid_R, np.array([1, 1]), np.array([0, 1])
  )
  assert pair.right and pair.chance == 1


def test_scores_that_are_not_finite_are_refused(data_dir):
  config = make_config(data_dir, "wrc", "itm")
  samples = measure(data_dir, config).samples
  broken = jax.tree.map(lambda a: np.full_like(a, np.nan), tiny.params(config))
  with pytest.raises(anchors.AnchorError, match="not finite"):
    anchors.measure(broken, samples, config=config, batch_size=4)


@pytest.mark.parametrize(
  ("config", "message"),
  [
    (config_lib.Config(), "system 'glscl' knows no words and regions"),
    (random_regions.config("itm"), "trained by itm alone, which tells nothing"),
  ],
)
def test_models_without_anchors_are_refused(config, message):
  with pytest.raises(anchors.AnchorError, match=message):
    anchors.check(config)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (("--rerank=full",), "--rerank is of --task=retrieval, but this is"),
    (("--limit=3",), "--limit is of --task=retrieval, but this is"),
    (("--splits=none",), "no split 'none'"),
  ],
)
def test_mistakes_end_with_one_line(work, arguments, message):
  code, _, err = run(f"--workdir={work}", "--task=anchors", *arguments)
  assert code == 2
  assert err.startswith("error: ") and message in err


def test_data_without_regions_are_refused(work, tmp_path):
  other = tiny.write_names(tmp_path / "data", "test")
  code, _, err = run(f"--workdir={work}", "--task=anchors", f"--data={other}")
  assert code == 2
  assert "no regions, but system 'cmal' reads them" in err


def test_rows_are_those_of_the_training_at_the_same_seed(data_dir):
  config = make_config(data_dir)
  found = measure(data_dir, config)
  source = sources.open_source(data_dir, "test")
  pairs = pipeline.make_pairs(source)
  make_row = pipeline.make_row_maker(
    dataclasses.replace(config, data=dataclasses.replace(config.data, seed=0)),
    tokenizers.load(data_dir / "tokenizer.model"),
    pairs,
    order=order.Listed(range(len(pairs))),
    kinds=pipeline.mask_kinds(config),
    first=0,
    count=1,
  )
  for i, record in enumerate(found.samples.record_U):
    first = int(pairs.ends_A[record - 1]) if record else 0
    for name, row in make_row.row(first).items():
      np.testing.assert_array_equal(found.rows[name][i], row, err_msg=name)
