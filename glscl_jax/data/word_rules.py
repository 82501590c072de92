"""Rules that cut a text into words, in sentencepiece's format.

The library's word model splits at spaces alone, and its built-in rules keep
"(red" and "red," apart from "red". These lower-case, compose and fold like
`nmt_nfkc_cf`, and set each mark and symbol apart as a word of its own.
"""

from __future__ import annotations

import functools
import sys

# Unicode 3.2, in every Python: the rules, and with them the hash of a
# tokenizer, must not change with the interpreter. Later characters stay as
# they are.
from unicodedata import ucd_3_2_0 as unicode

_SPACES = ("Zs", "Zl", "Zp")
_BREAKS = "\t\n\v\f\r\u0085\u200b"  # spaces to a reader, of another category
_NOTHING = ("Cc", "Cf")  # controls, joiners, marks of direction
# Soft hyphens, and what chooses text or picture of the same symbol.
_UNSEEN = ("\u00ad", *map(chr, range(0xFE00, 0xFE10)))


@functools.cache
def normalization_rules() -> str:
  """A line: characters, tab, what they become, in hexadecimal code points."""
  rules = {}
  for code in range(1, sys.maxunicode + 1):
    char = chr(code)
    if unicode.category(char) in ("Cn", "Co", "Cs") or char == " ":
      continue
    plain = _plain(char)
    decomposed = unicode.normalize("NFD", char)
    for written in {char, decomposed}:
      if written != plain:
        rules[written] = plain
  return "".join(
    f"{_codes(written)}\t{_codes(plain)}\n"
    for written, plain in sorted(rules.items())
  )


def _plain(char: str) -> str:
  category = unicode.category(char)
  if category in _SPACES or char in _BREAKS:
    return " "
  if category in _NOTHING or char in _UNSEEN:
    return ""
  folded = unicode.normalize("NFKC", char).casefold()
  return f" {folded} " if category[0] in "PS" else folded


def _codes(text: str) -> str:
  return " ".join(f"{ord(char):X}" for char in text)
