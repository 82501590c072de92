"""Words that other words spell."""

import pytest

from glscl_jax.data import compounds


@pytest.mark.parametrize(
  ("word", "expected"),
  [
    ("paintbrush", ("paint", "brush")),
    ("paint", ("paint",)),
    ("brushes", ()),  # a rest of two letters
    ("mantelpiece", ()),  # "man" and "piece", and a rest between them
    ("", ()),
    ("zz", ()),
    ("cat" * 16, ("cat",) * 16),
    ("cat" * 100_000, ()),  # no word, and would take long
    ("catcat", ("cat", "cat")),
    # Fewest, though "sun", "flow" and "ers" spell it too.
    ("sunflowers", ("sun", "flowers")),
    # Equally few: the longer one ends the word.
    ("notable", ("not", "able")),
    ("atable", ()),  # "at" is too short to be a part
  ],
)
def test_parts(word, expected):
  known = {
    "paint",
    "brush",
    "man",
    "piece",
    "cat",
    "sun",
    "flow",
    "flowers",
    "ers",
    "not",
    "nota",
    "able",
    "table",
    "at",
    "ble",
  }
  assert compounds.parts(word, known) == expected
