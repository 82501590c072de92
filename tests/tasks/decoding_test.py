"""The search for captions against a slow one, on small made-up languages."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from glscl_jax.tasks import decoding
from glscl_jax.tasks.decoding import Options

IMAGES, WORDS, HISTORIES = 4, 12, 97
END, NEVER = 2, (0, 1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Past:
  """A number for all that was said, so that a wrong parent shows."""

  said_A: jax.Array

  def take(self, rows_A):
    return Past(self.said_A[rows_A])


def language(seed=0, *, end=0.0, scale=2.0):
  """Logits by what was said; `end`: how much more likely the end is."""
  rng = np.random.default_rng(seed)
  logits = scale * rng.standard_normal((HISTORIES, WORDS)).astype(np.float32)
  logits[:, END] += end
  return logits


def say(said, word):
  return (31 * said + 7 * word + 1) % HISTORIES


def search(logits, options):
  table = jnp.asarray(logits)

  def extend(token_A, past):
    said_A = say(past.said_A, token_A)
    return table[said_A], Past(said_A)

  @jax.jit
  def run():
    said_B = jnp.arange(IMAGES)
    return decoding.search(
      table[said_B],
      Past(said_B),
      extend,
      end_id=END,
      never_ids=NEVER,
      options=options,
    )

  found = jax.tree.map(np.asarray, run())
  return [
    (ids[:length].tolist(), float(score))
    for ids, length, score in zip(
      found.ids_BL, found.length_B, found.score_B, strict=True
    )
  ]


def slow_search(next_logits, options, never=NEVER):
  """One image, with lists; the rules in the order they are written.

  `next_logits(words)`: what follows these words, after the start.
  """
  alpha, beam = options.length_power, options.beam
  live, ended = [(0.0, [])], []
  for count in range(1, options.max_tokens + 1):
    found = []
    for total, words in live:
      row = scipy.special.log_softmax(next_logits(words).astype(float))
      for word in range(len(row)):
        early = word == END and count < options.min_tokens
        if word not in never and not early:
          found.append((total + row[word], [*words, word]))
    found = sorted(found, key=lambda item: -item[0])[: 2 * beam]
    for total, words in found[:beam]:
      if words[-1] == END:
        ended.append((total / count**alpha, words))
    ended = sorted(ended, key=lambda item: -item[0])[:beam]
    live = [item for item in found if item[1][-1] != END][:beam]
    bound = live[0][0] / options.max_tokens**alpha
    if len(ended) == beam and bound <= ended[-1][0]:
      break
  else:
    ended += [(total / count**alpha, words) for total, words in live]
  score, words = max(ended, key=lambda item: item[0])
  return words, score


def spoken(logits, said):
  """`next_logits` of a made-up language."""
  return lambda words: logits[functools.reduce(say, words, said)]


CASES = {
  "five of seven tokens": (Options(max_tokens=7, min_tokens=3), 0.0),
  "ends are likely": (Options(max_tokens=9, min_tokens=2), 2.0),
  "over before the limit": (Options(beam=2, max_tokens=30, min_tokens=1), 4.0),
  "no end is found": (Options(max_tokens=6, min_tokens=6), -30.0),
  "one live caption": (Options(beam=1, max_tokens=8, min_tokens=2), 1.0),
  "sums alone": (Options(max_tokens=8, min_tokens=1, length_power=0.0), 1.0),
  "strong penalty": (
    Options(max_tokens=8, min_tokens=2, length_power=2.0),
    1.0,
  ),
  "one token": (Options(beam=3, max_tokens=1, min_tokens=1), 0.0),
}


@pytest.mark.parametrize("name", CASES)
def test_the_search_is_that_of_the_slow_one(name):
  options, end = CASES[name]
  logits = language(end=end)
  for said, (words, score) in enumerate(search(logits, options)):
    expected, best = slow_search(spoken(logits, said), options)
    assert words == expected
    assert score == pytest.approx(best, rel=1e-5)


def test_a_beam_of_one_without_a_penalty_takes_the_likeliest_token():
  logits = language(seed=3)
  options = Options(max_tokens=9, min_tokens=3)
  for said, (words, score) in enumerate(
    search(logits, decoding.greedy(options))
  ):
    expected, total = [], 0.0
    while len(expected) < 9 and expected[-1:] != [END]:
      row = scipy.special.log_softmax(logits[said].astype(float))
      early = [END] if len(expected) < 2 else []
      allowed = np.delete(np.arange(WORDS), [*NEVER, *early])
      word = int(allowed[np.argmax(row[allowed])])
      expected, total = [*expected, word], total + row[word]
      said = say(said, word)
    assert words == expected
    assert score == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("end", [-2.0, 3.0])
@pytest.mark.parametrize("shortest", [1, 4, 8])
def test_lengths_are_kept_and_nothing_follows_an_end(shortest, end):
  options = Options(beam=3, max_tokens=8, min_tokens=shortest)
  for words, _ in search(language(seed=1, end=end), options):
    assert shortest <= len(words) <= 8
    assert END not in words[:-1]
    assert words[-1] == END or len(words) == 8
    assert not set(words) & set(NEVER)


def test_a_longer_caption_may_beat_one_that_ended():
  """The mean decides; by their sums the short one is better."""
  logits = np.full((HISTORIES, WORDS), -20.0, np.float32)
  said = 0
  for word in (4, 5, 6):
    logits[said, word], logits[said, END] = 0.0, 0.1
    said = say(said, word)
  logits[said, END] = 0.0
  for power, expected in ((0.0, [END]), (1.0, [4, 5, 6, END])):
    options = Options(beam=2, max_tokens=6, min_tokens=1, length_power=power)
    assert search(logits, options)[0][0] == expected
    assert slow_search(spoken(logits, 0), options)[0] == expected


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"beam": 0}, "beam must be positive, is 0"),
    ({"max_tokens": 4}, "min_tokens 5 is more than max_tokens 4"),
    ({"length_power": -1.0}, "length_power must not be negative, is -1"),
    ({"length_power": float("nan")}, "length_power must not be negative"),
  ],
)
def test_options_that_fit_no_search_are_named(options, message):
  with pytest.raises(decoding.DecodingError, match=message):
    Options(**options)
