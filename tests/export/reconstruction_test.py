"""What is put in the place of what a system does not see."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from glscl_jax.data import sources, tokenizer
from glscl_jax.export import reconstruction
from glscl_jax.export import weights as weights_lib
from glscl_jax.systems import inputs
from glscl_jax.systems.completed import Completed
from tests import random_pairs, tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  root = tmp_path_factory.mktemp("words")
  data_dir = tiny.write_names(root / "data", "test")
  config = tiny.of_system(data_dir, random_pairs.maskvlm)
  return weights_lib.load_export(tiny.save(root / "export", config))


@pytest.fixture(scope="module")
def source(model):
  return sources.open_source(model.config.data.dir, "test")


def test_pixels_that_are_right_give_the_image_back():
  config = random_pairs.maskvlm()
  image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
  targets = np.asarray(inputs.pixel_targets(image[None], config))
  hidden = np.array([[3, 0, 9]])
  right = Completed(hidden, targets[:, hidden[0]], np.zeros(1))
  found = reconstruction._fill(image, right, 0, config)
  np.testing.assert_array_equal(found, image)
  wrong = dataclasses.replace(right, pixel_BJP=right.pixel_BJP[:, ::-1])
  changed = reconstruction._fill(image, wrong, 0, config) != image
  assert changed.any(axis=-1).sum() > 100
  # Patch 9 of rows of four is the third one's second.
  assert changed[16:24, 8:16].any() and not changed[24:].any()


def test_examples_are_the_same_for_the_same_seed(source):
  one, two, other = (
    [e.id for e in reconstruction.choose(source, count=5, seed=seed)]
    for seed in (0, 0, 1)
  )
  assert one == two != other
  assert len(set(one)) == 5


def test_another_caption_never_says_the_same():
  captions = ["a", "a", "b", "a", "c"]
  found = reconstruction.swap(captions)
  assert found == ["b", "b", "a", "c", "a"]
  with pytest.raises(ValueError, match="all captions are the same"):
    reconstruction.swap(["a", "a"])


def test_every_image_is_measured_once_whatever_the_batch(
  model, source, monkeypatch
):
  examples = reconstruction.choose(source, count=5, seed=0)
  options = {"num_shown": 2, "seed": 0}
  whole = reconstruction.complete(model, examples, **options)
  monkeypatch.setattr(reconstruction, "BATCH", 2)
  parts = reconstruction.complete(model, examples, **options)
  for name in ("error_A", "other_error_A"):
    found = getattr(parts, name)
    assert found.shape == (5,)
    np.testing.assert_allclose(found, getattr(whole, name), rtol=1e-5)
  assert np.all(whole.error_A != whole.other_error_A)
  for one, two in zip(whole.shown, parts.shown, strict=True):
    assert one.hidden_I.sum() == 12  # three blocks of four patches
    np.testing.assert_array_equal(one.hidden_I, two.hidden_I)


def test_of_two_tokens_of_one_name_only_the_right_one_is_marked(model):
  words = tokenizer.load(model.tokenizer_path)
  alike = {}
  for number in range(4, words.vocab_size):
    name = reconstruction._names(words, [number])[0]
    alike.setdefault(name, []).append(number)
  name, (first, second) = next(i for i in alike.items() if len(i[1]) == 2)
  found = reconstruction._Likeliest(
    np.array([[[first, second]]]), np.array([[[0.6, 0.3]]])
  ).at(words, 0, 0, label=second)
  assert [one.name for one in found] == [name, name]
  assert [one.right for one in found] == [False, True]


def test_masked_words_are_named_beside_the_likeliest_ones(model, source):
  examples = reconstruction.choose(source, count=3, seed=0)
  found = reconstruction.guess(model, examples, num_shown=3, seed=0)
  assert len(found.shown) == 3
  for one in found.shown:
    assert one.pieces.count("<mask>") == len(one.guesses) >= 1
    for guess in one.guesses:
      assert guess.word and guess.word != "<mask>"
      shares = [one.probability for one in guess.by_image]
      assert shares == sorted(shares, reverse=True) and sum(shares) < 1
      assert guess.by_image != guess.by_blank
  assert found.num_words == sum(len(one.guesses) for one in found.shown)
  right = [
    guess.by_image[0].right for one in found.shown for guess in one.guesses
  ]
  assert found.by_image == pytest.approx(np.mean(right))
