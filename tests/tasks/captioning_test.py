"""Captions of a split by the command line, on a tiny export."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest

from glscl_jax import config as config_lib
from glscl_jax.data import retrieval_set, tokenizer
from glscl_jax.tasks import captioning, results
from launch import evaluate as launcher
from tests import random_pairs, tiny


@pytest.fixture(scope="module")
def work(tmp_path_factory):
  """An export of a SyCoCa with random weights."""
  root = tmp_path_factory.mktemp("captions")
  data_dir = tiny.write_names(root / "data", "train", "test")
  config = tiny.of_system(data_dir, random_pairs.sycoca)
  return tiny.save(root / "export", config)


def run(*arguments):
  out, err = io.StringIO(), io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    code = launcher.main(["launch/evaluate.py", *arguments])
  return code, out.getvalue(), err.getvalue()


def test_captions_are_written_with_references_and_lineage(work):
  code, out, err = run(
    f"--workdir={work}",
    "--task=captioning",
    "--splits=test",
    "--beam=2",
    "--batch_size=3",
  )
  assert code == 0, err
  folder = work / "eval" / "captioning"
  (splits,) = results.read(folder / results.METRICS)["results"].values()
  result = splits["test"]["beam_b2_a1_5to8"]
  assert result["num_images"] == 8
  assert result["lineage"]["step"] == 7
  assert set(result["metrics"]) == {"exact", "mean_tokens", "mean_score"}
  assert 5 <= result["metrics"]["mean_tokens"] <= 8
  (splits,) = results.read(folder / results.PREDICTIONS)["results"].values()
  found = splits["test"]["beam_b2_a1_5to8"]["captions"]
  assert {item["image_id"]: item["references"] for item in found} == {
    f"test-{100 + i}": [name, f"{name}, drawn"]
    for i, name in enumerate(tiny.NAMES)
  }
  assert all(item["caption"] in out for item in found[:3])
  assert not any("</s>" in item["caption"] for item in found)


def test_a_caption_of_the_data_counts_as_exact_whatever_its_case(work):
  read = retrieval_set.read(str(work.parent / "data"), "test", captions="all")
  # Records do not stand in the order they were written.
  first, second = (int(n.split("-")[1]) - 100 for n in read.image_names[:2])
  names = f"{tiny.NAMES[first].upper()} ", f"{tiny.NAMES[second]},  drawn"
  written = captioning.Written(
    retrieval_set=read,
    texts=(*names, *("no",) * 6),
    ended=np.array([True] * 7 + [False]),
    length=np.arange(1, 9),
    score=np.full(8, -1.0),
    seconds=1.0,
  )
  result = captioning.report(written, protocol=captioning.Protocol())
  assert result["metrics"]["exact"] == 2 / 8
  assert result["metrics"]["mean_tokens"] == 4.5
  assert (result["num_distinct"], result["num_unended"]) == (3, 1)


def test_greedy_is_a_protocol_of_its_own():
  protocol = captioning.Protocol(decode="greedy", max_tokens=9)
  described = protocol.describe()
  assert (described["beam"], described["length_power"]) == (1, 0.0)
  assert results.protocol_key(described) == "greedy_5to9"


def test_what_cannot_be_read_is_never_written(work):
  words = tokenizer.load(work.parent / "data/tokenizer.model")
  marks = captioning.marks_of(words)
  names = words.pieces(marks.never)
  assert set(names) == {"<s>", "<pad>", "<unk>", "<mask>"}
  assert words.pieces([marks.end]) == ["</s>"]


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (
      ("--max_tokens=30",),
      "--max_tokens=30: the model was trained on texts of at most 8",
    ),
    (("--max_tokens=3",), "min_tokens 5 is more than max_tokens 3"),
    (("--decode=greedy", "--beam=3"), "--beam is of --decode=beam"),
    (("--rerank=itm",), "--rerank is of --task=retrieval, but this is"),
    (("--limit=3",), "--limit is of --task=retrieval"),
    (("--decode=nucleus",), "value should be one of <beam|greedy>"),
  ],
)
def test_mistakes_end_with_one_line(work, arguments, message):
  code, _, err = run(
    f"--workdir={work}", "--task=captioning", "--splits=test", *arguments
  )
  assert code == 2
  assert err.startswith("error: ") and message in err


def test_flags_of_captions_are_not_read_by_retrieval(work):
  code, _, err = run(f"--workdir={work}", "--splits=test", "--beam=3")
  assert code == 2 and "--beam is of --task=captioning" in err


@pytest.mark.parametrize(
  ("config", "message"),
  [
    (config_lib.Config(), "a model of system 'glscl' writes no captions"),
    (random_pairs.sycoca("itc"), "objectives.ic = 0 and has no caption"),
  ],
)
def test_models_without_a_caption_decoder_are_refused(config, message):
  with pytest.raises(captioning.CaptioningError, match=message):
    captioning.check(config, captioning.Protocol())
