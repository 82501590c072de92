"""Result files: what is kept apart, what is refused, what lineage says."""

import json
import math

import pytest

from glscl_jax import config
from glscl_jax.data import pairs
from glscl_jax.tasks import results
from glscl_jax.train import loop
from tests import tiny

CONFIG = config.Config()
DATA = results.DataSet(
  name="emoji-01234567",
  path="/data/emoji",
  sha256="01234567" * 8,
  split_sha256={"train": "aa", "val": "dd", "test": "bb"},
)


def make(split="test", rerank="none", value=0.5, lineage=True, **protocol):
  facts = dict.fromkeys(results.LINEAGE_KEYS, "x")
  return {
    "split": split,
    "protocol": {"rerank": rerank, "captions": "first", **protocol},
    "metrics": {"i2t_r1": value},
    "chance": {"i2t_r1": 0.01},
    **({"lineage": facts} if lineage else {}),
  }


def write(directory, result, data=DATA):
  results.write(
    directory, task="retrieval", data=data, result=result, predictions={"n": 1}
  )


def test_results_of_other_splits_and_protocols_stay(tmp_path):
  write(tmp_path, make())
  write(tmp_path, make(rerank="itm", rerank_k=16))
  write(tmp_path, make(rerank="itm", rerank_k=32))
  write(tmp_path, make(rerank="itm_plus_itc", rerank_k=16, itc_weight=2.0))
  write(tmp_path, make(captions="all"))
  write(tmp_path, make(split="train"))
  write(tmp_path, make(value=0.75))  # replaces the first
  for name in (results.METRICS, results.PREDICTIONS):
    found = results.read(tmp_path / name)["results"][DATA.name]
    assert found.keys() == {"test", "train"}
    assert found["test"].keys() == {
      "none",
      "itm_k16",
      "itm_k32",
      "itm_plus_itc_k16_w2",
      "none_all_captions",
    }
  found = results.read(tmp_path / results.METRICS)["results"][DATA.name]
  assert found["test"]["none"]["metrics"]["i2t_r1"] == 0.75


@pytest.mark.parametrize("value", (math.nan, math.inf))
def test_a_number_that_is_not_finite_is_refused(tmp_path, value):
  with pytest.raises(results.ResultError, match="metrics.i2t_r1 is"):
    write(tmp_path, make(value=value))
  assert not list(tmp_path.iterdir())


def test_a_result_without_lineage_is_refused(tmp_path):
  with pytest.raises(results.ResultError, match="no lineage"):
    write(tmp_path, make(lineage=False))
  result = make()
  del result["lineage"]["training"]
  with pytest.raises(results.ResultError, match=r"no lineage \['training'\]"):
    write(tmp_path, result)
  assert not list(tmp_path.iterdir())


def test_a_file_that_is_no_result_file_is_left_alone(tmp_path):
  (tmp_path / results.METRICS).write_text("[]")
  with pytest.raises(results.ResultError, match="is not a result file"):
    write(tmp_path, make())
  assert (tmp_path / results.METRICS).read_text() == "[]"


def lineage(training, split="test", run=CONFIG):
  return results.make_lineage(
    step=3,
    params_sha256="p",
    config=run,
    training={"tokenizer_sha256": "t", **training},
    data=DATA,
    split=split,
  )


def test_lineage_is_complete_and_holds_the_training():
  found = lineage({"data_sha256": "aa"})
  assert set(results.LINEAGE_KEYS) == found.keys()
  assert found["training"]["data_sha256"] == "aa"
  json.dumps(found)


@pytest.mark.parametrize(
  "training,split,regime",
  [
    ({"data_sha256": "aa"}, "test", "held-out split of the training data"),
    ({"data_sha256": "aa"}, "train", "training data"),
    ({"data_sha256": "cc"}, "test", results.OTHER_DATA),
    (
      {"data_sha256": "cc", "init_from": {"data_sha256": "bb"}},
      "test",
      "training data",
    ),
    (
      {"data_sha256": "cc", "init_from": {"init_from": {"data_sha256": "aa"}}},
      "test",
      "held-out split of the training data",
    ),
  ],
)
def test_the_regime_follows_from_everything_the_weights_saw(
  training, split, regime
):
  assert lineage(training, split)["regime"] == regime


PICKED = {"picked_as_best": True, "eval_splits": ["val"]}


@pytest.mark.parametrize(
  "training,split,regime",
  [
    (PICKED | {"data_sha256": "aa"}, "val", "split that picked the checkpoint"),
    (PICKED | {"data_sha256": "aa"}, "test", "held-out split of the training"),
    (PICKED | {"data_sha256": "aa"}, "train", "training data"),
    # Of another data set: "val" there is not "val" here.
    (PICKED | {"data_sha256": "cc"}, "val", results.OTHER_DATA),
    (
      PICKED | {"data_sha256": "aa", "picked_as_best": False},
      "val",
      "held-out split of the training",
    ),
    (
      {"data_sha256": "cc", "init_from": PICKED | {"data_sha256": "aa"}},
      "val",
      "split that picked the checkpoint",
    ),
  ],
)
def test_a_split_that_picked_the_weights_is_not_called_held_out(
  training, split, regime
):
  assert lineage(training, split)["regime"].startswith(regime)


def test_lineage_says_how_the_step_was_picked():
  validated = config.Config(
    train=config.TrainConfig(eval_every=2, eval_splits=("val",))
  )
  found = lineage(PICKED | {"data_sha256": "aa"}, run=validated)
  assert found["eval_splits"] == ["val"] and found["picked_as_best"] is True
  assert found["image_size"] == 288
  never = lineage({"data_sha256": "aa"})
  assert never["eval_splits"] == [] and never["picked_as_best"] is None


@pytest.mark.parametrize(
  "training",
  [
    {},
    {"data_sha256": "cc", "data_dir": "/data/emoji"},  # changed since
  ],
)
def test_zero_shot_is_not_claimed_where_the_data_is_not_known(training):
  assert lineage(training)["regime"].startswith("unknown")


def test_splits_are_hashed_as_in_the_lineage_of_a_run(tmp_path):
  data_dir = tiny.write_names(tmp_path / "data", "train", "test")
  inputs = loop.open_inputs(tiny.config(data_dir))
  inputs.iterator.close()
  found = results.identify(data_dir)
  assert found.split_sha256["train"] == inputs.data_facts["data_sha256"]
  assert found.split_sha256["train"] != found.split_sha256["test"]
  assert found.path == inputs.data_facts["data_dir"]


def test_data_without_manifest_is_refused(tmp_path):
  with pytest.raises(pairs.DataError, match="not readable"):
    results.identify(tmp_path)
