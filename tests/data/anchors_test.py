"""Which words and regions become anchors."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import tokenizers

from glscl_jax.data import anchors, tokenizer
from tests.data import tiny_regions

CLASSES = (
  "dog",
  "apple",
  "red apple,crimson apple",
  "person",
  "knife",
  "berry",
  "dress",
  "giraffe",
  "t-shirt,tee",
  "street light",
)
DOG, APPLE, RED_APPLE, PERSON, KNIFE, BERRY, DRESS = range(1, 8)
GIRAFFE, SHIRT, LIGHT = 8, 9, 10
WORDS = (
  "a and the with of dog dogs apple apples red crimson green person people "
  "knives berries dress dresses gi ##raffe ##raffes t tee shirt - , . ' s "
  "street light lights tooth"
).split()


@pytest.fixture(scope="module")
def words(tmp_path_factory):
  """A word-piece tokenizer in the layout of BERT's cased one."""
  specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
  capitals = [word.capitalize() for word in ("dog", "apple")]
  vocabulary = {w: i for i, w in enumerate([*specials, *WORDS, *capitals])}
  model = tokenizers.Tokenizer(
    tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]")
  )
  model.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
  path = tmp_path_factory.mktemp("bert") / "tokenizer.json"
  model.save(str(path))
  return tokenizer.load(path)


def find(
  words,
  caption,
  classes,
  *,
  confidence=None,
  length=24,
  number=36,
  seed=0,
  listed=CLASSES,
  **rules,
):
  defaults = {
    "match": "phrase",
    "region": "confident",
    "source": "found",
    "max_anchors": 8,
    "max_pairs": 32,
  }
  return anchors.find_anchors(
    np.random.default_rng(seed),
    words.encode(caption, length),
    tiny_regions.make(classes, confidence=confidence),
    anchors.make_names(listed, words),
    rules=anchors.Rules(**{**defaults, **rules}),
    num_regions=number,
    unknown_id=words.unknown_id,
  )


def pairs_of(found):
  ok = found.ok_A
  return list(
    zip(found.pos_A[ok].tolist(), found.region_A[ok].tolist(), strict=True)
  )


def named_of(found):
  ok = found.pair_ok_J
  return list(
    zip(
      found.pair_pos_J[ok].tolist(),
      found.pair_region_J[ok].tolist(),
      strict=True,
    )
  )


def assert_same(one, other, *, slots=None):
  for name in vars(one):
    first, second = getattr(one, name), getattr(other, name)
    assert np.array_equal(first[:slots], second[:slots]), name


# Slots: the start is 0, so word n of a text of whole pieces stands at n + 1.
@pytest.mark.parametrize(
  ("caption", "classes", "expected"),
  [
    ("a dog", [DOG], [(2, 0)]),
    ("a Dog", [DOG], [(2, 0)]),
    ("a dog", [APPLE], []),
    ("", [DOG], []),
    ("two", [DOG], []),  # unknown
    ("dog and apple", [APPLE, DOG], [(1, 1), (3, 0)]),
    ("dog , apple .", [APPLE, DOG], [(1, 1), (3, 0)]),
    ("dog's apple", [DOG, APPLE], [(1, 0), (4, 1)]),
    # Aliases.
    ("the tee", [SHIRT], [(2, 0)]),
    ("a t-shirt", [SHIRT], [(2, 0)]),
    ("a crimson apple", [RED_APPLE], [(2, 0)]),
    # The longest first; a word of it is not asked again.
    ("a red apple", [RED_APPLE, APPLE], [(2, 0)]),
    ("a red apple", [APPLE, RED_APPLE], [(2, 1)]),
    ("a red apple", [APPLE], [(3, 0)]),
    ("red apple and apple", [APPLE, RED_APPLE], [(1, 1), (4, 0)]),
    ("apple and red apple", [APPLE, RED_APPLE], [(1, 0), (3, 1)]),
    ("red , apple", [RED_APPLE], []),  # no phrase across a mark
    # Plurals.
    ("dogs", [DOG], [(1, 0)]),
    ("red apples", [RED_APPLE], [(1, 0)]),
    ("people", [PERSON], [(1, 0)]),
    ("knives", [KNIFE], [(1, 0)]),
    ("berries", [BERRY], [(1, 0)]),
    ("dresses", [DRESS], [(1, 0)]),
    ("dress", [DRESS], [(1, 0)]),
    ("street lights", [LIGHT], [(1, 0)]),
    ("tooth", [DOG], []),
    # Several pieces: the first one is the anchor.
    ("a giraffe", [GIRAFFE], [(2, 0)]),
    ("the giraffes and dog", [GIRAFFE, DOG], [(2, 0), (5, 1)]),
  ],
)
def test_words_take_the_regions_that_they_name(
  words, caption, classes, expected
):
  assert pairs_of(find(words, caption, classes)) == expected


def test_irregular_plurals_and_endings_have_a_singular():
  assert "man" in anchors.singulars("men")
  assert "tall woman" in anchors.singulars("tall women")
  for plural, singular in (
    ("children", "child"),
    ("feet", "foot"),
    ("teeth", "tooth"),
    ("mice", "mouse"),
    ("geese", "goose"),
    ("leaves", "leaf"),
    ("wives", "wife"),
    ("cities", "city"),
    ("boxes", "box"),
    ("cars", "car"),
  ):
    assert singular in anchors.singulars(plural), plural
  assert anchors.singulars("dog") == ()
  assert anchors.singulars("s") == ()


def test_the_most_confident_free_region_is_taken_and_none_twice(words):
  found = find(
    words,
    "a dog and the dog , dog",
    [DOG, APPLE, DOG],
    confidence=[0.3, 0.9, 0.8],
  )
  # Two dogs for three words.
  assert pairs_of(found) == [(2, 2), (5, 0)]


def test_a_random_region_is_any_of_the_free_ones_and_none_twice(words):
  seen = set()
  for seed in range(40):
    found = find(
      words, "a dog and the dog", [DOG, APPLE, DOG, DOG], seed=seed,
      region="random",
    )  # fmt: skip
    (_, first), (_, second) = pairs_of(found)
    assert first != second and {first, second} <= {0, 2, 3}
    seen.add((first, second))
  assert len(seen) == 6


def test_the_most_confident_anchors_stay_where_there_are_too_many(words):
  found = find(
    words,
    "dog apple person knives berries",
    [DOG, APPLE, PERSON, KNIFE, BERRY],
    confidence=[0.5, 0.9, 0.1, 0.7, 0.6],
    max_anchors=3,
  )
  assert pairs_of(found) == [(2, 1), (4, 3), (5, 4)]
  assert found.pos_A.shape == found.region_A.shape == found.ok_A.shape == (3,)
  # Words that are no anchors have no pairs either.
  assert named_of(found) == pairs_of(found)


def test_unused_slots_hold_zero(words):
  found = find(words, "a dog", [APPLE, DOG])
  assert found.ok_A.tolist() == [True] + [False] * 7
  for array in (found.pos_A[1:], found.region_A[1:], found.pair_pos_J[1:]):
    assert not array.any()
  assert found.pos_A.dtype == found.region_A.dtype == np.int32


def test_every_region_that_an_anchor_names_is_a_pair(words):
  found = find(words, "the dog , a red apple", [DOG, RED_APPLE, DOG, APPLE])
  assert named_of(found) == [(2, 0), (2, 2), (5, 1)]


def test_the_most_confident_pairs_stay_where_there_are_too_many(words):
  found = find(
    words,
    "dog and apple",
    [DOG] * 3 + [APPLE] * 2,
    confidence=[0.5, 0.9, 0.2, 0.8, 0.6],
    max_pairs=3,
  )
  assert named_of(found) == [(1, 1), (3, 3), (3, 4)]


def test_the_other_tokens_of_an_anchor_are_its_rest(words):
  found = find(words, "a red apple and giraffes", [RED_APPLE, GIRAFFE])
  assert np.flatnonzero(found.rest_T).tolist() == [3, 6]


def test_a_mark_within_a_word_is_neither_anchor_nor_rest(tmp_path):
  path = tmp_path / "tokenizer.model"
  tokenizer.train_sentencepiece(
    ["( dog ) , apple", "(dog), (apple)", "dog, apple"] * 9, path, 40
  )
  loaded = tokenizer.load(path)
  tokens = loaded.encode("(dog), apple", 24)
  found = find(loaded, "(dog), apple", [DOG, APPLE])
  assert len(pairs_of(found)) == 2
  first = found.pos_A[0]
  last = max([first, *np.flatnonzero(found.rest_T & (tokens.word_T == 0))])
  assert "(" not in "".join(loaded.pieces([tokens.ids_T[first]]))
  assert ")" not in "".join(loaded.pieces([tokens.ids_T[last]]))
  letters = "".join(loaded.pieces(tokens.ids_T[first : last + 1]))
  assert letters == "dog"


def test_a_word_that_the_limit_cuts_is_no_anchor(words):
  caption = "a dog and the giraffe"
  assert len(pairs_of(find(words, caption, [DOG, GIRAFFE], length=9))) == 2
  # start a dog and the gi [end]
  assert words.encode(caption, 7).truncated
  assert pairs_of(find(words, caption, [DOG, GIRAFFE], length=7)) == [(2, 0)]
  # The rest of a phrase is cut: the word that stays is not what was meant.
  assert pairs_of(find(words, "a red apple", [RED_APPLE], length=4)) == []


def test_a_word_without_a_piece_is_no_anchor(words):
  found = find(words, "a zebra and a dog", [1, 2], listed=("zebra", "dog"))
  assert pairs_of(found) == [(5, 1)]


def test_a_word_that_others_spell_is_one_anchor(tmp_path):
  path = tmp_path / "tokenizer.model"
  tokenizer.train_sentencepiece(
    ["a paint brush", "paint , brush dog"], path, 60, model_type="word"
  )
  loaded = tokenizer.load(path)
  found = find(
    loaded, "a Paintbrush, dog", [1, 2], listed=("paintbrush", "dog")
  )
  assert pairs_of(found) == [(2, 0), (5, 1)]
  assert np.flatnonzero(found.rest_T).tolist() == [3]


def test_a_region_of_no_class_or_beyond_the_batch_is_never_used(words):
  assert pairs_of(find(words, "a dog", [0, 0])) == []
  assert pairs_of(find(words, "a dog", [APPLE, DOG], number=1)) == []


def test_the_rule_of_pieces_takes_parts_of_names_that_are_whole_entries(words):
  by_piece = {"match": "piece"}
  # Any part of a name; also with s or es more or less.
  assert pairs_of(find(words, "a street", [LIGHT], **by_piece)) == [(2, 0)]
  assert pairs_of(find(words, "red", [RED_APPLE], **by_piece)) == [(1, 0)]
  assert pairs_of(find(words, "dogs", [DOG], **by_piece)) == [(1, 0)]
  assert pairs_of(find(words, "dresses", [DRESS], **by_piece)) == [(1, 0)]
  # Names without a piece of their own, and other plurals, never match.
  for caption, of in (("giraffe", GIRAFFE), ("people", PERSON)):
    assert pairs_of(find(words, caption, [of], **by_piece)) == []
    assert pairs_of(find(words, caption, [of])) == [(1, 0)]


@pytest.mark.parametrize("source", ["found", "random"])
def test_a_mark_in_a_name_is_no_anchor_by_pieces_either(words, source):
  rules = {"listed": ("tee - shirt",), "match": "piece", "source": source}
  assert pairs_of(find(words, "- -", [1, 1], **rules)) == []
  assert len(pairs_of(find(words, "- tee", [1, 1], **rules))) == 1


@pytest.mark.parametrize("match", ["phrase", "piece"])
def test_the_control_has_as_many_anchors_and_pairs_of_random_ones(words, match):
  caption = "a dog , and the apple with giraffe of people . zebra"
  nothing = {3, 12, 13}  # marks, and a word without a piece
  classes = [DOG, APPLE, DOG, PERSON, DOG, KNIFE, 0]
  true = find(words, caption, classes, match=match)
  seen = set()
  for seed in range(30):
    found = find(
      words, caption, classes, seed=seed, source="random", match=match
    )
    assert found.ok_A.sum() == true.ok_A.sum() > 1
    assert found.pair_ok_J.sum() == true.pair_ok_J.sum()
    regions = found.region_A[found.ok_A].tolist()
    slots = found.pos_A[found.ok_A].tolist()
    assert len(set(regions)) == len(regions) and 6 not in regions
    assert len(set(slots)) == len(slots) and min(slots) >= 1
    assert not nothing & set(slots)
    assert set(pairs_of(found)) <= set(named_of(found))
    assert len(set(named_of(found))) == len(named_of(found))
    seen.update(pairs_of(found))
  assert len(seen) > 12  # of 9 words and 6 regions


@pytest.mark.parametrize(
  "rules",
  [{}, {"region": "random"}, {"source": "random"}, {"match": "piece"}],
)
def test_longer_padding_changes_nothing(words, rules):
  caption = "a dog and the red apple with giraffe"
  classes = [DOG, RED_APPLE, DOG, GIRAFFE]
  short = find(words, caption, classes, seed=3, **rules)
  assert_same(
    short,
    find(words, caption, classes, seed=3, length=31, number=43, **rules),
    slots=24,
  )


def test_the_hash_seed_of_python_changes_nothing(tmp_path):
  script = (
    "import hashlib, numpy as np\n"
    "from glscl_jax.data import anchors, tokenizer\n"
    "from tests.data import tiny_regions\n"
    "t = tokenizer.load('{path}')\n"
    "names = anchors.make_names(('dog,hound', 'hound', 'red hound'), t)\n"
    "rules = anchors.Rules(match='phrase', region='random', source='found',"
    " max_anchors=4, max_pairs=4)\n"
    "found = anchors.find_anchors(np.random.default_rng(0),"
    " t.encode('a dog and red hounds, hounds', 20),"
    " tiny_regions.make([1, 2, 3, 2, 1, 1]), names, rules=rules,"
    " num_regions=9, unknown_id=3)\n"
    "print([a.tolist() for a in vars(found).values()])\n"
  )
  path = tmp_path / "tokenizer.model"
  tokenizer.train_sentencepiece(
    ["a dog and red hounds", "hounds"], path, 40, model_type="word"
  )
  printed = {
    subprocess.run(
      [sys.executable, "-c", script.format(path=path)],
      env={**os.environ, "PYTHONHASHSEED": seed},
      capture_output=True,
      check=True,
      timeout=60,
      text=True,
    ).stdout
    for seed in ("1", "2")
  }
  assert len(printed) == 1 and "True" in printed.pop()


def test_a_tokenizer_that_writes_every_text_has_anchors_too(tmp_path):
  model = tokenizers.Tokenizer(tokenizers.models.BPE())
  model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=True
  )
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=280,
    special_tokens=["<s>", "<pad>", "</s>", "<mask>"],
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  model.train_from_iterator(["a dog", "a red dog"], trainer)
  model.save(str(tmp_path / "tokenizer.json"))
  loaded = tokenizer.load(tmp_path / "tokenizer.json")
  assert loaded.unknown_id is None
  for rules in ({}, {"source": "random"}, {"match": "piece"}):
    found = find(loaded, "The zebra, a Dog", [1], listed=("zebra",), **rules)
    assert found.ok_A.sum() == ("match" not in rules)
  found = find(loaded, "The zebra, a Dog", [1, 2], listed=("zebra", "dog"))
  ids = loaded.encode("The zebra, a Dog", 24).ids_T
  # A token of a space alone is not what names the region.
  slots = [slot for slot, _ in pairs_of(found)]
  assert loaded.pieces(ids[slots]) == ["z", "D"]
