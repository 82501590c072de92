"""Evaluate, export and report by their command lines, on a tiny export."""

import base64
import contextlib
import dataclasses
import html.parser
import io
import json
import re
import shutil

import numpy as np
import pytest

from glscl_jax import config as config_lib
from glscl_jax import errors
from glscl_jax.data import sources
from glscl_jax.export import (
  reconstruction,
  report_completion,
  report_retrieval,
  report_run,
)
from glscl_jax.export import weights as weights_lib
from glscl_jax.tasks import results
from launch import evaluate as evaluate_launcher
from launch import export as export_launcher
from launch import report as report_launcher
from tests import random_pairs, tiny

CELLS = evaluate_launcher.EMOJI_CELLS


@dataclasses.dataclass(frozen=True)
class Run:
  code: int
  out: str
  err: str


def run(launcher, *arguments):
  out, err = io.StringIO(), io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    code = launcher.main([f"launch/{launcher.__name__}.py", *arguments])
  return Run(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def work(tmp_path_factory):
  """An export of random weights, evaluated on four cells."""
  root = tmp_path_factory.mktemp("report")
  data_dir = tiny.write_names(root / "data", *CELLS)
  config = tiny.config(data_dir)
  export = tiny.save(root / "export", config)
  lines = [
    {"step": i, "loss": 9.0 - i / 10, "mlm": 2.0, "itm_accuracy": 0.5}
    for i in range(1, 41)
  ]
  (export / "metrics.jsonl").write_text(
    "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 41, "lo'
  )
  found = run(
    evaluate_launcher,
    f"--workdir={export}",
    "--rerank=none,querybank,querybank_conse,itm",
    "--rerank_k=3",
    "--views=2",
    "--batch_size=8",
    "--pair_batch_size=16",
  )
  assert found.code == 0, found.err
  return export


@pytest.fixture(scope="module")
def page(work):
  found = run(report_launcher, f"--workdir={work}", "--num_examples=3")
  assert found.code == 0, found.err
  return (work / "report.html").read_text()


class Reader(html.parser.HTMLParser):
  """Collects image sources and checks that tags are closed in order."""

  VOID = {"meta", "img", "br"}

  def __init__(self):
    super().__init__()
    self.images, self.open = [], []

  def handle_starttag(self, tag, attributes):
    if tag == "img":
      self.images.append(dict(attributes))
    if tag not in self.VOID:
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag


def test_the_four_cells_are_the_default_and_keep_both_protocols(work):
  tree = results.read(work / "eval" / "retrieval" / "metrics.json")
  (cells,) = tree["results"].values()
  assert tuple(sorted(cells)) == tuple(sorted(CELLS))
  for split, protocols in cells.items():
    assert protocols.keys() == {
      "none_2views",
      "querybank_train_t0.1_2views",
      "querybank_conse_train_t0.1_c0.03_2views",
      "itm_k3_2views",
    }
    for entry in protocols.values():
      assert entry["num_images"] == 8 and entry["split"] == split
      assert entry["lineage"]["step"] == 7
      assert entry["metrics"].keys() == entry["chance"].keys()


def test_predictions_hold_both_directions_with_ids_that_exist(work):
  tree = results.read(work / "eval" / "retrieval" / "predictions.json")
  (cells,) = tree["results"].values()
  source = sources.open_source(work.parent / "data", CELLS[3])
  names = {source[i].id for i in range(len(source))}
  found = cells[CELLS[3]]["none_2views"]
  assert {query["query"] for query in found["i2t"]} == names
  assert {query["query"] for query in found["t2i"]} == set(tiny.NAMES)
  for query in found["t2i"]:
    assert {item["id"] for item in query["top"]} == names
    (right,) = [item["id"] for item in query["top"] if item["match"]]
    assert query["right"] == right


def test_the_page_is_whole_and_holds_its_pictures_itself(page):
  reader = Reader()
  reader.feed(page)
  assert not reader.open
  assert len(reader.images) > 20
  for image in reader.images:
    kind, _, data = image["src"].partition(";base64,")
    assert kind in ("data:image/png", "data:image/svg+xml")
    start = base64.b64decode(data)[:16]
    assert start.startswith((b"\x89PNG", b"<?xml"))
    assert image["alt"]
  assert not re.search(r'(src|href)="http', page)


def test_results_of_other_weights_are_told_and_charts_lie_by_the_page(
  work, page, tmp_path
):
  assert "other weights" not in page
  copy = tmp_path / "copy"
  shutil.copytree(work, copy)
  shutil.rmtree(copy / "plots")
  path = copy / "eval" / "retrieval" / "metrics.json"
  (found,) = set(re.findall(r'"params_sha256": "(\w+)"', path.read_text()))
  path.write_text(path.read_text().replace(found, "0" * 64))
  output = tmp_path / "elsewhere" / "page.html"
  found = run(
    report_launcher,
    f"--workdir={copy}",
    f"--output={output}",
    "--num_examples=1",
  )
  assert found.code == 0, found.err
  assert "Some results are of other weights" in output.read_text()
  assert (output.parent / "plots" / "curves.svg").is_file()
  assert not (copy / "plots").exists()


def test_the_page_shows_curves_cells_examples_and_attention(page):
  for text in (
    "unseen studio, unseen concepts",
    "dual encoder (cosine), 2 views",
    "dual encoder, querybank train, 2 views",
    "dual encoder, querybank and ConSE train, 2 views",
    "re-ranked by ITM, k = 3, 2 views",
    "chance",
    "Training",
    "Where each word looks",
    "the whole configuration",
  ):
    assert text in page
  assert page.count('class="right"') > 0
  assert "nan" not in re.sub(r"base64,[^\"]*", "", page).lower()


def test_the_page_is_the_same_for_the_same_seed(work, page):
  other = work.parent / "again.html"
  found = run(
    report_launcher,
    f"--workdir={work}",
    "--num_examples=3",
    f"--output={other}",
  )
  assert found.code == 0
  assert other.read_text() == page


def test_what_was_not_measured_is_said_and_not_invented(work, tmp_path):
  bare = tmp_path / "bare"
  weights_lib.save_export(bare, weights_lib.load_export(work))
  found = run(report_launcher, f"--workdir={bare}", "--num_examples=1")
  assert found.code == 0, found.err
  page = (bare / "report.html").read_text()
  assert "Not shown: launch/evaluate.py measured no retrieval." in page
  assert "Not shown: There is no metrics.jsonl." in page


def test_attention_that_a_run_does_not_have_is_left_out(work, tmp_path):
  whole = weights_lib.load_export(work)
  weights = dict.fromkeys(config_lib.OBJECTIVES, 0.0) | {"itc": 1.0}
  config = dataclasses.replace(
    whole.config, objectives=config_lib.ObjectiveConfig(**weights)
  )
  export = tmp_path / "contrastive"
  weights_lib.save_export(
    export,
    dataclasses.replace(whole, config=config, params=tiny.params(config)),
  )
  found = run(report_launcher, f"--workdir={export}", "--num_examples=1")
  assert found.code == 0, found.err
  page = (export / "report.html").read_text()
  assert "Where each word looks</h2><p>Not shown: no objective" in page


@pytest.fixture(scope="module")
def pages(work, tmp_path_factory):
  """The page of each system that completes patches."""
  found = {}
  for make in (random_pairs.maskvlm, random_pairs.sycoca):
    config = tiny.of_system(work.parent / "data", make)
    export = tiny.save(tmp_path_factory.mktemp("export") / "e", config)
    done = run(report_launcher, f"--workdir={export}", "--num_examples=2")
    assert done.code == 0, done.err
    found[config.system] = (export / "report.html").read_text()
  return found


@pytest.mark.parametrize("system", ["maskvlm", "sycoca"])
def test_patches_are_completed_from_two_captions_beside_numbers(pages, system):
  Reader().feed(pages[system])
  (section,) = re.findall(
    "<h2>What stands in the hidden patches(.*?)</section>", pages[system], re.S
  )
  rows = re.findall('<h4>(.*?)</h4><div class="row">(.*?)</div>', section, re.S)
  assert len(rows) == 2
  for caption, row in rows:
    assert caption in tiny.NAMES
    labels = re.findall("<figcaption>(.*?)</figcaption>", row)
    assert labels[2] == "from its caption"
    assert labels[3].removeprefix("from: ") in set(tiny.NAMES) - {caption}
    pictures = re.findall('src="(.*?)"', row)
    assert len(set(pictures)) == len(labels) == 5
  assert re.search(r"over 8 drawings: [.\d]+ from the own caption", section)
  assert ("caption speaks of most" in section) == (system == "sycoca")
  assert ("up to its brightness" in section) == (system == "sycoca")


def test_masked_words_are_guessed_with_the_drawing_and_without(pages):
  (section,) = re.findall(
    "<h2>What stands in the place of masked words(.*?)</section>",
    pages["maskvlm"],
    re.S,
  )
  assert section.count("&lt;mask&gt;") >= 2
  assert section.count("<li") >= 2 * 2 * 5
  assert re.search(r"% of \d+ masked tokens with the drawing", section)


def test_numbers_beside_the_patches_are_told_with_their_errors():
  own = np.array([1.0, 2.0, 3.0, 4.0])
  found = reconstruction.Completions(
    shown=(), error_A=own, other_error_A=own + [1, 1, -1, 3]
  )
  text = report_completion._compare_errors(found, "TG-MIM")
  assert "2.5000 from the own caption, 3.5000 from another one" in text
  # Deviations 0, 0, -2, 2: root of their mean square, over root four.
  assert f"difference 1.0000, standard error {2**0.5 / 2:.4f}" in text
  assert "lower for 75 % of the drawings, standard error 22 %" in text
  same = dataclasses.replace(found, other_error_A=own)
  assert "it is not read" in report_completion._compare_errors(same, "MIM")


def test_sections_of_other_systems_are_not_there(page, pages):
  assert "hidden patches" not in page and "masked words" not in page
  assert "masked words" not in pages["sycoca"]


@pytest.mark.parametrize(
  ("lineage", "text"),
  [
    ({"init_from": None}, "random weights"),
    ({"init_from": {"workdir": "runs/a", "step": 9}}, "runs/a, step 9"),
    ({"init_from": None, "imported": "scl.ckpt"}, "scl.ckpt"),
    ({"init_from": {"init_from": None, "imported": "scl.ckpt"}}, "scl.ckpt"),
    ({"init_from": {"init_from": None, "data_sha256": "d"}}, "other weights"),
  ],
)
def test_the_report_says_where_the_weights_began(lineage, text):
  assert report_run._describe_origin(lineage) == text


def test_a_convolution_stem_is_described():
  vision = config_lib.VisionConfig(
    width=128, stem=(64, 128), stem_blocks=(1, 0)
  )
  text = report_run._describe_stem(vision)
  assert (
    text == ", convolution stem of widths 64, 128 with 1, 0 residual blocks"
  )
  assert report_run._describe_stem(config_lib.VisionConfig()) == ""


def test_a_damaged_picture_is_named(tmp_path):
  record = dataclasses.replace(tiny.record("val", 0, ("a",)), image=b"none")
  data_dir = tiny.write_data(tmp_path / "data", {"val": [record]})
  with pytest.raises(errors.UserError, match="record 'val-0': "):
    report_retrieval.load_images(data_dir, "val", ["val-0"])


def test_a_caption_with_markup_is_text(work):
  query = {
    "query": "<b>&",
    "rank": 1,
    "right": "x",
    "top": [{"id": "x", "score": 1.0, "match": True}],
  }
  image = report_retrieval.load_images(
    work.parent / "data", CELLS[3], [f"{CELLS[3]}-300"]
  )
  (picture,) = image.values()
  assert "<b>&" not in report_retrieval._text_query(query, {"x": picture})


def test_export_of_an_export_carries_the_measured_metrics(work, tmp_path):
  found = run(
    export_launcher, f"--workdir={work}", f"--output={tmp_path / 'out'}"
  )
  assert found.code == 0, found.err
  manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
  measured = manifest["metrics"]["retrieval"]
  assert len(measured) == 4 * len(CELLS)  # protocols
  assert all("i2t_r1" in metrics for metrics in measured.values())


@pytest.mark.parametrize(
  "launcher,arguments,message",
  [
    (evaluate_launcher, [], "--workdir is missing"),
    (evaluate_launcher, ["--workdir=/nowhere"], "neither a work dir"),
    (evaluate_launcher, ["--wrkdir=x"], "Did you mean: workdir"),
    (evaluate_launcher, ["--workdir={}", "--rerank=best"], "any of none, "),
    (evaluate_launcher, ["--workdir=/nowhere", "--rerank="], "--rerank is"),
    (evaluate_launcher, ["--workdir={}", "--splits=val"], "no split 'val'"),
    (
      evaluate_launcher,
      ["--workdir={}", "--rerank=querybank", "--querybank=val"],
      "--querybank: ",
    ),
    (evaluate_launcher, ["--workdir={}", "--limit=3"], "of --rerank=full"),
    (report_launcher, ["--workdir={}", "--splits=val"], "no split 'val'"),
    (evaluate_launcher, ["--workdir={}", "--data=/no"], "no such data dir"),
    (evaluate_launcher, ["--workdir={}", "--step=3"], "no step '3'"),
    (export_launcher, ["--workdir={}"], "--output is missing"),
    (report_launcher, ["--workdir=/nowhere"], "neither a work dir"),
    (
      evaluate_launcher,
      ["--workdir={0}", "--output={0}/config.json/x"],
      "config.json is not a folder that can be written",
    ),
    (
      export_launcher,
      ["--workdir={0}", "--output={0}/config.json"],
      "config.json is not a folder that can be written",
    ),
    (report_launcher, ["--workdir={0}", "--output={0}"], "is a folder"),
    (
      report_launcher,
      ["--workdir={0}", "--output={0}/config.json/x.html"],
      "config.json is not a folder that can be written",
    ),
  ],
)
def test_mistakes_end_with_one_line_and_code_2(
  work, launcher, arguments, message
):
  found = run(launcher, *(text.format(work) for text in arguments))
  assert found.code == 2
  assert found.err.startswith("error: ") and message in found.err


def test_series_keep_the_last_point_and_skip_what_is_missing():
  records = [{"step": i, "loss": float(i)} for i in range(5000)]
  records += [{"step": 5000}, {"step": 5001, "loss": None}]
  found = report_run.series(records, "loss")
  assert len(found) <= report_run.MAX_POINTS
  assert found[-1] == (4999, 4999.0)
  assert report_run.series(records, "mlm") == []


def test_a_last_line_cut_by_a_kill_is_left_out(work):
  assert len(report_run.read_metrics(work / "metrics.jsonl")) == 40
