"""From emoji packages, JSON Lines or regions to a data directory.

The work behind `launch/prepare.py`: a whole directory of the same source is
left alone; anything else is made again.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from glscl_jax.data import (
  emoji,
  ingest,
  pairs,
  region_files,
  render,
  scenes,
  sources,
  tokenizer,
)
from glscl_jax.data import regions as regions_lib

_PRINTED = 20  # rejected lines; the manifest lists all


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vocabulary:
  """Which tokenizer a data directory gets."""

  file: str = ""  # copied; empty: trained
  train: bool | None = None  # on the split `train`; None: where there is one
  size: int = 2000  # bound of the trained one
  model_type: str = "unigram"  # of the trained one

  def __post_init__(self):
    if self.file and self.train:
      raise pairs.DataError("--tokenizer and --train_tokenizer exclude another")
    if self.file:
      tokenizer.load(self.file)

  def source(self) -> dict[str, Any]:
    """What the result depends on."""
    if self.file:
      return {"tokenizer_sha256": tokenizer.load(self.file).sha256}
    return {
      "train_tokenizer": self.train,
      "vocab_size": self.size,
      "tokenizer_type": self.model_type,
    }


def prepare_emoji(
  output: str | pathlib.Path,
  *,
  cache: str | pathlib.Path,
  size: int = 96,
  npm: str = "",
  vocabulary: Vocabulary = Vocabulary(),
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
    vocabulary: the tokenizer to add.
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
    "rules": emoji.RULES,
    "packages": {
      f"{package.name}@{package.version}": package.sha256
      for package in packages
    },
    "size": size,
    **vocabulary.source(),
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
    manifest["studios"] = emoji.read_credits(cache, studios=studios)
    manifest["pairs_per_studio"] = dict(
      collections.Counter(item.studio for item in drawings)
    )
    manifest["split_description"] = emoji.SPLIT_DESCRIPTION
    manifest["rejected"] = []
    _add_tokenizer(directory, manifest, vocabulary)

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
  vocabulary: Vocabulary = Vocabulary(),
) -> dict[str, Any]:
  """Makes a data directory from a JSON Lines file; returns its manifest.

  Args:
    output: the data directory.
    path: one JSON object a line; see `ingest.read_lines`.
    image_root: folder of the images; empty: that of `path`.
    split: of lines that name none.
    max_reject_share: of all lines; more fails.
    vocabulary: the tokenizer to add.

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
    "max_reject_share": max_reject_share,
    **vocabulary.source(),
  }
  if (found := _whole(output, source)) is not None:
    return found
  return _write_lines(
    output,
    _Lines(
      path=path,
      lines=lines,
      rejects=rejects,
      num_lines=num_lines,
      max_reject_share=max_reject_share,
    ),
    read=functools.partial(ingest.read_records, lines, root, rejects=rejects),
    source=source,
    vocabulary=vocabulary,
  )


def prepare_regions(
  output: str | pathlib.Path,
  *,
  path: str | pathlib.Path,
  features: str | pathlib.Path,
  classes: str | pathlib.Path,
  split: str = "train",
  max_reject_share: float = 0.01,
  vocabulary: Vocabulary = Vocabulary(),
) -> dict[str, Any]:
  """Makes a data directory of a detector's regions; returns its manifest.

  Args:
    output: the data directory.
    path: captions, one JSON object a line; see `ingest.read_lines`, by id.
    features: a .tsv file or a folder of .npz files; see `region_files`.
    classes: the detector's list of classes, a class a line.
    split: of lines that name none.
    max_reject_share: of all lines; more fails.
    vocabulary: the tokenizer to add.

  Raises:
    DataError: a list or regions that cannot be used, no usable line, or too
      many rejected ones.
  """
  path = pathlib.Path(path)
  names = _read_classes(pathlib.Path(classes))
  reader = region_files.open_reader(features, num_classes=len(names))
  lines, rejects, num_lines = ingest.read_lines(path, split=split, by_id=True)
  source = {
    "kind": "regions",
    "path": str(path.absolute()),
    "sha256": pairs.sha256_of(path),
    "features": str(reader.path.absolute()),
    "features_seen": reader.fingerprint(line.image for line in lines),
    "classes": list(names),
    "kept": [regions_lib.MIN_CONFIDENCE, *regions_lib.NUM_KEPT],
    "split": split,
    "max_reject_share": max_reject_share,
    **vocabulary.source(),
  }
  if (found := _whole(output, source)) is not None:
    return found
  parsed = _Lines(
    path=path,
    lines=lines,
    rejects=rejects,
    num_lines=num_lines,
    max_reject_share=max_reject_share,
  )
  parsed.check()
  width = region_files.find_width(reader, (line.image for line in lines))
  return _write_lines(
    output,
    parsed,
    read=functools.partial(
      region_files.read_records, lines, reader, width=width, rejects=rejects
    ),
    source=source,
    vocabulary=vocabulary,
    schema=regions_lib.Schema(width=width, classes=names, images=False),
  )


def prepare_scenes(
  output: str | pathlib.Path,
  *,
  drawings: str | pathlib.Path,
  encoder: scenes.Encoder,
  options: scenes.Options,
  vocabulary: Vocabulary = Vocabulary(),
) -> dict[str, Any]:
  """Makes a data directory of composed scenes; returns its manifest.

  Args:
    output: the data directory.
    drawings: one that `prepare_emoji` made.
    encoder: gives the features.
    options: how many scenes, and how large.
    vocabulary: the tokenizer to add.

  Raises:
    DataError: drawings of another kind, or too few.
  """
  given = pairs.read_manifest(drawings)
  if given["source"]["kind"] != "emoji":
    raise pairs.DataError(
      f"--input={drawings}: made from {given['source']['kind']}; scenes are "
      "made of a directory of --source=emoji"
    )
  source = {
    "kind": "scenes",
    "rules": scenes.RULES,
    "drawings_sha256": given["content_sha256"],
    "encoder_sha256": encoder.sha256,
    **dataclasses.asdict(options),
    **vocabulary.source(),
  }
  if (found := _whole(output, source)) is not None:
    return found
  names = scenes.find_names(str(drawings), given["splits"])
  splits = scenes.choose_splits(names)
  if not splits:
    raise pairs.DataError(
      f"--input={drawings}: none of its splits has "
      f"{scenes.NUM_DRAWINGS[0]} names that scenes can use; prepare more "
      "drawings"
    )
  classes = sorted({name for split in splits for name in names[split]})
  numbers = {name: number for number, name in enumerate(classes, start=1)}

  def finish(directory: pathlib.Path, manifest: dict[str, Any]) -> None:
    manifest["encoder"] = {"sha256": encoder.sha256, **encoder.about}
    manifest["studios"] = given["studios"]
    manifest["split_description"] = (
      "scenes of drawings of one split: " + given["split_description"]
    )
    manifest["rejected"] = []
    _add_tokenizer(directory, manifest, vocabulary)

  return pairs.write(
    output,
    splits={
      split: functools.partial(
        scenes.make_records,
        str(drawings),
        split,
        encoder=encoder,
        classes=numbers,
        options=options,
      )
      for split in splits
    },
    source=source,
    finish=finish,
    schema=regions_lib.Schema(
      width=encoder.width, classes=tuple(classes), images=True
    ),
  )


def _read_classes(path: pathlib.Path) -> tuple[str, ...]:
  try:
    return regions_lib.read_classes(path.read_text(encoding="utf-8-sig"))
  except (OSError, ValueError) as error:
    raise pairs.DataError(
      f"--classes={path}: not a list of classes, a class a line ({error})"
    ) from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Lines:
  """The lines of a file, parsed, and how many may be rejected."""

  path: pathlib.Path
  lines: Sequence[ingest.Line]
  rejects: list[ingest.Reject]  # grows while records are read
  num_lines: int
  max_reject_share: float

  def check(self) -> None:
    """Raises DataError when too many are rejected."""
    ingest.check_rejects(
      self.path,
      self.rejects,
      num_lines=self.num_lines,
      max_share=self.max_reject_share,
    )


def _write_lines(
  output: str | pathlib.Path,
  lines: _Lines,
  *,
  read: Callable[..., Iterable[pairs.Record]],
  source: Mapping[str, Any],
  vocabulary: Vocabulary,
  schema: regions_lib.Schema | None = None,
) -> dict[str, Any]:
  """Writes the records that `read(split=)` gives, and what was rejected."""
  lines.check()  # before any image is read

  def finish(directory: pathlib.Path, manifest: dict[str, Any]) -> None:
    lines.check()
    manifest["lines"] = lines.num_lines
    manifest["rejected"] = [vars(reject) for reject in lines.rejects]
    manifest["split_description"] = "as the file says"
    _add_tokenizer(directory, manifest, vocabulary)

  names = sorted({line.split for line in lines.lines})
  try:
    manifest = pairs.write(
      output,
      splits={name: functools.partial(read, split=name) for name in names},
      source=source,
      finish=finish,
      schema=schema,
    )
  except pairs.DataError:
    lines.check()  # why a split is empty says more than that it is
    raise
  if manifest["images_in_several_splits"]:
    logging.warning(
      "%d images stand in more than one split: figures on held-out splits "
      "will flatter",
      manifest["images_in_several_splits"],
    )
  return manifest


def _whole(
  output: str | pathlib.Path, source: Mapping[str, Any]
) -> dict[str, Any] | None:
  """The manifest of a directory that needs no work.

  Raises:
    UserError: the directory has to be made, and cannot be.
  """
  damage = pairs.find_damage(output, source=source)
  if not damage:
    logging.info("%s is whole: nothing to do", output)
    return pairs.read_manifest(output)
  pairs.check_target(output)
  if pathlib.Path(output).exists():
    logging.info("making %s again: %s", output, damage)
  return None


def _add_tokenizer(
  directory: pathlib.Path, manifest: dict[str, Any], vocabulary: Vocabulary
) -> None:
  """Copies or trains the tokenizer and notes what it is, or that none is."""
  manifest["tokenizer"] = None
  if vocabulary.file:
    target = directory / f"tokenizer{pathlib.Path(vocabulary.file).suffix}"
    shutil.copyfile(vocabulary.file, target)
  elif vocabulary.train is False:
    return
  elif "train" in manifest["splits"]:
    target = directory / "tokenizer.model"
    captions = list(_read_captions(directory, manifest["splits"]["train"]))
    tokenizer.train_sentencepiece(
      captions, target, vocabulary.size, model_type=vocabulary.model_type
    )
  elif vocabulary.train:
    raise pairs.DataError("--train_tokenizer: there is no split 'train'")
  else:
    logging.info("no split 'train': no tokenizer is added")
    return
  loaded = tokenizer.load(target)
  for split, size in manifest["splits"].items():
    counts_A = sources.Source(directory, split, size).read_tokens(loaded)
    np.save(directory / pairs.tokens_name(split, loaded.sha256), counts_A)
  manifest["tokenizer"] = {
    "file": target.name,
    "sha256": loaded.sha256,
    "vocab_size": loaded.vocab_size,
    "trained_on": "" if vocabulary.file else "train",
  }


def _read_captions(directory: pathlib.Path, size: int) -> Iterator[str]:
  records = sources.Source(directory, "train", size)
  for index in range(size):
    yield from records[index].captions


def describe(output: str | pathlib.Path, manifest: Mapping[str, Any]) -> str:
  """What a data directory holds, and its rejected lines, as text."""
  lines = [f"{output}: {manifest['images']} different images"]
  lines += [
    f"  {count:7d} pairs in {name}"
    for name, count in manifest["splits"].items()
  ]
  if "regions" in manifest:
    stored = manifest["regions"]
    lines.append(
      f"  regions of {stored['num_classes']} classes, features of "
      f"{stored['feature_width']} values"
    )
  made = manifest["tokenizer"]
  lines.append(
    f"  tokenizer {made['file']}, {made['vocab_size']} entries"
    if made
    else "  no tokenizer: set data.tokenizer when training"
  )
  rejected = manifest["rejected"]
  lines.append(f"  {len(rejected)} records rejected")
  lines += [
    f"    line {entry['line']} {entry['id']}: {entry['reason']}"
    for entry in rejected[:_PRINTED]
  ]
  if len(rejected) > _PRINTED:
    lines.append(f"    .. all of them in {output}/{pairs.MANIFEST}")
  return "\n".join(lines)
