"""Anchors on the page of a run: figures, boxes in colours, answers."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re

import numpy as np
import pytest

from glscl_jax.data import sources
from glscl_jax.export import anchor_pictures, pictures, report_retrieval
from glscl_jax.export import weights as weights_lib
from launch import evaluate as evaluate_launcher
from launch import report as report_launcher
from tests import tiny
from tests.data import tiny_regions
from tests.export.report_test import Reader
from tests.tasks.anchors_test import make_config, make_record

NUM = 7


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  records = [
    dataclasses.replace(
      make_record(split, 100 * s + number), image=tiny.png(100 * s + number)
    )
    for s, split in enumerate(("train", "test"))
    for number in range(NUM)
  ]
  return tiny_regions.write(
    tmp_path_factory.mktemp("pictures") / "data", records, images=True
  )


def run(launcher, *arguments):
  err = io.StringIO()
  with (
    contextlib.redirect_stdout(io.StringIO()),
    contextlib.redirect_stderr(err),
  ):
    code = launcher.main(["launch", *arguments])
  assert code == 0, err.getvalue()


def section_of(page):
  (found,) = re.findall("<h2>Anchors and swaps(.*?)</section>", page, re.S)
  return found


def make_page(folder, config, *tasks):
  export = tiny.save(folder, config)
  for task in tasks:
    run(
      evaluate_launcher,
      f"--workdir={export}",
      f"--task={task}",
      "--splits=test",
      *(["--rerank=full"] if task == "retrieval" else []),
    )
  run(report_launcher, f"--workdir={export}", "--num_examples=3")
  return (export / "report.html").read_text()


@pytest.fixture(scope="module")
def page(data_dir):
  config = make_config(data_dir)
  return make_page(data_dir.parent / "e", config, "anchors", "retrieval")


def make_scenes(data_dir, config, **options):
  weights = weights_lib.load_export(
    tiny.save(data_dir.parent / f"export{len(options)}", config)
  )
  sizes = {"num_shown": 4, "num_tried": 50, "seed": 0} | options
  source = sources.open_source(data_dir, "test")
  return anchor_pictures.make_scenes(weights, source, **sizes)


def test_the_page_is_whole_and_tells_figures_and_answers(page):
  Reader().feed(page)
  section = section_of(page)
  assert "change places" in section and "nothing swapped or masked" in section
  assert section.count('class="boxes"') == 3
  # A dog and red apples each, with both answers and a bar for each region.
  assert section.count('class="anchor"') == 6
  assert section.count("<span>word <q") == section.count("<span>class <q") == 6
  assert section.count("; n = 12<") == 3  # words, classes, nearest regions
  assert "1.71 anchors an image" in section


def test_facts_are_of_regions_and_other_sections_are_not_there(page):
  assert "at most 6 of an image, of 6 values and a box, 5 classes" in page
  for text in ("Image encoder", "Where each word looks", "masked words"):
    assert text not in page
  assert "fusion (ITM) on all pairs" in page


def test_what_was_not_measured_is_said(data_dir, tmp_path):
  section = section_of(make_page(tmp_path / "e", make_config(data_dir)))
  assert "--task=anchors was not run" in section
  assert "Right answers in percent" not in section
  assert section.count('class="boxes"') == 3


@pytest.mark.parametrize(
  ("names", "there", "absent"),
  [
    (("wrc", "itm"), ('class="bars"',), ("<q", "change places")),
    (("amc",), ("<span>word <q",), ('class="bars"', "cosine")),
  ],
)
def test_only_what_is_trained_is_shown(
  data_dir, tmp_path, names, there, absent
):
  config = make_config(data_dir, *names)
  section = section_of(make_page(tmp_path / "e", config, "anchors"))
  assert all(text in section for text in there)
  assert not any(text in section for text in absent)
  assert "not asked" in section


def test_a_run_that_asks_for_no_words_says_so(data_dir, tmp_path):
  page = make_page(tmp_path / "e", make_config(data_dir, "itm"))
  assert "Not shown: no objective of this run asks" in section_of(page)


def test_a_run_without_anchors_shows_figures_alone(data_dir, tmp_path):
  config = make_config(data_dir, "mlm", "mrc", masking={"swap": "none"})
  section = section_of(make_page(tmp_path / "e", config, "anchors"))
  assert f"none of {NUM} of test has an anchor" in section
  assert 'class="boxes"' not in section and "no anchors asked" in section


def test_words_and_boxes_of_an_anchor_have_one_colour(data_dir):
  scenes = make_scenes(data_dir, make_config(data_dir))
  assert len(scenes) == 4
  for scene in scenes:
    assert [a.phrase for a in scene.anchors] == ["dog", "red apples"]
    assert dict(scene.words)["dog"] == 0
    assert [own for word, own in scene.words if "apple" in word] == [1]
    assert dict(scene.words)["with"] is None
    for index, anchor in enumerate(scene.anchors):
      assert scene.classes[anchor.region] == ("dog", "red apple")[index]
      assert anchor.classed.own == scene.classes[anchor.region]
      assert anchor.word.own == ("dog", "red")[index]
      named = [scene.classes[n.region] for n in anchor.near if n.named]
      assert set(named) == {scene.classes[anchor.region]}
      assert len(anchor.near) == len(scene.classes)
      colour = np.array(
        [int(pictures.anchor_colour(index)[i : i + 2], 16) for i in (1, 3, 5)]
      )
      assert (scene.image_YXC == colour).all(axis=2).any()


def test_answers_are_those_of_the_evaluation(data_dir):
  scenes = make_scenes(data_dir, make_config(data_dir), num_shown=NUM)
  assert len(scenes) == 6  # the seventh names nothing that is there
  for scene in scenes:
    for anchor in scene.anchors:
      for answer in (anchor.word, anchor.classed):
        assert answer.right == (answer.said == answer.own)


def test_boxes_stand_where_they_are_said_to_be():
  image_YXC = np.full((20, 40, 3), 255, np.uint8)
  box_R4 = np.array([[0.5, 0.5, 1.0, 1.0], [0.0, 0.0, 0.25, 0.5]])
  drawn_YXC = pictures.draw_boxes(
    image_YXC, box_R4, ["#ff0000", None], size=400
  )
  assert drawn_YXC.shape == (200, 400, 3)
  red_YX = (drawn_YXC == [255, 0, 0]).all(axis=2)
  assert np.argwhere(red_YX).min(axis=0).tolist() == [99, 199]
  assert np.argwhere(red_YX).max(axis=0).tolist() == [199, 399]
  assert (drawn_YXC[150:195, 250:395] == 255).all()  # nothing inside
  grey_YX = (drawn_YXC != 255).any(axis=2) & ~red_YX
  assert grey_YX[:101, :101].any() and not grey_YX[:, 110:200].any()


def test_regions_without_images_are_drawn_on_white(tmp_path):
  records = [make_record(s, n) for s in ("train", "test") for n in range(3)]
  data_dir = tiny_regions.write(tmp_path / "data", records)
  (scene, *_) = make_scenes(data_dir, make_config(data_dir), num_shown=1)
  corner = (255, 255, 255)
  assert tuple(scene.image_YXC[-1, 0]) == corner
  found = report_retrieval.load_images(str(data_dir), "test", ["test-1"])
  assert (found["test-1"] == 255).all()
