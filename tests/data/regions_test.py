"""Region sets: what is kept, stored, refused and padded."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import numpy as np
import pytest

from glscl_jax.data import pairs, regions, sources
from tests.data import tiny_regions

WIDTH, CLASSES = tiny_regions.WIDTH, tiny_regions.CLASSES


def assert_same(one, other):
  for name, array in regions.to_row(one).items():
    stored = regions.to_row(other)[name]
    assert array.dtype == stored.dtype, name
    assert np.array_equal(array, stored), name


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  records = [tiny_regions.make_record(i) for i in range(8)]
  return tiny_regions.write(tmp_path_factory.mktemp("data") / "r", records)


@pytest.mark.parametrize(
  ("confident", "total", "kept"),
  [(3, 40, 10), (3, 7, 7), (36, 50, 36), (130, 150, 100), (0, 12, 10)],
)
def test_the_confident_boxes_are_kept_within_ten_and_a_hundred(
  confident, total, kept
):
  confidence = np.full(total, 0.2)  # not above .2
  confidence[:confident] = 0.3
  found = tiny_regions.make([1] * total, confidence=confidence)
  assert len(regions.keep_confident(found).box_R4) == kept


def test_kept_boxes_come_highest_confidence_first_and_ties_in_order():
  found = tiny_regions.make([1, 2, 3, 4], confidence=[0.3, 0.8, 0.3, 0.9])
  kept = regions.keep_confident(found)
  assert kept.class_R.tolist() == [4, 2, 1, 3]
  assert np.array_equal(kept.feature_RP, found.feature_RP[[3, 1, 0, 2]])
  assert np.array_equal(kept.box_R4, found.box_R4[[3, 1, 0, 2]])


def test_a_box_gets_its_width_height_and_area():
  box = regions.add_sizes(np.array([[0.1, 0.2, 0.4, 0.6]], np.float32))
  assert box.dtype == np.float32
  np.testing.assert_allclose(
    box[0], [0.1, 0.2, 0.4, 0.6, 0.3, 0.4, 0.12], rtol=1e-6
  )


def test_padding_fills_what_is_missing_with_slots_that_are_not_valid():
  found = tiny_regions.make([2, 1, 3])
  rows = regions.pad(found, number=5)
  assert rows["region_BRP"].shape == (5, WIDTH)
  assert rows["region_BRP"].dtype == np.float32
  assert np.array_equal(rows["region_BRP"][:3], found.feature_RP)
  assert rows["region_class_BR"].tolist() == [2, 1, 3, 0, 0]
  assert rows["region_valid_BR"].tolist() == [True] * 3 + [False] * 2
  assert not rows["box_BR7"][3:].any() and not rows["region_BRP"][3:].any()


def test_the_first_regions_stay_where_there_are_more():
  rows = regions.pad(tiny_regions.make([2, 1, 3]), number=2)
  assert rows["region_class_BR"].tolist() == [2, 1]
  assert rows["region_valid_BR"].all()


@pytest.mark.parametrize(
  ("name", "value", "message"),
  [
    ("feature_RP", np.zeros((2, 5), np.float16), "features: shape"),
    ("feature_RP", np.full((2, WIDTH), np.inf, np.float16), "not finite"),
    ("box_R4", np.array([[0.5, 0, 0.4, 1]] * 2), "ends before it begins"),
    ("box_R4", np.array([[0, 0, 40.0, 30.0]] * 2), "boxes: from 0 to 40"),
    ("class_R", np.array([6, 1]), "classes: from 1 to 6, but the list has 5"),
    ("confidence_R", np.zeros(3), "confidence: shape"),
  ],
)
def test_a_fault_is_said(name, value, message):
  good = tiny_regions.make([1, 2])
  limits = {"width": WIDTH, "num_classes": len(CLASSES)}
  assert regions.find_fault(good, **limits) == ""
  bad = dataclasses.replace(good, **{name: value})
  assert message in regions.find_fault(bad, **limits)


def test_the_last_class_of_the_list_is_one():
  limits = {"width": WIDTH, "num_classes": 5}
  assert regions.find_fault(tiny_regions.make([5]), **limits) == ""


def test_regions_come_back_as_they_were_written(data_dir):
  source = sources.open_source(data_dir, "train")
  for i in range(8):
    example = source[i]
    record = tiny_regions.make_record(int(example.id.split("-")[1]))
    assert example.image is None
    assert example.captions == record.captions
    assert_same(example.regions, record.regions)


def test_the_directory_says_what_its_regions_are(data_dir):
  manifest = pairs.read_manifest(data_dir)
  listed = (data_dir / "region_classes.txt").read_bytes()
  assert listed.decode().split("\n") == [*CLASSES, ""]
  assert manifest["regions"] == {
    "feature_width": WIDTH,
    "num_classes": 5,
    "classes_sha256": hashlib.sha256(listed).hexdigest(),
    "images": False,
  }
  assert sources.read_schema(data_dir).classes == CLASSES


def test_another_list_of_classes_is_refused(tmp_path):
  made = tiny_regions.write(tmp_path / "r", [tiny_regions.make_record(0)])
  (made / "region_classes.txt").write_text("cat\n")
  with pytest.raises(pairs.DataError, match="region_classes.txt: not the list"):
    sources.read_schema(made)
  (made / "region_classes.txt").unlink()
  with pytest.raises(pairs.DataError, match="region_classes.txt: not readable"):
    sources.read_schema(made)


def test_equal_regions_share_an_image_id_and_others_do_not(tmp_path):
  records = [
    dataclasses.replace(tiny_regions.make_record(number), id=name)
    for name, number in (("a", 2), ("b", 2), ("c", 3))
  ]
  made = tiny_regions.write(tmp_path / "r", records)
  source = sources.open_source(made, "train")
  ids = {source[i].id: source[i].image_id for i in range(3)}
  assert ids["a"] == ids["b"] != ids["c"]


def test_other_regions_give_another_hash_of_the_contents(tmp_path):
  record = tiny_regions.make_record(2)
  hashes = set()
  for place, seed in (("a", 2), ("b", 2), ("c", 9)):
    changed = dataclasses.replace(
      record, regions=tiny_regions.make([1, 2, 2], seed=seed)
    )
    manifest = pairs.read_manifest(
      tiny_regions.write(tmp_path / place, [changed])
    )
    hashes.add(
      (manifest["content_sha256"], pairs.hash_split(manifest, "train"))
    )
  assert len(hashes) == 2


def test_records_of_images_alone_are_written_as_before(tmp_path):
  record = pairs.Record(
    id="a", split="train", image=b"not decoded", captions=("x", "y")
  )
  manifest = pairs.write(
    tmp_path / "p",
    splits={"train": lambda: iter([record])},
    source={"kind": "test"},
    finish=lambda directory, manifest: None,
  )
  image = hashlib.sha256(b"not decoded").hexdigest()
  line = json.dumps(["train", "a", image, "x", "y"]).encode()
  once = hashlib.sha256(line).digest()
  assert manifest["content_sha256"] == hashlib.sha256(once).hexdigest()
  stored = json.dumps(["a", image, "x", "y"]) + "\n"
  assert pairs.hash_split(manifest, "train") == (
    hashlib.sha256(stored.encode()).hexdigest()
  )
  assert "regions" not in manifest
  assert sources.read_schema(tmp_path / "p") is None
  assert sources.open_source(tmp_path / "p", "train")[0].regions is None


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("dog\ncat,kitten\n", ("dog", "cat,kitten")),
    ("dog \r\ncat\r\n\n", ("dog", "cat")),
  ],
)
def test_a_list_of_classes_is_read_line_by_line(text, expected):
  assert regions.read_classes(text) == expected


@pytest.mark.parametrize("text", ["", "\n", "dog\n\ncat\n", "dog\n ,\ncat"])
def test_a_class_without_a_name_is_an_error(text):
  with pytest.raises(ValueError, match="names no class"):
    regions.read_classes(text)


def test_commas_part_the_names_of_a_class():
  assert regions.aliases("t-shirt, tee shirt,") == ("t-shirt", "tee shirt")
