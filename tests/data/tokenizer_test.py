"""Tokenizers of both kinds: ids, cutting, words, and what padding is."""

from __future__ import annotations

import hashlib
import json
import pickle

import numpy as np
import pytest
import tokenizers

from glscl_jax.config import Config, ConfigError, ModelConfig, TextConfig
from glscl_jax.data import tokenizer

TEXTS = [
  "a small black cat sits on the red mat",
  "the big dog runs after a ball, quickly",
  "two cats and three dogs look at the moon",
  "Caf\u00e9 in PARIS: tables, chairs, people",
]


@pytest.fixture(scope="module")
def sentencepiece_file(tmp_path_factory):
  path = tmp_path_factory.mktemp("sentencepiece") / "tokenizer.model"
  tokenizer.train_sentencepiece(TEXTS, path, 80)
  return path


@pytest.fixture(scope="module")
def roberta_file(tmp_path_factory):
  """A byte-level BPE in RoBERTa's layout, as published files are."""
  model = tokenizers.Tokenizer(tokenizers.models.BPE())
  model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False
  )
  model.decoder = tokenizers.decoders.ByteLevel()
  mask = tokenizers.AddedToken("<mask>", lstrip=True, special=True)
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=320,
    special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  model.train_from_iterator(TEXTS, trainer)
  model.add_special_tokens([mask])
  model.post_processor = tokenizers.processors.RobertaProcessing(
    ("</s>", 2), ("<s>", 0)
  )
  # Settings of the file must not change what `encode` promises.
  model.enable_truncation(4)
  model.enable_padding(pad_id=1, pad_token="<pad>", length=9)
  path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
  model.save(str(path))
  return path


@pytest.fixture(params=["sentencepiece", "roberta"])
def file(request):
  return request.getfixturevalue(f"{request.param}_file")


@pytest.fixture
def loaded(file):
  return tokenizer.load(file)


def test_the_ids_are_laid_out_as_in_roberta(loaded):
  ids = (loaded.start_id, loaded.pad_id, loaded.end_id, loaded.mask_id)
  assert ids == (0, 1, 2, loaded.vocab_size - 1)
  assert loaded.special_ids == frozenset(ids)
  assert loaded.pieces(ids) == ["<s>", "<pad>", "</s>", "<mask>"]


def test_text_stands_between_the_specials_and_padding_follows(loaded):
  tokens = loaded.encode(TEXTS[0], 60)
  used = int(tokens.valid_T.sum())
  assert tokens.ids_T.dtype == np.int32 and tokens.word_T.dtype == np.int32
  assert tokens.valid_T.dtype == np.bool_
  assert tokens.ids_T.shape == tokens.valid_T.shape == tokens.word_T.shape
  assert tokens.ids_T.shape == (60,)
  assert tokens.valid_T.tolist() == [True] * used + [False] * (60 - used)
  assert tokens.ids_T[0] == loaded.start_id
  assert tokens.ids_T[used - 1] == loaded.end_id
  assert set(tokens.ids_T[used:].tolist()) == {loaded.pad_id}
  assert not loaded.special_ids & set(tokens.ids_T[1 : used - 1].tolist())
  assert not tokens.truncated


def test_the_pieces_spell_the_text(loaded):
  tokens = loaded.encode(TEXTS[0], 60)
  text = "".join(loaded.pieces(tokens.ids_T[tokens.valid_T][1:-1]))
  assert text.replace("\u2581", " ").replace("\u0120", " ").strip() == TEXTS[0]


def test_ids_give_the_text_back(loaded):
  tokens = loaded.encode(TEXTS[0], 60)
  assert loaded.text(tokens.ids_T[tokens.valid_T]) == TEXTS[0]
  assert loaded.text([]) == ""


def test_a_long_text_is_cut_so_that_the_end_stays_last(loaded):
  whole = loaded.encode(TEXTS[0], 60)
  used = int(whole.valid_T.sum())
  cut = loaded.encode(TEXTS[0], used - 1)
  assert cut.truncated
  assert cut.valid_T.all()
  assert cut.ids_T[-1] == loaded.end_id and cut.word_T[-1] == -1
  assert cut.ids_T[:-1].tolist() == whole.ids_T[: used - 2].tolist()


def test_a_text_that_just_fits_is_not_truncated(loaded):
  used = int(loaded.encode(TEXTS[1], 60).valid_T.sum())
  exact = loaded.encode(TEXTS[1], used)
  assert not exact.truncated
  assert exact.valid_T.all()


def test_an_empty_text_is_the_two_specials(loaded):
  for text in ("", "   "):
    tokens = loaded.encode(text, 6)
    if text == "":
      assert tokens.ids_T.tolist() == [0, 2, 1, 1, 1, 1]
      assert tokens.word_T.tolist() == [-1] * 6
    assert not tokens.truncated
    assert tokens.ids_T[int(tokens.valid_T.sum()) - 1] == loaded.end_id


def test_the_shortest_length_holds_the_specials_alone(loaded):
  tokens = loaded.encode("a cat", 2)
  assert tokens.ids_T.tolist() == [0, 2]
  assert tokens.truncated
  with pytest.raises(ValueError, match="no room for the specials"):
    loaded.encode("a cat", 1)


def test_word_numbers_count_up_over_the_text_alone(loaded):
  tokens = loaded.encode("small zebra quickly", 40)
  words = tokens.word_T[tokens.word_T >= 0]
  assert sorted(set(words.tolist())) == [0, 1, 2]
  assert (np.diff(words) >= 0).all()
  used = int(tokens.valid_T.sum())
  assert len(words) == used - 2
  # "zebra" was never seen: one word of several pieces.
  assert (words == 1).sum() > 1


def test_equal_words_are_numbered_apart(loaded):
  tokens = loaded.encode("cat cat cat", 40)
  assert set(tokens.word_T.tolist()) == {-1, 0, 1, 2}


@pytest.mark.parametrize("text", ["<mask>", "<pad> </s>", "a <s> cat<mask>"])
def test_a_caption_that_spells_a_special_is_only_text(loaded, text):
  tokens = loaded.encode(text, 40)
  used = int(tokens.valid_T.sum())
  assert not loaded.special_ids & set(tokens.ids_T[1 : used - 1].tolist())
  assert used > 3


def test_a_pickled_tokenizer_encodes_the_same(loaded):
  copy = pickle.loads(pickle.dumps(loaded))
  for text in TEXTS:
    before, after = loaded.encode(text, 30), copy.encode(text, 30)
    assert before.ids_T.tolist() == after.ids_T.tolist()
    assert before.word_T.tolist() == after.word_T.tolist()
  assert copy.sha256 == loaded.sha256
  assert copy.special_ids == loaded.special_ids


def test_the_hash_is_that_of_the_file(file, loaded):
  assert loaded.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


def test_padding_is_known_by_position_not_by_its_id(tmp_path):
  # An ordinary word that shares its id with padding, as "!" does in CLIP.
  vocab = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "cat": 4, "<mask>": 5}
  model = tokenizers.Tokenizer(
    tokenizers.models.WordLevel(vocab, unk_token="<unk>")
  )
  model.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  path = tmp_path / "tokenizer.json"
  model.save(str(path))
  tokens = tokenizer.load(path).encode("cat <pad> cat", 7)
  assert tokens.ids_T.tolist() == [0, 4, 1, 4, 2, 1, 1]
  assert tokens.valid_T.tolist() == [True] * 5 + [False] * 2
  assert tokens.word_T.tolist() == [-1, 0, 1, 2, -1, -1, -1]


def test_our_sentencepiece_lower_cases(sentencepiece_file):
  loaded = tokenizer.load(sentencepiece_file)
  upper = loaded.encode("THE Red CAT", 30).ids_T
  assert upper.tolist() == loaded.encode("the red cat", 30).ids_T.tolist()


def test_our_sentencepiece_maps_an_unseen_letter_to_unknown(sentencepiece_file):
  loaded = tokenizer.load(sentencepiece_file)
  ids = loaded.encode("\u4e2d", 10).ids_T
  assert 3 in ids
  assert loaded.pieces([3]) == ["<unk>"]


@pytest.mark.parametrize("model_type", tokenizer.MODEL_TYPES)
def test_training_twice_gives_the_same_file(tmp_path, model_type):
  one, two = tmp_path / "one.model", tmp_path / "two.model"
  for path in (one, two):
    tokenizer.train_sentencepiece(TEXTS, path, 80, model_type=model_type)
  assert one.read_bytes() == two.read_bytes()


WORD_TEXTS = [
  "Red heart: love, care",
  "man (red hat)",
  "caf\u00e9 = \u2460 \u2764",
]


@pytest.fixture(scope="module")
def word_model(tmp_path_factory):
  path = tmp_path_factory.mktemp("word") / "tokenizer.model"
  tokenizer.train_sentencepiece(WORD_TEXTS, path, 500, model_type="word")
  return tokenizer.load(path)


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("RED,care(man)", ["red", ",", "care", "(", "man", ")"]),
    (
      "red\theart\nman\u2028hat\u3000red",
      ["red", "heart", "man", "hat", "red"],
    ),
    ("\uff28eart 1", ["heart", "1"]),  # full width; a circled 1 is a 1
    ("CAF\u00c9 cafe\u0301", ["caf\u00e9", "caf\u00e9"]),
    (
      "\u2764\ufe0f he\u00ad\u200dart",
      ["\u2764", "heart"],
    ),  # nothing that shows
  ],
)
def test_a_word_model_sets_words_and_marks_apart(word_model, text, expected):
  tokens = word_model.encode(text, 12)
  in_words = tokens.word_T >= 0
  pieces = word_model.pieces(tokens.ids_T[in_words])
  assert pieces == [f"\u2581{word}" for word in expected]
  np.testing.assert_array_equal(
    tokens.word_T[in_words], np.arange(len(expected))
  )
  assert not tokens.unknown


def test_an_unknown_word_is_the_words_that_spell_it(word_model):
  tokens = word_model.encode("redheart loves MANHATCARE", 12)
  assert word_model.pieces(tokens.ids_T[1:7]) == [
    "\u2581red",
    "\u2581heart",
    "<unk>",  # "love" is a part of it, and "s" no word
    "\u2581man",
    "\u2581hat",
    "\u2581care",
  ]
  # Two words of one number are parts of one word of the text.
  np.testing.assert_array_equal(tokens.word_T[:8], [-1, 0, 0, 1, 2, 2, 2, -1])
  assert tokens.unknown
  assert tokens.spelled
  spelled = word_model.encode("redheart", 12)
  assert spelled.spelled and not spelled.unknown
  assert not word_model.encode("red heart zebra", 12).spelled


def test_words_that_nothing_spells_are_a_piece_each(word_model):
  tokens = word_model.encode("red mantelpiece zebra heart", 12)
  assert word_model.pieces(tokens.ids_T[1:5]) == [
    "\u2581red",
    "<unk>",
    "<unk>",
    "\u2581heart",
  ]
  np.testing.assert_array_equal(tokens.word_T[:6], [-1, 0, 1, 2, 3, -1])
  assert tokens.unknown


def test_a_pickled_word_model_takes_the_same_words_apart(word_model):
  copy = pickle.loads(pickle.dumps(word_model))
  for text in ("redheart", "zebra manhat", "care"):
    np.testing.assert_array_equal(
      copy.encode(text, 9).ids_T, word_model.encode(text, 9).ids_T
    )


def test_a_word_model_holds_each_word_once(word_model):
  words = set(
    "red heart : love , care man ( hat ) caf\u00e9 = 1 \u2764".split()
  )
  assert word_model.vocab_size == len(words) + 5  # four specials and the mask
  assert word_model.pieces(range(4)) == ["<s>", "<pad>", "</s>", "<unk>"]


def test_another_type_of_model_is_refused(tmp_path):
  with pytest.raises(tokenizer.TokenizerError, match="'bpe': expected one of"):
    tokenizer.train_sentencepiece(
      TEXTS, tmp_path / "t.model", 80, model_type="bpe"
    )


def test_a_small_corpus_gives_a_smaller_vocabulary(tmp_path):
  path = tmp_path / "tokenizer.model"
  tokenizer.train_sentencepiece(TEXTS, path, 5000)
  assert 40 < tokenizer.load(path).vocab_size < 300


def test_an_impossible_vocabulary_names_the_flag(tmp_path):
  with pytest.raises(tokenizer.TokenizerError, match="--vocab_size"):
    tokenizer.train_sentencepiece(TEXTS, tmp_path / "t.model", 10)
  with pytest.raises(tokenizer.TokenizerError, match="on 0 texts"):
    tokenizer.train_sentencepiece([], tmp_path / "t.model", 10)
  assert not (tmp_path / "t.model").exists()


def test_an_id_outside_the_vocabulary_is_an_error(loaded):
  with pytest.raises(IndexError):
    loaded.pieces([loaded.vocab_size + 5])


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    ("none.model", None, "cannot be read"),
    ("vocab.txt", b"a", r"expected \.model"),
    ("bad.model", b"not a model", "not a sentencepiece model"),
    ("empty.model", b"", "not a sentencepiece model"),
    ("bad.json", b"{}", "not a tokenizer.json"),
    ("torn.json", b"{", "not a tokenizer.json"),
    ("binary.json", b"\xff\xfe", "not a tokenizer.json"),
  ],
)
def test_a_file_that_is_no_tokenizer_is_named(tmp_path, name, content, message):
  path = tmp_path / name
  if content is not None:
    path.write_bytes(content)
  with pytest.raises(tokenizer.TokenizerError, match=message) as caught:
    tokenizer.load(path)
  assert name in str(caught.value)


def test_a_file_without_a_mask_token_is_refused(roberta_file, tmp_path):
  content = json.loads(roberta_file.read_text())
  content["added_tokens"] = [
    token for token in content["added_tokens"] if token["content"] != "<mask>"
  ]
  path = tmp_path / "tokenizer.json"
  path.write_text(json.dumps(content))
  with pytest.raises(tokenizer.TokenizerError, match="no <mask> or"):
    tokenizer.load(path)


def _config(vocab_size):
  return Config(model=ModelConfig(text=TextConfig(vocab_size=vocab_size)))


def test_a_vocabulary_mismatch_names_both_numbers_and_the_key(loaded):
  tokenizer.check_vocab(_config(loaded.vocab_size), loaded)
  with pytest.raises(ConfigError) as caught:
    tokenizer.check_vocab(_config(77_777), loaded)
  for part in ("77777", str(loaded.vocab_size), "model.text.vocab_size"):
    assert part in str(caught.value)


def test_the_words_write_the_text_token_by_token(loaded):
  for text in TEXTS[:3]:
    tokens = loaded.encode(text, 60)
    sizes = [len(word) for word in tokens.words]
    used = int(tokens.valid_T.sum())
    assert sum(sizes) == used - 2
    numbers = np.repeat(np.arange(len(sizes)), sizes)
    assert numbers.tolist() == tokens.word_T[1 : used - 1].tolist()
    joined = "".join("".join(word) for word in tokens.words)
    assert joined == text.replace(" ", "")


def test_a_character_of_several_tokens_is_written_once(loaded):
  words = loaded.encode("caf\u00e9 \u6f22\u5b57", 60).words
  assert ["".join(word) for word in words] == ["caf\u00e9", "\u6f22\u5b57"]


def test_the_words_of_a_cut_text_are_whole(loaded):
  assert loaded.encode(TEXTS[0], 5).words == loaded.encode(TEXTS[0], 60).words


def test_a_word_model_writes_spelled_and_unknown_words(tmp_path):
  path = tmp_path / "tokenizer.model"
  tokenizer.train_sentencepiece(
    ["paint the brush", "paint, brush"], path, 60, model_type="word"
  )
  words = tokenizer.load(path).encode("the Paintbrush, quixotic xyz", 9).words
  assert words == (
    ("the",),
    ("paint", "brush"),
    (",",),
    ("quixotic",),
    ("xyz",),
  )
