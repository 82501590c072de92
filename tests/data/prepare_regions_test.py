"""Whole preparations from what detectors wrote."""

from __future__ import annotations

import json

import pytest

from glscl_jax import errors
from glscl_jax.data import pairs, prepare, regions, sources, tokenizer
from launch import prepare as command
from tests.data import detector_files, tiny_regions

SMALL = prepare.Vocabulary(size=60, model_type="word")
FOUND = {str(i): detector_files.make(i, count=11 + i) for i in range(4)}


@pytest.fixture
def files(tmp_path):
  """The table, the list of classes and captions of all images."""
  rows = [detector_files.row_of(name, found) for name, found in FOUND.items()]
  detector_files.write_tsv(tmp_path / "features.tsv", rows)
  classes = "".join(f"{line}\n" for line in detector_files.CLASSES)
  (tmp_path / "classes.txt").write_text(classes)
  write_captions(
    tmp_path,
    [{"image": i, "caption": ["a dog", f"apples {i}"]} for i in range(3)]
    + [{"image": "3", "caption": "a knife", "split": "test", "id": "last"}],
  )
  return tmp_path


def write_captions(folder, rows):
  lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
  (folder / "captions.jsonl").write_text("\n".join(lines))


def make(files, output="data", **changes):
  arguments = {
    "path": files / "captions.jsonl",
    "features": files / "features.tsv",
    "classes": files / "classes.txt",
    "vocabulary": SMALL,
  }
  return prepare.prepare_regions(files / output, **{**arguments, **changes})


def examples(data_dir, split):
  source = sources.open_source(data_dir, split)
  return {source[i].id: source[i] for i in range(len(source))}


def test_captions_get_the_regions_of_their_image(files):
  manifest = make(files)
  assert manifest["splits"] == {"test": 1, "train": 3}
  assert manifest["rejected"] == [] and manifest["lines"] == 4
  found = examples(files / "data", "train")["line-3"]
  assert found.captions == ("a dog", "apples 2")
  assert found.image is None and len(found.regions.box_R4) == 13
  assert (
    found.regions.confidence_R[:-1] >= found.regions.confidence_R[1:]
  ).all()
  (last,) = examples(files / "data", "test").values()
  assert last.id == "last" and len(last.regions.box_R4) == 14
  schema = sources.read_schema(files / "data")
  assert schema == regions.Schema(
    width=tiny_regions.WIDTH, classes=detector_files.CLASSES, images=False
  )


def test_the_tokenizer_is_trained_on_the_training_captions(files):
  make(files)
  loaded = tokenizer.load(sources.tokenizer_path(files / "data"))
  assert not loaded.encode("a dog apples", 9).unknown
  assert loaded.encode("knife", 9).unknown


def test_tables_and_folders_give_the_same_records(files):
  folder = files / "npz"
  folder.mkdir()
  for name, found in FOUND.items():
    detector_files.write_npz(folder / f"{name}.npz", found)
  make(files, "one")
  make(files, "two", features=folder)
  for split in ("train", "test"):
    first, second = (examples(files / name, split) for name in ("one", "two"))
    assert first.keys() == second.keys()
    for name, example in first.items():
      assert example.captions == second[name].captions
      for key, array in regions.to_row(example.regions).items():
        other = regions.to_row(second[name].regions)[key]
        assert array == pytest.approx(other, abs=1e-3)


def test_a_whole_directory_is_left_alone(files):
  made = make(files)
  before = (files / "data" / "manifest.json").stat().st_mtime_ns
  assert make(files) == made
  assert (files / "data" / "manifest.json").stat().st_mtime_ns == before
  # Other features make it again.
  path = files / "features.tsv"
  path.write_bytes(path.read_bytes() + b"\n")
  make(files)
  assert (files / "data" / "manifest.json").stat().st_mtime_ns > before


def test_broken_images_are_counted_and_named(files):
  path = files / "features.tsv"
  lines = path.read_bytes().split(b"\r\n")
  lines[1] = lines[1][:-400]
  path.write_bytes(b"\r\n".join(lines))
  rows = [{"image": i, "caption": "a dog"} for i in (0, 1, 2, 7)]
  rows += [{"image": 1.5, "caption": "a dog"}, {"image": 2, "caption": " "}]
  write_captions(files, rows)
  with pytest.raises(pairs.DataError, match="2 of 6 lines rejected"):
    make(files)
  assert not (files / "data").exists()
  with pytest.raises(pairs.DataError, match="4 of 6 lines rejected(.|\n)*1.5"):
    make(files, max_reject_share=0.5)
  manifest = make(files, max_reject_share=0.7)
  reasons = {
    reject["line"]: reject["reason"] for reject in manifest["rejected"]
  }
  assert sorted(reasons) == [2, 4, 5, 6]
  assert reasons[2].startswith("regions of image 1: ")
  assert "regions of image 7: no line of" in reasons[4]
  assert reasons[5] == "image: expected an id, got 1.5"
  assert manifest["splits"] == {"train": 2}
  text = prepare.describe(files / "data", manifest)
  assert "regions of 5 classes, features of 6 values" in text
  assert "4 records rejected" in text


def test_no_usable_image_is_said(files):
  write_captions(files, [{"image": 7, "caption": "a dog"}])
  with pytest.raises(pairs.DataError, match="no image of the captions.*7: no"):
    make(files)


@pytest.mark.parametrize("text", [None, "", "dog\n\ncat\n"])
def test_a_list_of_classes_that_is_none_is_named(files, text):
  path = files / "other.txt"
  if text is not None:
    path.write_text(text)
  with pytest.raises(
    pairs.DataError, match="--classes=.*other.txt: not a list"
  ):
    make(files, classes=path)


def test_a_shorter_list_of_classes_is_noticed(files):
  (files / "classes.txt").write_text("dog\n")
  with pytest.raises(errors.UserError, match="the list has 1"):
    make(files)


def test_the_command_makes_a_directory(files, capsys):
  arguments = [
    "launch/prepare.py",
    "--source=regions",
    f"--input={files / 'captions.jsonl'}",
    f"--features={files / 'features.tsv'}",
    f"--classes={files / 'classes.txt'}",
    f"--output={files / 'data'}",
    "--vocab_size=30",
  ]
  assert command.main(arguments) == 0
  assert "3 pairs in train" in capsys.readouterr().out
