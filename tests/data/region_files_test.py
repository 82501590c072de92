"""Reading what detectors wrote, whole and broken."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from glscl_jax.data import pairs, region_files
from tests.data import detector_files

WIDTH, NUM_CLASSES = 6, len(detector_files.CLASSES)
FOUND = {"9": detector_files.make(9), "25": detector_files.make(25, count=40)}
ROWS = [detector_files.row_of(name, found) for name, found in FOUND.items()]


def open_reader(path):
  return region_files.open_reader(path, num_classes=NUM_CLASSES)


@pytest.fixture(scope="module")
def npz(tmp_path_factory):
  folder = tmp_path_factory.mktemp("npz")
  for name, found in FOUND.items():
    detector_files.write_npz(folder / f"{name}.npz", found)
  return folder


@pytest.fixture(params=["new", "new with names", "npz"])
def reader(request, tmp_path, npz):
  if request.param == "npz":
    return open_reader(npz)
  path = tmp_path / "features.tsv"
  header = request.param == "new with names"
  return open_reader(detector_files.write_tsv(path, ROWS, header=header))


@pytest.mark.parametrize("image", list(FOUND))
def test_regions_are_what_the_detector_found_most_confident_first(
  reader, image
):
  found = FOUND[image]
  order = np.argsort(-found.confidence)
  read = reader.read(image, width=WIDTH)
  size = np.array([found.width, found.height] * 2)
  half = {"atol": 1e-3}  # of float16
  np.testing.assert_allclose(read.box_R4, found.boxes[order] / size, **half)
  np.testing.assert_allclose(read.feature_RP, found.features[order], **half)
  np.testing.assert_allclose(read.confidence_R, found.confidence[order], **half)
  # Classes count from 1; the last one of the list is among them.
  assert read.class_R.tolist() == (1 + found.objects[order]).tolist()
  kinds = (read.feature_RP, read.box_R4, read.class_R, read.confidence_R)
  assert [array.dtype for array in kinds] == [
    np.float16,
    np.float32,
    np.int32,
    np.float32,
  ]
  assert read.class_R.max() <= NUM_CLASSES


def test_the_last_class_is_found(tmp_path):
  last = dataclasses.replace(FOUND["9"], objects=np.full(12, NUM_CLASSES - 1))
  table = detector_files.write_tsv(
    tmp_path / "t.tsv", [detector_files.row_of("9", last)]
  )
  detector_files.write_npz(tmp_path / "9.npz", last)
  for path in (table, tmp_path):
    assert set(open_reader(path).read("9").class_R) == {NUM_CLASSES}


def test_the_class_is_never_the_background(tmp_path):
  soft = np.zeros((12, NUM_CLASSES + 1), np.float16)
  soft[:, 0] = 1.0
  detector_files.write_npz(tmp_path / "9.npz", FOUND["9"], soft_labels=soft)
  assert set(open_reader(tmp_path).read("9").class_R) == {1}


def test_boxes_of_little_confidence_are_left_out(tmp_path):
  low = dataclasses.replace(
    FOUND["25"], confidence=np.where(np.arange(40) < 15, 0.5, 0.1)
  )
  path = detector_files.write_tsv(
    tmp_path / "t.tsv", [detector_files.row_of("25", low)]
  )
  assert len(open_reader(path).read("25").box_R4) == 15


def test_the_old_table_has_regions_without_classes(tmp_path):
  path = detector_files.write_tsv(
    tmp_path / "t.tsv", ROWS, columns=detector_files.OLD
  )
  read = open_reader(path).read("25", width=WIDTH)
  assert not read.class_R.any()
  assert (read.confidence_R == 1).all()
  features = FOUND["25"].features.astype(np.float16)
  assert np.array_equal(read.feature_RP, features)


def test_named_columns_may_come_in_any_order(tmp_path):
  path = detector_files.write_tsv(
    tmp_path / "t.tsv", ROWS, columns=detector_files.OLD[::-1], header=True
  )
  reader = open_reader(path)
  assert len(reader.read("9").box_R4) == 12
  path.write_bytes(path.read_bytes().replace(b"\r\n", b"\n"))
  assert len(open_reader(path).read("25").box_R4) == 40


def test_long_lines_are_read(tmp_path):
  wide = detector_files.make(3, count=100, width=2048)
  rows = [detector_files.row_of(str(i), wide) for i in range(3)]
  path = detector_files.write_tsv(tmp_path / "t.tsv", rows)
  assert path.stat().st_size > 3 * 10**6
  read = open_reader(path).read("2", width=2048)
  assert read.feature_RP.shape == (100, 2048)


def test_of_two_lines_of_one_image_the_first_counts(tmp_path):
  other = detector_files.row_of("9", FOUND["25"])
  path = detector_files.write_tsv(tmp_path / "t.tsv", [*ROWS, other])
  assert len(open_reader(path).read("9").box_R4) == 12


def changed(**cells):
  return [ROWS[0] | cells, ROWS[1]]


@pytest.mark.parametrize(
  ("rows", "reason"),
  [
    (changed(features="!!!"), "features: .*base64"),
    (changed(features=ROWS[1]["features"][:-16]), "features: .* for 12 boxes"),
    (changed(boxes=ROWS[0]["boxes"][:64]), "boxes: 12 values for 12 boxes"),
    (changed(objects_id=ROWS[1]["objects_id"]), "objects_id: 40 values for 12"),
    (changed(num_boxes="many"), "num_boxes: "),
    (changed(num_boxes=0), "0 boxes in 200 x 100"),
    (changed(img_w=20), "boxes: from .* of the image's size"),
    (ROWS[1:], "no line of .*t.tsv"),
  ],
)
def test_a_broken_line_of_a_table_says_why(tmp_path, rows, reason):
  reader = open_reader(detector_files.write_tsv(tmp_path / "t.tsv", rows))
  with pytest.raises(region_files.BadRegions, match=reason):
    reader.read("9")
  assert len(reader.read("25").box_R4) == 40


def test_a_line_that_was_cut_says_why(tmp_path):
  path = detector_files.write_tsv(tmp_path / "t.tsv", ROWS)
  path.write_bytes(path.read_bytes()[:-100])
  reader = open_reader(path)
  assert len(reader.read("9").box_R4) == 12
  with pytest.raises(region_files.BadRegions, match="features: "):
    reader.read("25")
  path.write_bytes(path.read_bytes()[: path.read_bytes().index(b"25\t") + 9])
  with pytest.raises(region_files.BadRegions, match="columns, the file has 10"):
    open_reader(path).read("25")


@pytest.mark.parametrize(
  ("changes", "reason"),
  [
    ({"conf": None}, "9.npz has no conf"),
    ({"soft_labels": np.ones((12, 5))}, "expected 6 columns, the background"),
    ({"norm_bb": np.zeros((12, 5))}, "norm_bb: shape"),
    ({"features": np.zeros((11, 6))}, "features: shape"),
    ({"features": np.full((12, 6), 1e6)}, "features: not finite"),
    ({"conf": np.array([{}] * 12)}, "9.npz is not readable"),
    ({"conf": np.array(["a"] * 12)}, "9.npz, conf: <U1 are no numbers"),
    ({"conf": np.zeros(())}, "9.npz, conf: 0 dimensions, expected 1"),
    ({"features": np.zeros(())}, "features: 0 dimensions, expected 2"),
    ({"soft_labels": np.full((12, 6), np.nan)}, "soft_labels: not finite"),
  ],
)
def test_a_broken_file_says_why(tmp_path, changes, reason):
  detector_files.write_npz(tmp_path / "9.npz", FOUND["9"], **changes)
  with pytest.raises(region_files.BadRegions, match=reason):
    open_reader(tmp_path).read("9")


def test_a_damaged_or_missing_file_says_why(tmp_path, npz):
  whole = (npz / "9.npz").read_bytes()
  reader = open_reader(tmp_path)
  with pytest.raises(region_files.BadRegions, match="no file .*9.npz"):
    reader.read("9")
  for damaged in (b"", b"no zip", whole[:-40], whole[:60] + b"x" * 90):
    (tmp_path / "9.npz").write_bytes(damaged)
    with pytest.raises(region_files.BadRegions, match="9.npz is not readable"):
      reader.read("9")


def test_features_of_another_width_are_refused(reader):
  with pytest.raises(region_files.BadRegions, match="features: shape"):
    reader.read("9", width=7)


def test_the_width_is_that_of_the_first_image_that_can_be_read(reader):
  assert region_files.find_width(reader, ["none", "9"]) == WIDTH
  with pytest.raises(pairs.DataError, match="no image of the captions.*none:"):
    region_files.find_width(reader, ["none", "neither"])


@pytest.mark.parametrize(
  ("name", "text", "message"),
  [
    ("features.csv", "", "expected a .tsv file"),
    ("none", None, "expected a .tsv file"),
    ("t.tsv", "1\t2\t3\n", "3 columns; expected those of bottom-up-attention"),
    ("t.tsv", "", "1 columns; expected"),
    ("t.tsv", "boxes\tfeatures\n", "2 columns; expected"),
  ],
)
def test_what_is_neither_table_nor_folder_is_named(
  tmp_path, name, text, message
):
  path = tmp_path / name
  if text is not None:
    path.write_text(text)
  with pytest.raises(pairs.DataError, match=message):
    open_reader(path).read("9")


def test_other_files_have_another_fingerprint(npz, tmp_path):
  before = open_reader(npz).fingerprint(["9", "25"])
  assert open_reader(npz).fingerprint(["25", "9", "9"]) == before
  assert open_reader(npz).fingerprint(["9"]) != before
  path = detector_files.write_tsv(tmp_path / "t.tsv", ROWS)
  table = open_reader(path).fingerprint([])
  path.write_bytes(path.read_bytes() + b"\n")
  assert open_reader(path).fingerprint([]) != table
