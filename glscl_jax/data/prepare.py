"""From emoji packages or a JSON Lines file to a data directory.

The work behind `launch/prepare.py`: a whole directory of the same source is
left alone; anything else is made again.
"""

from __future__ import annotations

import collections
import functools
import hashlib
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from absl import logging

from glscl_jax.data import emoji, ingest, pairs, render, sources, tokenizer


def prepare_emoji(
  output: str | pathlib.Path,
  *,
  cache: str | pathlib.Path,
  size: int = 96,
  npm: str = "",
  vocab_size: int = 2000,
  tokenizer_file: str = "",
  num_processes: int = 2,
  studios: Mapping[str, emoji.Package] = emoji.STUDIOS,
  texts: Sequence[emoji.Package] = (emoji.NAMES, emoji.KEYWORDS),
) -> dict[str, Any]:
  """Makes the default data; returns its manifest.

  Args:
    output: the data directory.
    cache: folder of npm tarballs; what is missing is fetched.
    size: pixels of a side of each drawing.
    npm: the npm program; empty: searched for.
    vocab_size: bound of the tokenizer trained on the training captions.
    tokenizer_file: copied instead of training one.
    num_processes: that render.
    studios: packages of drawings.
    texts: the package of names and the package of keywords.

  Raises:
    FetchError: a package that cannot be had or is not the pinned one.
  """
  cache = pathlib.Path(cache)
  packages = (*studios.values(), *texts)
  source = {
    "kind": "emoji",
    "packages": {
      f"{package.name}@{package.version}": package.sha256
      for package in packages
    },
    "size": size,
    **_tokenizer_source(tokenizer_file, vocab_size),
  }
  if (found := _whole(output, source)) is not None:
    return found
  emoji.fetch(cache, packages=packages, npm=npm)
  names, keywords = texts
  drawings = emoji.read_drawings(
    cache, studios=studios, names=names, keywords=keywords
  )
  chosen = [item for item in drawings if emoji.split_of(item) is not None]
  images = render.render_all(
    [item.svg for item in chosen], size=size, num_processes=num_processes
  )
  records = collections.defaultdict(list)
  for record in emoji.make_records(chosen, images):
    records[record.split].append(record)

  def finish(directory: pathlib.Path, manifest: dict[str, Any]) -> None:
    if manifest["images_in_several_splits"]:
      raise pairs.DataError("a drawing stands in more than one split")
    manifest["studios"] = emoji.credits(cache, studios=studios)
    manifest["pairs_per_studio"] = dict(
      collections.Counter(item.studio for item in drawings)
    )
    manifest["split_description"] = emoji.SPLIT_DESCRIPTION
    manifest["rejected"] = []
    _add_tokenizer(directory, manifest, tokenizer_file, vocab_size)

  return pairs.write(
    output,
    splits={
      name: functools.partial(iter, records[name])
      for name in emoji.SPLITS.values()
      if records[name]
    },
    source=source,
    finish=finish,
  )


def prepare_jsonl(
  output: str | pathlib.Path,
  *,
  path: str | pathlib.Path,
  image_root: str = "",
  split: str = "train",
  max_reject_share: float = 0.01,
  vocab_size: int = 2000,
  tokenizer_file: str = "",
) -> dict[str, Any]:
  """Makes a data directory from a JSON Lines file; returns its manifest.

  Args:
    output: the data directory.
    path: one JSON object a line; see `ingest.read_lines`.
    image_root: folder of the images; empty: that of `path`.
    split: of lines that name none.
    max_reject_share: of all lines; more fails.
    vocab_size: bound of the tokenizer trained on the training captions.
    tokenizer_file: copied instead of training one.

  Raises:
    DataError: no usable line, or too many rejected ones.
  """
  path = pathlib.Path(path)
  root = pathlib.Path(image_root) if image_root else path.parent
  lines, rejects, num_lines = ingest.read_lines(path, split=split)
  source = {
    "kind": "jsonl",
    "path": str(path.absolute()),
    "sha256": pairs.sha256_of(path),
    "images": ingest.fingerprint(lines, root),
    "image_root": str(root.absolute()),
    "split": split,
    **_tokenizer_source(tokenizer_file, vocab_size),
  }
  if (found := _whole(output, source)) is not None:
    return found

  def finish(directory: pathlib.Path, manifest: dict[str, Any]) -> None:
    ingest.check_rejects(
      path, rejects, num_lines=num_lines, max_share=max_reject_share
    )
    manifest["lines"] = num_lines
    manifest["rejected"] = [vars(reject) for reject in rejects]
    manifest["split_description"] = "as the file says"
    _add_tokenizer(directory, manifest, tokenizer_file, vocab_size)

  ingest.check_rejects(
    path, rejects, num_lines=num_lines, max_share=max_reject_share
  )
  names = sorted({line.split for line in lines})
  return pairs.write(
    output,
    splits={
      name: functools.partial(
        ingest.read_records, lines, root, split=name, rejects=rejects
      )
      for name in names
    },
    source=source,
    finish=finish,
  )


def _whole(
  output: str | pathlib.Path, source: Mapping[str, Any]
) -> dict[str, Any] | None:
  """The manifest of a directory that needs no work."""
  damage = pairs.find_damage(output, source=source)
  if not damage:
    logging.info("%s is whole: nothing to do", output)
    return pairs.read_manifest(output)
  if pathlib.Path(output).exists():
    logging.info("making %s again: %s", output, damage)
  return None


def _tokenizer_source(path: str, vocab_size: int) -> dict[str, Any]:
  if not path:
    return {"vocab_size": vocab_size}
  return {"tokenizer_sha256": tokenizer.load(path).sha256}


def _add_tokenizer(
  directory: pathlib.Path,
  manifest: dict[str, Any],
  path: str,
  vocab_size: int,
) -> None:
  """Copies or trains the tokenizer; notes what it is."""
  if path:
    target = directory / f"tokenizer{pathlib.Path(path).suffix}"
    shutil.copyfile(path, target)
  else:
    if "train" not in manifest["splits"]:
      raise pairs.DataError(
        "no split 'train' to train a tokenizer on: pass --tokenizer=FILE"
      )
    target = directory / "tokenizer.model"
    records = sources.Source(directory, "train", manifest["splits"]["train"])
    captions = [
      caption
      for index in range(len(records))
      for caption in records[index].captions
    ]
    tokenizer.train_sentencepiece(captions, target, vocab_size)
  loaded = tokenizer.load(target)
  manifest["tokenizer"] = {
    "file": target.name,
    "sha256": loaded.sha256,
    "vocab_size": loaded.vocab_size,
    "trained_on": "" if path else "train",
  }
