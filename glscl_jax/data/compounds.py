"""Words that other words spell: paintbrush is paint and brush."""

from __future__ import annotations

from collections.abc import Container

MIN_LETTERS = 3  # of a part: below, "as", "in" and "at" are found in any word
MAX_LETTERS = 50  # of a word: what is longer is an address or has no spaces


def parts(word: str, known: Container[str]) -> tuple[str, ...]:
  """The fewest known words that spell `word` without a rest.

  Among equally few, the last one is as long as can be.

  Returns:
    Nothing where no known words do: a part of a word says little of its
    meaning ("man" in "mantelpiece"). Nor for a text that is no word.
  """
  if len(word) > MAX_LETTERS:
    return ()
  spelled: list[tuple[str, ...] | None] = [()]  # [n]: of the first n letters
  for end in range(1, len(word) + 1):
    options = [
      (*before, word[start:end])
      for start, before in enumerate(spelled[: max(0, end + 1 - MIN_LETTERS)])
      if before is not None and word[start:end] in known
    ]
    spelled.append(min(options, key=len, default=None))
  return spelled[-1] or ()
