"""Composed scenes: exact boxes, true captions, the same every time."""

from __future__ import annotations

import collections
import dataclasses
import io

import numpy as np
import pytest
from PIL import Image

from glscl_jax.data import anchors, pairs, prepare, scenes, sources
from tests.data import tiny_emoji

SMALL = prepare.Vocabulary(size=60, model_type="word")
OPTIONS = scenes.Options(num_train=6, num_held_out=3, size=48, seed=0)


def mean_colour(image_BYXC):
  """As an encoder that sees colours alone."""
  return image_BYXC.reshape(len(image_BYXC), -1, 3).mean(axis=1) / 255


ENCODER = scenes.Encoder(
  encode=mean_colour, size=16, width=3, sha256="0" * 64, about={"step": 5}
)


def draw(colour, height, width):
  image_YXC = np.zeros((height, width, 3), np.uint8)
  image_YXC[:] = colour
  return image_YXC


COLOURS = {
  "red apple": (200, 0, 0),
  "dog": (0, 120, 0),
  "box": (0, 0, 200),
  "man running": (90, 90, 0),
  "scissors": (0, 90, 90),
  "knife": (90, 0, 90),
  "baby": (30, 60, 90),
}
DRAWINGS = {
  name: [
    scenes.Drawing(name, draw(colour, 20, 10)),
    scenes.Drawing(name, draw(colour, 12, 24)),
  ]
  for name, colour in COLOURS.items()
}


def make_scene(seed, size=64):
  return scenes.make_scene(np.random.default_rng(seed), DRAWINGS, size=size)


@pytest.fixture(scope="module")
def emoji_dir(tmp_path_factory):
  tiny = tiny_emoji.write(tmp_path_factory.mktemp("npm"))
  output = tmp_path_factory.mktemp("data") / "emoji"
  prepare.prepare_emoji(
    output,
    cache=tiny.cache,
    size=24,
    num_processes=1,
    vocabulary=SMALL,
    studios=tiny.studios,
    texts=(tiny.names, tiny.keywords),
  )
  return output


def make(emoji_dir, output, **changes):
  arguments = {"encoder": ENCODER, "options": OPTIONS, "vocabulary": SMALL}
  return prepare.prepare_scenes(
    output, drawings=emoji_dir, **{**arguments, **changes}
  )


@pytest.fixture(scope="module")
def scenes_dir(emoji_dir, tmp_path_factory):
  output = tmp_path_factory.mktemp("data") / "scenes"
  make(emoji_dir, output)
  return output


@pytest.mark.parametrize("seed", range(30))
def test_every_box_holds_its_drawing_and_nothing_else(seed):
  scene = make_scene(seed)
  assert 2 <= len(scene.names) == len(scene.boxes) <= 5
  left_white = scene.image_YXC.copy()
  for name, (left, top, right, bottom) in zip(
    scene.names, scene.boxes, strict=True
  ):
    assert 0 <= left < right <= 64 and 0 <= top < bottom <= 64
    inside = scene.image_YXC[top:bottom, left:right].reshape(-1, 3)
    assert (inside == COLOURS[name]).all(), name
    left_white[top:bottom, left:right] = 255
  assert (left_white == 255).all()


def test_scenes_have_two_to_five_drawings_of_many_sizes_and_places():
  counts, sides, corners = collections.Counter(), [], set()
  twice = 0
  for seed in range(200):
    scene = make_scene(seed)
    counts[len(scene.names)] += 1
    twice += len(set(scene.names)) < len(scene.names)
    sides += [max(x2 - x1, y2 - y1) for x1, y1, x2, y2 in scene.boxes]
    corners.update(box[:2] for box in scene.boxes)
  assert sorted(counts) == [2, 3, 4, 5] and min(counts.values()) > 25
  assert min(sides) < 16 and max(sides) > 28
  assert len(corners) > 300
  assert 20 < twice < 100


@pytest.mark.parametrize("seed", range(40))
def test_captions_name_what_is_there_with_its_number(seed):
  scene = make_scene(seed)
  counts = collections.Counter(scene.names)
  assert len(scene.captions) == 2
  for caption in scene.captions:
    named = 0
    for name, count in counts.items():
      several = scenes.plural(name)
      if count > 1:
        assert name not in caption.replace(several, "")
        named += several in caption
      else:
        assert several not in caption
        named += name in caption
    assert named == min(2, len(counts)) or named == min(3, len(counts))
  others = COLOURS.keys() - counts.keys()
  assert not [name for name in others if name in " ".join(scene.captions)]


def test_captions_come_in_several_forms():
  found = {c for seed in range(200) for c in make_scene(seed).captions}
  for form in (
    "a red apple and a dog",
    "dog next to a red apple",
    "red apple, dog",
    "a picture of a red apple with a dog",
    "a red apple, a dog and a box",
    "two red apples and a dog",
    "scissors and a dog",
  ):
    words = {"red apple", "dog", "box"}
    shapes = {_shape(caption) for caption in found}
    assert _shape(form) in shapes, (form, words)


def _shape(caption):
  for name in sorted(COLOURS, key=len, reverse=True):
    for count, text in (("some", scenes.plural(name)), ("thing", name)):
      if name == "scissors":
        count, text = "pair", name
      caption = caption.replace(text, count)
  return caption


@pytest.mark.parametrize(
  ("name", "expected"),
  [
    ("dog", "dogs"),
    ("red apple", "red apples"),
    ("box", "boxes"),
    ("wine glass", "wine glasses"),
    ("baby", "babies"),
    ("monkey", "monkeys"),
    ("kitchen knife", "kitchen knives"),
    ("wolf", "wolves"),
    ("giraffe", "giraffes"),
    ("man", "men"),
    ("old woman", "old women"),
    ("person", "people"),
    ("tooth", "teeth"),
    ("bus", "buses"),
  ],
)
def test_a_plural_is_one_that_anchors_take_back(name, expected):
  assert scenes.plural(name) == expected
  assert name in anchors.singulars(expected)


@pytest.mark.parametrize(
  ("name", "countable"),
  [
    ("dog", True),
    ("glass", True),
    ("bus", True),
    ("man running", False),
    ("scissors", False),
    ("holding hands", False),
    ("people", False),
  ],
)
def test_only_what_can_be_counted_is_drawn_twice(name, countable):
  assert scenes.has_plural(name) == countable


def test_a_scene_depends_on_its_generator_alone():
  one, two, other = (make_scene(seed) for seed in (3, 3, 4))
  assert np.array_equal(one.image_YXC, two.image_YXC)
  assert (one.names, one.boxes, one.captions) == (
    two.names,
    two.boxes,
    two.captions,
  )
  assert not np.array_equal(one.image_YXC, other.image_YXC)


def test_splits_mix_their_own_drawings_and_small_ones_are_left_out(
  emoji_dir, scenes_dir
):
  # Pizza is alone in two splits.
  assert sources.splits(scenes_dir) == {
    "train": 6,
    "test_unseen_studio_seen_concept": 3,
  }
  schema = sources.read_schema(scenes_dir)
  assert schema.classes == (
    "green heart",
    "grinning face",
    "penguin",
    "red heart",
  )
  assert (schema.width, schema.images) == (3, True)
  for split in sources.splits(scenes_dir):
    own = sources.open_source(emoji_dir, split)
    names = {own[i].captions[0] for i in range(len(own))}
    source = sources.open_source(scenes_dir, split)
    for i in range(len(source)):
      classes = source[i].regions.class_R
      assert {schema.classes[number - 1] for number in classes} <= names


def test_a_region_is_what_the_encoder_says_of_the_cut_out(scenes_dir):
  source = sources.open_source(scenes_dir, "train")
  for i in range(len(source)):
    example = source[i]
    image = np.asarray(Image.open(io.BytesIO(example.image)))
    assert image.shape == (48, 48, 3)
    found = example.regions
    assert (found.confidence_R == 1).all()
    for box, feature in zip(found.box_R4, found.feature_RP, strict=True):
      left, top, right, bottom = (box * 48).round().astype(int)
      np.testing.assert_allclose(
        box * 48, (left, top, right, bottom), atol=1e-4
      )
      cut = image[top:bottom, left:right]
      square = np.full((max(cut.shape),) * 2 + (3,), 255.0)
      above = (len(square) - len(cut)) // 2
      aside = (len(square) - cut.shape[1]) // 2
      square[above : above + len(cut), aside : aside + cut.shape[1]] = cut
      np.testing.assert_allclose(
        feature, square.mean(axis=(0, 1)) / 255, atol=0.03
      )


def test_a_second_preparation_holds_the_same_records(
  emoji_dir, scenes_dir, tmp_path
):
  first = pairs.read_manifest(scenes_dir)
  again = make(emoji_dir, tmp_path / "again")
  assert again["content_sha256"] == first["content_sha256"]
  assert again["tokenizer"] == first["tokenizer"]
  other = make(
    emoji_dir, tmp_path / "other", options=dataclasses.replace(OPTIONS, seed=1)
  )
  assert other["content_sha256"] != first["content_sha256"]


def test_another_encoder_makes_the_directory_again(emoji_dir, tmp_path):
  output = tmp_path / "scenes"
  first = make(emoji_dir, output)
  assert first["encoder"] == {"sha256": "0" * 64, "step": 5}
  encoded = []

  def encode(image_BYXC):
    encoded.append(len(image_BYXC))
    return mean_colour(image_BYXC)

  watched = dataclasses.replace(ENCODER, encode=encode)
  make(emoji_dir, output, encoder=watched)
  assert not encoded  # it is whole
  make(emoji_dir, output, encoder=dataclasses.replace(watched, sha256="1"))
  assert encoded


def test_a_killed_preparation_leaves_the_old_directory(emoji_dir, tmp_path):
  output = tmp_path / "scenes"
  first = make(emoji_dir, output)

  def stop(image_BYXC):
    raise KeyboardInterrupt

  encoder = dataclasses.replace(ENCODER, encode=stop, sha256="1")
  with pytest.raises(KeyboardInterrupt):
    make(emoji_dir, output, encoder=encoder)
  assert pairs.find_damage(output, source=first["source"]) == ""
  assert [path.name for path in tmp_path.iterdir()] == ["scenes"]


def test_too_few_drawings_are_refused(emoji_dir, tmp_path, monkeypatch):
  monkeypatch.setattr(scenes, "NUM_DRAWINGS", (9, 9))
  with pytest.raises(pairs.DataError, match="emoji: none of its splits has 9"):
    make(emoji_dir, tmp_path / "none")


def test_scenes_of_scenes_are_refused(scenes_dir, tmp_path):
  with pytest.raises(pairs.DataError, match="made from scenes; scenes are"):
    make(scenes_dir, tmp_path / "twice")
