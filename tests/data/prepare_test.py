"""Whole preparations: what is written, skipped, redone and refused."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pathlib
import subprocess
import sys

import pytest
from PIL import Image

from glscl_jax import errors
from glscl_jax.data import emoji, pairs, prepare, sources, tokenizer
from tests.data import tiny_emoji

ROOT = pathlib.Path(__file__).resolve().parents[2]
SMALL = prepare.Vocabulary(size=40)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
  return tiny_emoji.write(tmp_path_factory.mktemp("npm"))


def _prepare(tiny, output, **changes):
  arguments = {
    "cache": tiny.cache,
    "size": 16,
    "num_processes": 1,
    "vocabulary": SMALL,
    "studios": tiny.studios,
    "texts": (tiny.names, tiny.keywords),
  }
  return prepare.prepare_emoji(output, **{**arguments, **changes})


@pytest.fixture(scope="module")
def emoji_dir(tiny, tmp_path_factory):
  output = tmp_path_factory.mktemp("data") / "emoji"
  _prepare(tiny, output)
  return output


def _write_image(path, colour, kind="PNG"):
  Image.new("RGB", (8, 6), colour).save(path, kind)
  return path.name


@pytest.fixture
def jsonl(tmp_path):
  """Writes rows to a file beside two images; returns its path."""
  _write_image(tmp_path / "red.png", "red")
  _write_image(tmp_path / "blue.jpg", "blue", "JPEG")

  def write(rows, name="pairs.jsonl"):
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path = tmp_path / name
    path.write_text("\n".join(lines) + "\n")
    return path

  return write


GOOD = [
  {"image": "red.png", "caption": "a red field", "id": "a"},
  {"image": "blue.jpg", "caption": ["a blue field", "all blue"], "id": 7},
]


def test_the_emoji_data_has_the_splits_of_its_studios(emoji_dir):
  assert sources.splits(emoji_dir) == {
    "train": 5,
    "test_seen_studio_unseen_concept": 1,
    "test_unseen_studio_seen_concept": 3,
    "test_unseen_studio_unseen_concept": 1,
  }


def test_an_emoji_record_carries_drawing_names_and_studio(emoji_dir):
  source = sources.open_source(emoji_dir, "train")
  found = {example.id: example for example in map(source.__getitem__, range(5))}
  example = found["twemoji/grinning_face"]
  assert example.captions == ("grinning face", "grinning face: face, big smile")
  image = Image.open(io.BytesIO(example.image))
  assert image.size == (16, 16) and image.mode == "RGB"
  assert image.getpixel((8, 8)) == (255, 255, 0)


def test_a_drawing_that_is_not_square_is_centred_on_white(emoji_dir):
  source = sources.open_source(emoji_dir, "train")
  found = {example.id: example for example in map(source.__getitem__, range(5))}
  image = Image.open(io.BytesIO(found["twemoji/keycap_#"].image))
  assert image.getpixel((3, 8)) == (0, 0, 255)
  assert image.getpixel((3, 1)) == (255, 255, 255)
  assert image.getpixel((3, 14)) == (255, 255, 255)


def test_the_manifest_says_what_the_data_was_made_from(tiny, emoji_dir):
  manifest = pairs.read_manifest(emoji_dir)
  assert manifest["source"]["packages"]["names@1.0.0"] == tiny.names.sha256
  assert manifest["studios"]["noto"]["licence"] == "MIT"
  assert manifest["pairs_per_studio"] == {"twemoji": 6, "noto": 4}
  assert manifest["images_in_several_splits"] == 0
  loaded = tokenizer.load(sources.tokenizer_path(emoji_dir))
  assert manifest["tokenizer"]["sha256"] == loaded.sha256
  assert manifest["tokenizer"]["vocab_size"] == loaded.vocab_size


def test_the_tokenizer_has_seen_training_captions_only(emoji_dir):
  loaded = tokenizer.load(sources.tokenizer_path(emoji_dir))
  unknown = 3
  # "pizza" is a test concept and the only word with a z.
  assert unknown in loaded.encode("pizza", 16).ids_T
  assert unknown not in loaded.encode("penguin", 16).ids_T


def test_a_whole_directory_is_left_alone(tiny, emoji_dir):
  before = {path.name: path.stat().st_mtime_ns for path in emoji_dir.iterdir()}
  _prepare(tiny, emoji_dir, cache=tiny.cache / "not-needed", npm="not-needed")
  after = {path.name: path.stat().st_mtime_ns for path in emoji_dir.iterdir()}
  assert after == before


def test_a_second_preparation_holds_the_same_records(tiny, emoji_dir, tmp_path):
  manifest = _prepare(tiny, tmp_path / "again", num_processes=2)
  first = pairs.read_manifest(emoji_dir)
  assert manifest["content_sha256"] == first["content_sha256"]
  assert manifest["tokenizer"] == first["tokenizer"]
  for split in first["splits"]:
    assert pairs.hash_split(manifest, split) == pairs.hash_split(first, split)


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "manifest"])
def test_a_damaged_directory_is_made_again(tiny, tmp_path, damage):
  output = tmp_path / "emoji"
  first = _prepare(tiny, output)
  path = next(output.glob("*-train.array_record*"))
  data = path.read_bytes()
  if damage == "flip":
    path.write_bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:])
  elif damage == "cut":
    path.write_bytes(data[:-1])
  elif damage == "remove":
    path.unlink()
  else:
    (output / "manifest.json").write_text("{")
  again = _prepare(tiny, output)
  assert again["content_sha256"] == first["content_sha256"]
  assert pairs.find_damage(output, source=again["source"]) == ""


def test_another_size_makes_the_directory_again(tiny, tmp_path):
  output = tmp_path / "emoji"
  _prepare(tiny, output)
  assert _prepare(tiny, output, size=12)["source"]["size"] == 12
  example = sources.open_source(output, "train")[0]
  assert Image.open(io.BytesIO(example.image)).size == (12, 12)
  assert [path.name for path in tmp_path.iterdir()] == ["emoji"]


def test_another_type_of_tokenizer_makes_the_directory_again(tiny, tmp_path):
  output = tmp_path / "emoji"
  pieces = _prepare(tiny, output)["tokenizer"]
  words = prepare.Vocabulary(size=40, model_type="word")
  assert _prepare(tiny, output, vocabulary=words)["tokenizer"] != pieces
  loaded = tokenizer.load(sources.tokenizer_path(output))
  found = loaded.encode("grinning penguins", 8).ids_T[1:3]
  assert loaded.pieces(found) == ["\u2581grinning", "<unk>"]


def test_a_failed_preparation_leaves_the_old_directory(jsonl, tmp_path):
  output = tmp_path / "out" / "data"
  first = prepare.prepare_jsonl(output, path=jsonl(GOOD), vocabulary=SMALL)
  tiny_vocabulary = prepare.Vocabulary(size=8)
  with pytest.raises(tokenizer.TokenizerError, match="--vocab_size"):
    prepare.prepare_jsonl(output, path=jsonl(GOOD), vocabulary=tiny_vocabulary)
  assert pairs.find_damage(output, source=first["source"]) == ""
  assert [path.name for path in output.parent.iterdir()] == ["data"]


def test_what_a_killed_preparation_left_is_cleared(jsonl, tmp_path):
  done = subprocess.Popen([sys.executable, "-c", ""])
  done.wait()
  output = tmp_path / "out" / "data"
  stale = output.with_name(f"data.tmp-{done.pid}")
  stale.mkdir(parents=True)
  running = output.with_name(f"data.tmp-{os.getppid()}")
  running.mkdir()
  prepare.prepare_jsonl(output, path=jsonl(GOOD), vocabulary=SMALL)
  assert not stale.exists()
  assert running.exists()


def test_a_folder_of_something_else_is_never_replaced(jsonl, tmp_path):
  output = tmp_path / "home"
  output.mkdir()
  (output / "letter.txt").write_text("dear")
  with pytest.raises(pairs.DataError, match="home: exists and is no data dir"):
    prepare.prepare_jsonl(output, path=jsonl(GOOD), vocabulary=SMALL)
  assert (output / "letter.txt").read_text() == "dear"


def test_jsonl_keeps_the_bytes_of_the_images(jsonl, tmp_path):
  path = jsonl(GOOD)
  prepare.prepare_jsonl(tmp_path / "data", path=path, vocabulary=SMALL)
  source = sources.open_source(tmp_path / "data", "train")
  found = {source[index].id: source[index] for index in range(len(source))}
  assert found["a"].image == (tmp_path / "red.png").read_bytes()
  assert found["7"].image == (tmp_path / "blue.jpg").read_bytes()
  assert found["7"].captions == ("a blue field", "all blue")
  assert found["a"].image_id != found["7"].image_id


def test_equal_images_share_an_image_id_across_splits(jsonl, tmp_path):
  rows = [
    {"image": "red.png", "caption": "red"},
    {"image": "red.png", "caption": "still red"},
    {"image": "red.png", "caption": "and red", "split": "test"},
    {"image": "blue.jpg", "caption": "blue"},
  ]
  manifest = prepare.prepare_jsonl(
    tmp_path / "data", path=jsonl(rows), vocabulary=SMALL
  )
  train = sources.open_source(tmp_path / "data", "train")
  test = sources.open_source(tmp_path / "data", "test")
  ids = {train[index].id: train[index].image_id for index in range(3)}
  assert ids["line-1"] == ids["line-2"] == test[0].image_id
  assert ids["line-4"] != ids["line-1"]
  assert manifest["images"] == 2
  assert manifest["images_in_several_splits"] == 1


def test_images_are_sought_below_the_image_root(jsonl, tmp_path):
  path = tmp_path / "lists" / "pairs.jsonl"
  path.parent.mkdir()
  path.write_text(jsonl(GOOD).read_text())
  manifest = prepare.prepare_jsonl(
    tmp_path / "data", path=path, image_root=str(tmp_path), vocabulary=SMALL
  )
  assert manifest["splits"] == {"train": 2}


def test_rejected_lines_are_listed_with_number_and_reason(jsonl, tmp_path):
  (tmp_path / "torn.png").write_bytes((tmp_path / "red.png").read_bytes()[:40])
  rows = [
    *GOOD,
    {"image": "torn.png", "caption": "torn", "id": "t"},
    {"image": "none.png", "caption": "missing", "id": "m"},
    {"image": "red.png", "caption": "  "},
    {"caption": "no image"},
    "{not json",
  ]
  manifest = prepare.prepare_jsonl(
    tmp_path / "data",
    path=jsonl(rows),
    max_reject_share=0.8,
    vocabulary=SMALL,
  )
  found = {entry["line"]: entry["reason"] for entry in manifest["rejected"]}
  assert sorted(found) == [3, 4, 5, 6, 7]
  assert "torn.png" in found[3] and "none.png" in found[4]
  assert found[5] == "caption: empty"
  assert "no key 'image'" in found[6] and "not valid JSON" in found[7]
  assert manifest["lines"] == 7 and manifest["splits"] == {"train": 2}
  stored = json.loads((tmp_path / "data" / "manifest.json").read_text())
  assert stored["rejected"] == manifest["rejected"]
  text = prepare.describe(tmp_path / "data", manifest)
  assert "5 records rejected" in text and "torn.png" in text


@pytest.mark.parametrize(
  "bad",
  [
    "{not json",
    {"image": "none.png", "caption": "missing"},
  ],
)
def test_too_many_rejected_lines_write_nothing(jsonl, tmp_path, bad):
  with pytest.raises(pairs.DataError, match="1 of 3 lines rejected(.|\n)*: "):
    prepare.prepare_jsonl(
      tmp_path / "data", path=jsonl([*GOOD, bad]), vocabulary=SMALL
    )
  assert not (tmp_path / "data").exists()


def test_a_split_that_loses_all_its_records_says_why(jsonl, tmp_path):
  rows = [{"image": "none.png", "caption": "missing"}]
  with pytest.raises(pairs.DataError, match="line 1: image .*none.png"):
    prepare.prepare_jsonl(tmp_path / "data", path=jsonl(rows), vocabulary=SMALL)


def test_a_changed_image_makes_the_directory_again(jsonl, tmp_path):
  path, output = jsonl(GOOD), tmp_path / "data"
  first = prepare.prepare_jsonl(output, path=path, vocabulary=SMALL)
  _write_image(tmp_path / "red.png", "green")
  second = prepare.prepare_jsonl(output, path=path, vocabulary=SMALL)
  assert first["content_sha256"] != second["content_sha256"]


def test_tokens_are_counted_for_the_tokenizer_of_the_directory(
  emoji_dir, monkeypatch
):
  loaded = tokenizer.load(sources.tokenizer_path(emoji_dir))
  for split, size in sources.splits(emoji_dir).items():
    source = sources.open_source(emoji_dir, split)
    expected = [
      loaded.encode(caption, 100).valid_T.sum()
      for i in range(size)
      for caption in source[i].captions
    ]
    assert source.read_tokens(loaded).tolist() == expected
    with monkeypatch.context() as patch:
      patch.setattr(sources.Source, "read_tokens", None)
      assert source.count_tokens(loaded).tolist() == expected


def test_a_given_tokenizer_is_copied(jsonl, emoji_dir, tmp_path):
  path = sources.tokenizer_path(emoji_dir)
  manifest = prepare.prepare_jsonl(
    tmp_path / "data",
    path=jsonl(GOOD),
    vocabulary=prepare.Vocabulary(file=str(path)),
  )
  copied = sources.tokenizer_path(tmp_path / "data")
  assert copied.read_bytes() == path.read_bytes()
  assert manifest["tokenizer"]["trained_on"] == ""


def test_data_without_a_training_split_has_no_tokenizer(jsonl, tmp_path):
  manifest = prepare.prepare_jsonl(
    tmp_path / "data", path=jsonl(GOOD), split="test", vocabulary=SMALL
  )
  assert manifest["tokenizer"] is None
  with pytest.raises(pairs.DataError, match="set data.tokenizer"):
    sources.tokenizer_path(tmp_path / "data")


def test_a_tokenizer_cannot_be_trained_without_a_training_split(
  jsonl, tmp_path
):
  with pytest.raises(pairs.DataError, match="no split 'train'"):
    prepare.prepare_jsonl(
      tmp_path / "data",
      path=jsonl(GOOD),
      split="test",
      vocabulary=prepare.Vocabulary(train=True),
    )


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_an_output_that_cannot_be_written_is_named(jsonl, tmp_path, place):
  (tmp_path / "file").touch()
  with pytest.raises(errors.UserError) as caught:
    prepare.prepare_jsonl(tmp_path / place, path=jsonl(GOOD))
  assert str(caught.value) == (
    f"--output={tmp_path / place}: {tmp_path / 'file'} is not a folder that "
    "can be written"
  )


def test_a_folder_of_something_else_is_refused_before_any_work(tiny, tmp_path):
  (tmp_path / "notes.txt").touch()
  with pytest.raises(pairs.DataError, match="exists and is no data directory"):
    _prepare(tiny, tmp_path, cache=tmp_path / "npm", npm="/nowhere/npm")


def test_a_folder_of_packages_that_cannot_be_written_is_named(tiny, tmp_path):
  (tmp_path / "file").touch()
  with pytest.raises(errors.UserError, match="--input=.*file is not a folder"):
    _prepare(tiny, tmp_path / "data", cache=tmp_path / "file" / "npm")


def test_a_tokenizer_is_copied_or_trained_but_not_both(emoji_dir):
  path = sources.tokenizer_path(emoji_dir)
  with pytest.raises(pairs.DataError, match="exclude"):
    prepare.Vocabulary(file=str(path), train=True)


def test_a_missing_package_fails_before_anything_is_made(tiny, tmp_path):
  texts = (dataclasses.replace(tiny.names, version="2"), tiny.keywords)
  with pytest.raises(emoji.FetchError, match="no such program"):
    _prepare(tiny, tmp_path / "emoji", texts=texts, npm="/nowhere/npm")
  assert not (tmp_path / "emoji").exists()


def _run(*arguments):
  return subprocess.run(
    [sys.executable, "launch/prepare.py", *arguments],
    capture_output=True,
    text=True,
    timeout=120,
    cwd=ROOT,
    env={**os.environ, "PYTHONPATH": str(ROOT)},
    check=False,
  )


def test_the_command_makes_a_directory_and_prints_what_is_in_it(
  jsonl, tmp_path
):
  path = jsonl([*GOOD, {"image": "red.png", "caption": ""}])
  done = _run(
    "--source=jsonl",
    f"--input={path}",
    f"--output={tmp_path / 'data'}",
    "--max_reject_share=0.5",
    "--vocab_size=40",
  )
  assert done.returncode == 0, done.stderr
  assert "2 pairs in train" in done.stdout
  assert "1 records rejected" in done.stdout
  assert "line 3 : caption: empty" in done.stdout
  assert len(sources.open_source(tmp_path / "data", "train")) == 2


def test_the_command_ends_with_the_reason_alone(tmp_path):
  done = _run(
    "--source=jsonl",
    f"--input={tmp_path / 'none.jsonl'}",
    f"--output={tmp_path / 'data'}",
  )
  assert done.returncode == 2
  assert done.stderr.startswith("error: ")
  assert "none.jsonl: cannot be read" in done.stderr
  assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
  ("argument", "message"),
  [
    ("--outptu=x", "error: Unknown command line flag 'outptu'. Did you mean"),
    ("extra", "error: argument 'extra' is no flag"),
  ],
)
def test_the_command_names_a_wrong_argument(tmp_path, argument, message):
  done = _run(f"--output={tmp_path / 'data'}", argument)
  assert done.returncode == 2
  assert done.stderr.startswith(message)
  assert not (tmp_path / "data").exists()
