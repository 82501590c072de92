"""Reading a data directory: random access, pickling, clear refusals."""

from __future__ import annotations

import dataclasses
import io
import json
import pickle

import numpy as np
import pytest
from PIL import Image

from glscl_jax.data import pairs, sources

COUNTS = {"train": 40, "test": 3}


def _image(number):
  # Noise, so that compression keeps the file larger than one block.
  rng = np.random.default_rng(number)
  image_YXC = rng.integers(0, 256, (24, 24, 3), np.uint8)
  out = io.BytesIO()
  Image.fromarray(image_YXC).save(out, "PNG")
  return out.getvalue()


def _record(split, number):
  return pairs.Record(
    id=f"{split}-{number}",
    split=split,
    image=_image(number),
    captions=(f"caption {number}", "caf\u00e9 \U0001f600")[: 1 + number % 2],
  )


def _write(path):
  pairs.write(
    path,
    splits={
      name: lambda name=name, count=count: (
        _record(name, number) for number in range(count)
      )
      for name, count in COUNTS.items()
    },
    source={"kind": "test"},
    finish=lambda directory, manifest: None,
  )
  return path


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  return _write(tmp_path_factory.mktemp("data") / "pairs")


@pytest.fixture
def own_dir(tmp_path):
  """A directory that a test may damage."""
  return _write(tmp_path / "pairs")


def test_splits_give_the_number_of_records(data_dir):
  assert sources.splits(data_dir) == COUNTS


def test_every_record_comes_back_as_it_was_written(data_dir):
  for split, count in COUNTS.items():
    source = sources.open_source(data_dir, split)
    assert len(source) == count
    assert source.name == f"pairs/{split}"
    found = {source[index].id: source[index] for index in range(count)}
    assert len(found) == count
    for number in range(count):
      record = _record(split, number)
      example = found[record.id]
      assert example.image == record.image
      assert example.captions == record.captions


def test_access_is_random_and_repeatable(data_dir):
  source = sources.open_source(data_dir, "train")
  forward = [source[index] for index in range(len(source))]
  backward = [source[index] for index in reversed(range(len(source)))]
  assert forward == backward[::-1]
  assert source[np.int64(5)] == forward[5]


def test_image_ids_are_equal_for_equal_images_alone(data_dir):
  # Both splits were made from the same first three pictures.
  seen = {}
  for split in COUNTS:
    source = sources.open_source(data_dir, split)
    for index in range(len(source)):
      example = source[index]
      assert seen.setdefault(example.image, example.image_id) == (
        example.image_id
      )
  assert sorted(seen.values()) == list(range(COUNTS["train"]))
  assert pairs.read_manifest(data_dir)["images_in_several_splits"] == 3


@pytest.mark.parametrize("index", [-1, 40, 10**6])
def test_an_index_outside_is_an_index_error(data_dir, index):
  with pytest.raises(IndexError, match="has 40 records"):
    sources.open_source(data_dir, "train")[index]


def test_a_used_source_can_be_pickled(data_dir):
  source = sources.open_source(data_dir, "train")
  expected = source[7]
  data = pickle.dumps(source)
  assert len(data) < 1000  # no open reader and no records inside
  assert pickle.loads(data)[7] == expected


def test_a_missing_directory_says_which_command_makes_it(tmp_path):
  with pytest.raises(pairs.DataError) as caught:
    sources.open_source(tmp_path / "nowhere", "train")
  assert "nowhere: no such data directory" in str(caught.value)
  assert "launch/prepare.py --source=emoji" in str(caught.value)


def test_a_directory_without_a_manifest_is_refused(tmp_path):
  with pytest.raises(pairs.DataError, match="manifest.json: not readable"):
    sources.splits(tmp_path)


def test_a_directory_of_another_format_is_refused(own_dir):
  path = own_dir / pairs.MANIFEST
  manifest = json.loads(path.read_text())
  path.write_text(json.dumps({**manifest, "format": 99}))
  with pytest.raises(pairs.DataError, match="format 99, this version reads 1"):
    sources.open_source(own_dir, "train")


def test_an_unknown_split_lists_the_splits(data_dir):
  with pytest.raises(
    pairs.DataError, match=r"no split 'val'; it has \['test', 'train'\]"
  ):
    sources.open_source(data_dir, "val")


def _file(data_dir, split):
  return next(data_dir.glob(f"*-{split}.array_record*"))


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_a_truncated_file_is_named_with_its_sizes(own_dir, keep):
  path = _file(own_dir, "train")
  data = path.read_bytes()
  path.write_bytes(data[: int(len(data) * keep)])
  with pytest.raises(pairs.DataError) as caught:
    sources.open_source(own_dir, "train")
  assert f"{path} has {int(len(data) * keep)} of {len(data)} bytes" in str(
    caught.value
  )


def test_a_truncated_split_does_not_close_the_others(own_dir):
  path = _file(own_dir, "train")
  path.write_bytes(path.read_bytes()[:100])
  assert len(sources.open_source(own_dir, "test")) == COUNTS["test"]


def test_a_missing_file_is_named(own_dir):
  path = _file(own_dir, "test")
  path.unlink()
  with pytest.raises(pairs.DataError, match=f"{path.name} is missing"):
    sources.open_source(own_dir, "test")


def test_bytes_that_rot_in_place_are_an_error_not_wrong_data(own_dir):
  path = _file(own_dir, "train")
  data = bytearray(path.read_bytes())
  expected = {}
  whole = sources.open_source(own_dir, "train")
  for index in range(len(whole)):
    expected[index] = whole[index]
  # Past the file's header, where the records lie; the size stays.
  data[2000:30000] = bytes(28000)
  path.write_bytes(bytes(data))
  failures = 0
  try:
    source = sources.open_source(own_dir, "train")
  except pairs.DataError as error:
    assert "record 0: not readable" in str(error)
    return
  for index in range(len(source)):
    try:
      assert source[index] == expected[index]
    except pairs.DataError as error:
      assert f"record {index}: not readable" in str(error)
      failures += 1
  assert failures


def unlist(data_dir, name):
  """As a directory made before there was the file `name`."""
  (data_dir / name).unlink()
  path = data_dir / pairs.MANIFEST
  manifest = json.loads(path.read_text())
  del manifest["files"][name]
  path.write_text(json.dumps(manifest))


def test_captions_are_counted_without_reading_records(data_dir, monkeypatch):
  source = sources.open_source(data_dir, "train")
  expected = [len(source[i].captions) for i in range(len(source))]
  assert len(set(expected)) == 2
  monkeypatch.setattr(sources.Source, "__getitem__", None)
  np.testing.assert_array_equal(source.count_captions(), expected)


def test_captions_of_an_older_directory_are_counted_by_reading(own_dir):
  expected = sources.open_source(own_dir, "train").count_captions()
  unlist(own_dir, "num_captions-train.npy")
  source = sources.open_source(own_dir, "train")
  np.testing.assert_array_equal(source.count_captions(), expected)


def test_damaged_caption_counts_are_named(own_dir):
  path = own_dir / "num_captions-train.npy"
  data = path.read_bytes()
  path.write_bytes(bytes(len(data)))
  with pytest.raises(pairs.DataError, match="num_captions-train.npy: not the"):
    sources.open_source(own_dir, "train").count_captions()
  path.write_bytes(data[:-1])
  with pytest.raises(pairs.DataError, match="num_captions-train.npy has"):
    sources.open_source(own_dir, "train")


def test_the_tokenizer_of_a_directory_is_found_or_asked_for(own_dir):
  with pytest.raises(pairs.DataError, match="no tokenizer.model or tokenizer"):
    sources.tokenizer_path(own_dir)
  (own_dir / "tokenizer.json").write_text("{}")
  assert sources.tokenizer_path(own_dir).name == "tokenizer.json"


def test_a_split_without_records_is_refused(tmp_path):
  with pytest.raises(pairs.DataError, match="split 'train' has no usable"):
    pairs.write(
      tmp_path / "empty",
      splits={"train": lambda: iter(())},
      source={},
      finish=lambda directory, manifest: None,
    )
  assert list(tmp_path.iterdir()) == []


def test_the_content_hash_ignores_the_order_and_sees_every_field(tmp_path):
  def content(*records):
    return pairs.write(
      tmp_path / "content",
      splits={"train": lambda: iter(records)},
      source={},
      finish=lambda directory, manifest: None,
    )["content_sha256"]

  first, second = _record("train", 0), _record("train", 1)
  assert content(first, second) == content(second, first)
  assert content(first, second) != content(first)


def test_the_hash_of_a_split_does_not_depend_on_bytes_or_input_order(tmp_path):
  def make(*records, other=False):
    splits = {"train": lambda: iter(records)}
    if other:  # first: so that images of train get other numbers
      splits = {"test": lambda: iter([_record("test", 5)])} | splits
    manifest = pairs.write(
      tmp_path / "split",
      splits=splits,
      source={},
      finish=lambda directory, manifest: None,
    )
    for entry in manifest["files"].values():
      entry["sha256"] = "of another serialisation"
    return pairs.hash_split(manifest, "train")

  first, second = _record("train", 0), _record("train", 1)
  whole = make(first, second)
  assert make(second, first) == whole
  assert make(first, second, other=True) == whole
  assert make(first) != whole
  for changed in (
    {"id": "renamed"},
    {"image": second.image},
    {"captions": ("another",)},
  ):
    assert make(dataclasses.replace(first, **changed), second) != whole


def test_a_directory_without_split_hashes_is_known_by_its_files(own_dir):
  manifest = pairs.read_manifest(own_dir)
  stored = pairs.hash_split(manifest, "train")
  del manifest["split_sha256"]
  assert pairs.hash_split(manifest, "train") != stored
