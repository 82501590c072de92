"""Two small studios and their texts as npm tarballs, made on the spot."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import pathlib
import tarfile
from typing import Any

from glscl_jax.data import emoji

# By `emoji.concept_part` pizza is held out for test, the rest trains.
NAMES = {
  "\U0001f600": ("grinning face", "Smileys & Emotion"),
  "\u2764\ufe0f": ("red heart", "Smileys & Emotion"),
  "\U0001f49a": ("green heart", "Smileys & Emotion"),
  "#\ufe0f\u20e3": ("keycap #", "Symbols"),
  "\U0001f427": ("penguin", "Animals & Nature"),
  "\U0001f355": ("pizza", "Food & Drink"),
  "\U0001f3c1": ("chequered flag", "Flags"),
}
KEYWORDS = {
  "\U0001f600": ["grinning_face", "face", ":D", "big_smile", "face"],
  "\u2764\ufe0f": ["red_heart", "love"],
  "\U0001f427": ["penguin", "bird"],
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TinyEmoji:
  """Where the tarballs are and what is in them."""

  cache: pathlib.Path
  studios: dict[str, emoji.Package]
  names: emoji.Package
  keywords: emoji.Package


def _icon(colour: str, **box: int) -> dict[str, Any]:
  return {"body": f'<rect width="9" height="9" fill="{colour}"/>', **box}


def _write(
  cache: pathlib.Path, name: str, members: dict[str, Any]
) -> emoji.Package:
  package = emoji.Package(name=name, version="1.0.0", sha256="")
  path = cache / package.file_name
  with tarfile.open(path, "w:gz") as tar:
    for member, value in members.items():
      data = json.dumps(value).encode()
      entry = tarfile.TarInfo(f"package/{member}")
      entry.size = len(data)
      tar.addfile(entry, io.BytesIO(data))
  digest = hashlib.sha256(path.read_bytes()).hexdigest()
  return dataclasses.replace(package, sha256=digest)


def _info(author: str) -> dict[str, Any]:
  return {"author": {"name": author}, "license": {"spdx": "MIT"}}


def write(cache: pathlib.Path) -> TinyEmoji:
  """Writes the tarballs: one studio by code points, one by names."""
  cache.mkdir(parents=True, exist_ok=True)
  by_code = _write(
    cache,
    "@tiny/by-code",
    {
      "icons.json": {
        "icons": {
          "grin": _icon("yellow"),
          "heart": _icon("red"),
          "green-heart": _icon("green"),
          "hash": _icon("blue", width=18, height=9),
          "bird": _icon("black"),
          "slice": _icon("orange"),
          "race": _icon("white"),
        },
        "aliases": {"laugh": {"parent": "grin"}},
        "width": 9,
        "height": 9,
      },
      "info.json": _info("A"),
      "chars.json": {
        "1f600": "grin",
        "2764": "heart",
        "1f49a": "green-heart",
        "0023-fe0f-20e3": "hash",
        "1f427": "bird",
        "1f355": "slice",
        "1f3c1": "race",
      },
    },
  )
  by_name = _write(
    cache,
    "by-name",
    {
      "icons.json": {
        "icons": {
          "grinningface": _icon("gold"),
          "love": _icon("pink"),
          "penguin": _icon("grey"),
          "pizza": _icon("brown"),
          "chequered-flag": _icon("white"),
        },
        "aliases": {
          "red-heart": {"parent": "love"},
          "green-heart": {"parent": "love"},
          "keycap-#": {"parent": "penguin"},
        },
        "width": 9,
        "height": 9,
      },
      "info.json": _info("B"),
      "chars.json": {},
    },
  )
  slugs = {
    char: {"name": name, "slug": name.replace(" ", "_"), "group": group}
    for char, (name, group) in NAMES.items()
  }
  return TinyEmoji(
    cache=cache,
    studios={"twemoji": by_code, "noto": by_name},
    names=_write(cache, "names", {"data-by-emoji.json": slugs}),
    keywords=_write(cache, "words", {"dist/emoji-en-US.json": KEYWORDS}),
  )
