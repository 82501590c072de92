"""A data directory: ArrayRecord files, a tokenizer and a manifest.

Written by a tensorflow-datasets builder (no TensorFlow), read by `sources.py`.
A directory appears whole or not at all: it is made under a temporary name and
renamed. `manifest.json` holds what it was made from and the hash of each file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from absl import logging

from glscl_jax import atomic, errors
from glscl_jax.data import regions as regions_lib

MANIFEST = "manifest.json"
FORMAT = 1  # of the directory; another number is another layout
_DATASET = "pairs"
_VERSION = "1.0.0"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
  """One image with its captions, before it is written.

  It has what the directory's regions.Schema says: image, regions or both.
  """

  id: str  # unique in the directory
  split: str
  image: bytes | None = None  # encoded, as the file was
  captions: tuple[str, ...]
  regions: regions_lib.Regions | None = None


class DataError(errors.UserError):
  """Data that cannot be used; the message names the file or record."""


def sha256_of(path: pathlib.Path) -> str:
  """The hash of a file's bytes."""
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(data_dir: str | os.PathLike[str]) -> dict[str, Any]:
  """The manifest of a data directory.

  Raises:
    DataError: no such directory, or no readable manifest in it.
  """
  path = pathlib.Path(data_dir) / MANIFEST
  if not path.parent.is_dir():
    raise DataError(
      f"{path.parent}: no such data directory; make it with `python "
      f"launch/prepare.py --source=emoji --output={path.parent}` (or "
      "--source=jsonl --input=FILE)"
    )
  try:
    manifest = json.loads(path.read_text())
  except (OSError, ValueError) as error:
    raise DataError(
      f"{path}: not readable ({error}); {path.parent} was not made by "
      "launch/prepare.py or is damaged: make it again"
    ) from error
  found = manifest["format"] if "format" in manifest else "unknown"
  if found != FORMAT:
    raise DataError(
      f"{path}: format {found}, this version reads {FORMAT}: make the "
      "directory again with launch/prepare.py"
    )
  return manifest


def hash_split(manifest: Mapping[str, Any], split: str) -> str:
  """A hash of a split's records in stored order, wherever they lie.

  Two preparations of the same data give the same; for a directory made before
  this was stored, a hash of its files, which is its own.
  """
  if "split_sha256" in manifest:
    return manifest["split_sha256"][split]
  hashes = {
    name: entry["sha256"]
    for name, entry in manifest["files"].items()
    if f"-{split}.array_record" in name
  }
  text = json.dumps(hashes, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def counts_name(split: str) -> str:
  """The file with the number of captions of each record of a split."""
  return f"num_captions-{split}.npy"


def tokens_name(split: str, tokenizer_sha256: str) -> str:
  """The file with the number of tokens of each caption, by one tokenizer."""
  return f"num_tokens-{split}-{tokenizer_sha256[:16]}.npy"


def find_damage(
  data_dir: str | os.PathLike[str], *, source: Mapping[str, Any]
) -> str:
  """Why the directory cannot stand for `source`; empty when it can.

  Reads every file: used before a preparation is skipped.
  """
  try:
    manifest = read_manifest(data_dir)
  except DataError as error:
    return str(error)
  if manifest["source"] != json.loads(json.dumps(source)):
    return "it was made with other parameters or from other files"
  for name, entry in manifest["files"].items():
    path = pathlib.Path(data_dir) / name
    if not path.is_file():
      return f"{name} is missing"
    if path.stat().st_size != entry["size"] or (
      sha256_of(path) != entry["sha256"]
    ):
      return f"{name} is damaged"
  return ""


def write(
  data_dir: str | os.PathLike[str],
  *,
  splits: Mapping[str, Callable[[], Iterable[Record]]],
  source: Mapping[str, Any],
  finish: Callable[[pathlib.Path, dict[str, Any]], None],
  schema: regions_lib.Schema | None = None,
) -> dict[str, Any]:
  """Writes a whole directory and returns its manifest.

  Args:
    data_dir: replaced when it exists.
    splits: name -> function giving the records of the split, called once.
    source: what the directory is made from, JSON-able; compared by
      `find_damage` before a later preparation is skipped.
    finish: called with the unfinished directory and manifest, to add a
      tokenizer and further entries; may raise to give up.
    schema: of the records' regions; None: they are images alone.

  Raises:
    DataError: a split without records, or a `data_dir` that exists but was
      not made by this function.
  """
  check_target(data_dir)
  with atomic.new_folder(pathlib.Path(data_dir)) as whole:
    images, contents = _ImageIndex(), _Contents()
    built, hashes = _build(
      whole.parent / "build", splits, images, contents, schema
    )
    shutil.move(built, whole)
    manifest = {
      "format": FORMAT,
      "source": dict(source),
      "splits": _count(whole),
      # Of the records alone: equal on every machine, while the files differ
      # in the order in which fields were serialised.
      "content_sha256": contents.sha256(),
      "split_sha256": hashes,
      "images": len(images.index),
      "images_in_several_splits": images.count_shared(),
    }
    if schema is not None:
      (whole / regions_lib.CLASSES).write_text(schema.text(), encoding="utf-8")
      manifest["regions"] = schema.describe()
    finish(whole, manifest)
    manifest["files"] = {
      path.name: {"size": path.stat().st_size, "sha256": sha256_of(path)}
      for path in sorted(whole.iterdir())
    }
    text = json.dumps(manifest, indent=2, sort_keys=True)
    (whole / MANIFEST).write_text(text + "\n")
  return manifest


def check_target(data_dir: str | os.PathLike[str]) -> None:
  """Checks that `write` could put a data directory there.

  Raises:
    DataError, UserError: something else is there, or it cannot be written.
  """
  target = pathlib.Path(data_dir).absolute()
  errors.check_replaceable(target, option=f"--output={data_dir}")
  if target.exists() and not _is_replaceable(target):
    raise DataError(
      f"{target}: exists and is no data directory; name another --output, or "
      "remove it first"
    )


def is_data_dir(path: str | os.PathLike[str]) -> bool:
  """Whether `write` made the folder."""
  try:
    return read_manifest(path)["format"] == FORMAT
  except errors.UserError:
    return False


def _is_replaceable(target: pathlib.Path) -> bool:
  """Only what this module made, or an empty folder, is ever removed."""
  if not target.is_dir():
    return False
  return (target / MANIFEST).is_file() or not any(target.iterdir())


class _ImageIndex:
  """Numbers distinct images in the order they are first seen."""

  def __init__(self):
    self.index: dict[bytes, int] = {}
    self._splits: dict[int, set[str]] = {}

  def add(self, record: Record) -> int:
    """The number of an image, the same for equal bytes.

    Without an image its regions stand for it.
    """
    if record.image is None:
      digest = regions_lib.digest(record.regions)
    else:
      digest = hashlib.sha256(record.image).digest()
    number = self.index.setdefault(digest, len(self.index))
    self._splits.setdefault(number, set()).add(record.split)
    return number

  def count_shared(self) -> int:
    """How many images stand in more than one split."""
    return sum(len(names) > 1 for names in self._splits.values())


class _Contents:
  """A hash of records that does not depend on their order."""

  def __init__(self):
    self._digests: list[bytes] = []

  def add(self, record: Record) -> None:
    """Takes one record into account."""
    described = _describe(
      record.id, record.image, record.captions, record.regions
    )
    text = json.dumps([record.split, *described])
    self._digests.append(hashlib.sha256(text.encode()).digest())

  def sha256(self) -> str:
    """The hash of all records so far."""
    return hashlib.sha256(b"".join(sorted(self._digests))).hexdigest()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
  """Hides the information that tensorflow-datasets logs at every step."""
  before = logging.get_verbosity()
  logging.set_verbosity(min(before, logging.WARNING))
  try:
    yield
  finally:
    logging.set_verbosity(before)


def _build(
  root: pathlib.Path,
  splits: Mapping[str, Callable[[], Iterable[Record]]],
  images: _ImageIndex,
  contents: _Contents,
  schema: regions_lib.Schema | None,
) -> tuple[pathlib.Path, dict[str, str]]:
  """Runs the builder below `root`; its folder and the hash of each split."""
  # Imported late: it takes seconds, and readers of a manifest do not need it.
  import tensorflow_datasets as tfds

  with_images = schema is None or schema.images

  # The registry takes a name once in a process; two calls define it twice.
  class Pairs(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Image-text pairs."""

    name = _DATASET
    VERSION = tfds.core.Version(_VERSION)

    def _info(self):
      return tfds.core.DatasetInfo(
        builder=self,
        description="Image-text pairs, images as their encoded bytes.",
        features=tfds.features.FeaturesDict(
          {
            "id": tfds.features.Text(),
            **({"image": tfds.features.Image()} if with_images else {}),
            "captions": tfds.features.Sequence(tfds.features.Text()),
            "image_id": tfds.features.Scalar(dtype=np.int32),
            **({} if schema is None else {"regions": _features(schema)}),
          }
        ),
      )

    def _split_generators(self, dl_manager):
      del dl_manager
      return {name: self._generate_examples(name) for name in splits}

    def _generate_examples(self, name):
      empty = True
      for record in splits[name]():
        empty = False
        contents.add(record)
        row = {
          "id": record.id,
          "captions": list(record.captions),
          "image_id": images.add(record),
        }
        if with_images:
          row["image"] = record.image
        if schema is not None:
          row["regions"] = regions_lib.to_row(record.regions)
        yield record.id, row
      if empty:
        raise DataError(f"split {name!r} has no usable record")

  tfds.disable_progress_bar()  # records come with a bar of their own
  builder = Pairs(data_dir=root, file_format="array_record")
  with quiet(), contextlib.redirect_stdout(None):
    builder.download_and_prepare()
    directory = pathlib.Path(builder.data_dir)
    hashes = {}
    for name in splits:
      # Read back: the builder has shuffled the records.
      records = open_records(builder, name)
      counts, digest = [], hashlib.sha256()
      for row in records:
        counts.append(len(row["captions"]))
        digest.update(_describe_row(row).encode())
      np.save(directory / counts_name(name), np.array(counts, np.int32))
      hashes[name] = digest.hexdigest()
  return directory, hashes


def _features(schema: regions_lib.Schema) -> dict[str, Any]:
  """How the builder stores regions: as the bytes of the arrays."""
  import tensorflow_datasets as tfds

  def tensor(*shape: int | None, dtype: type) -> Any:
    return tfds.features.Tensor(
      shape=shape, dtype=dtype, encoding=tfds.features.Encoding.BYTES
    )

  return {
    "features": tensor(None, schema.width, dtype=np.float16),
    "boxes": tensor(None, 4, dtype=np.float32),
    "classes": tensor(None, dtype=np.int32),
    "confidence": tensor(None, dtype=np.float32),
  }


def open_records(builder: Any, split: str) -> Any:
  """Random access to a split's rows, images as their encoded bytes."""
  import tensorflow_datasets as tfds

  skipped = {"image": tfds.decode.SkipDecoding()}
  decoders = skipped if "image" in builder.info.features else None
  return builder.as_data_source(split=split, decoders=decoders)


def _describe(
  name: str,
  image: bytes | None,
  captions: Iterable[str],
  regions: regions_lib.Regions | None,
) -> list[Any]:
  """A record as JSON can hold it, large parts as their hashes."""
  parts: list[Any] = [name]
  if image is not None:
    parts.append(hashlib.sha256(image).hexdigest())
  parts += captions
  if regions is not None:
    parts.append({"regions": regions_lib.digest(regions).hex()})
  return parts


def _describe_row(row: Mapping[str, Any]) -> str:
  """A stored record as a line of text.

  Without its image_id, which depends on the order of the input: that images
  are equal their hashes say as well.
  """
  described = _describe(
    text_of(row["id"]),
    image_of(row),
    [text_of(caption) for caption in row["captions"]],
    regions_of(row),
  )
  return json.dumps(described) + "\n"


def image_of(row: Mapping[str, Any]) -> bytes | None:
  """The encoded image of a stored row, where images are stored."""
  return row["image"] if "image" in row else None


def regions_of(row: Mapping[str, Any]) -> regions_lib.Regions | None:
  """The regions of a stored row, where regions are stored."""
  return regions_lib.from_row(row["regions"]) if "regions" in row else None


def text_of(value: Any) -> str:
  """A stored text field as str."""
  return value.decode() if isinstance(value, bytes) else str(value)


def _count(directory: pathlib.Path) -> dict[str, int]:
  info = json.loads((directory / "dataset_info.json").read_text())
  return {
    split["name"]: sum(int(n) for n in split["shardLengths"])
    for split in info["splits"]
  }
