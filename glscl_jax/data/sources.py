"""Reads a data directory: random access to examples by split.

Made by `launch/prepare.py`, used by the training pipeline and by evaluation.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import pathlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from glscl_jax.data import pairs, progress
from glscl_jax.data import regions as regions_lib
from glscl_jax.data import tokenizer as tokenizer_lib

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
  """One image with its captions."""

  id: str
  image: bytes | None  # encoded: PNG, JPEG, ..; None: regions alone are there
  captions: tuple[str, ...]
  image_id: int  # equal for equal images, within one data directory
  regions: regions_lib.Regions | None = None


def splits(data_dir: str | os.PathLike[str]) -> dict[str, int]:
  """Split names and their number of records."""
  return dict(pairs.read_manifest(data_dir)["splits"])


def check_splits(
  data_dir: str | os.PathLike[str], asked: Iterable[str], *, option: str
) -> None:
  """Raises DataError, which names `option`, where a split is not there."""
  there = splits(data_dir)
  for split in asked:
    if split not in there:
      raise pairs.DataError(
        f"{option}: {data_dir} has no split {split!r}; it has {sorted(there)}"
      )


def tokenizer_path(data_dir: str | os.PathLike[str]) -> pathlib.Path:
  """The tokenizer file of a data directory.

  Raises:
    DataError: there is none.
  """
  for name in ("tokenizer.model", "tokenizer.json"):
    path = pathlib.Path(data_dir) / name
    if path.is_file():
      return path
  raise pairs.DataError(
    f"{data_dir}: no tokenizer.model or tokenizer.json; set data.tokenizer, "
    "or make the directory again with launch/prepare.py (--train_tokenizer)"
  )


def read_schema(
  data_dir: str | os.PathLike[str],
) -> regions_lib.Schema | None:
  """What the regions of a data directory are; None: it has images alone.

  Raises:
    DataError: its list of classes is not the one that was written.
  """
  manifest = pairs.read_manifest(data_dir)
  if "regions" not in manifest:
    return None
  stored, path = (
    manifest["regions"],
    pathlib.Path(data_dir, regions_lib.CLASSES),
  )
  try:
    lines = regions_lib.read_classes(path.read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise pairs.DataError(
      f"{path}: not readable ({error}); make the directory again with "
      "launch/prepare.py"
    ) from error
  schema = regions_lib.Schema(
    width=stored["feature_width"], classes=lines, images=stored["images"]
  )
  if schema.describe() != stored:
    raise pairs.DataError(
      f"{path}: not the list that the regions were made with; make the "
      "directory again with launch/prepare.py"
    )
  return schema


class Source:
  """Random access to the examples of one split; can be pickled."""

  def __init__(
    self,
    data_dir: pathlib.Path,
    split: str,
    size: int,
    schema: regions_lib.Schema | None = None,
  ):
    self.name = f"{data_dir.name}/{split}"
    self.schema = schema  # of the regions; None: images alone
    self._data_dir = data_dir
    self._split = split
    self._size = size
    self._records: Any = None

  def __len__(self) -> int:
    return self._size

  def __repr__(self) -> str:
    return f"Source({str(self._data_dir)!r}, {self._split!r}, {self._size})"

  def __getitem__(self, index: int) -> Example:
    """Reads one example.

    Raises:
      DataError: the record cannot be read; names the directory and index.
    """
    if not 0 <= index < self._size:
      raise IndexError(f"{self.name} has {self._size} records, not {index}")
    try:
      record = self._open()[index]
    except (RuntimeError, ValueError, IndexError) as error:
      raise pairs.DataError(
        f"{self._data_dir}, split {self._split}, record {index}: not readable "
        f"({error}); make the directory again with launch/prepare.py"
      ) from error
    return Example(
      id=pairs.text_of(record["id"]),
      image=pairs.image_of(record),
      captions=tuple(pairs.text_of(caption) for caption in record["captions"]),
      image_id=int(record["image_id"]),
      regions=pairs.regions_of(record),
    )

  def count_captions(self) -> np.ndarray:
    """The number of captions of each record, int32.

    Reads a directory made before counts were stored record by record.

    Raises:
      DataError: counts or records that cannot be read.
    """
    path = self._data_dir / pairs.counts_name(self._split)
    if not path.is_file():
      return np.array(
        [len(self[i].captions) for i in range(len(self))], np.int32
      )
    return _load_counts(path, self._size, "caption counts of {} records")

  def count_tokens(self, tokenizer: tokenizer_lib.Tokenizer) -> np.ndarray:
    """Tokens of each caption, record by record, with both specials; int32.

    A record without captions has one empty one. Stored for the directory's own
    tokenizer; with another one, or in a directory made before they were, all
    records are read.

    Raises:
      DataError: counts or records that cannot be read.
    """
    name = pairs.tokens_name(self._split, tokenizer.sha256)
    path = self._data_dir / name
    if not path.is_file():
      _log.warning(
        "%s has no %s: reading all records to count their tokens; to count them"
        " once, make the directory again with launch/prepare.py --tokenizer",
        self._data_dir,
        name,
      )
      return self.read_tokens(tokenizer)
    size = int(np.maximum(1, self.count_captions()).sum())
    return _load_counts(path, size, "token counts of {} captions")

  def read_tokens(self, tokenizer: tokenizer_lib.Tokenizer) -> np.ndarray:
    """What `count_tokens` gives, from the captions themselves."""
    records = progress.bar(
      range(len(self)), name=f"tokens of {self._split}", total=len(self)
    )
    return np.array(
      [
        tokenizer.count(caption)
        for index in records
        for caption in self[index].captions or ("",)
      ],
      np.int32,
    )

  def __getstate__(self) -> dict[str, Any]:
    # An open reader holds file handles: every worker opens its own.
    return {**self.__dict__, "_records": None}

  def _open(self) -> Any:
    if self._records is None:
      # Imported late: it takes seconds.
      import tensorflow_datasets as tfds

      with pairs.quiet():
        builder = tfds.builder_from_directory(str(self._data_dir))
      self._records = pairs.open_records(builder, self._split)
    return self._records


def _load_counts(path: pathlib.Path, size: int, what: str) -> np.ndarray:
  try:
    counts_A = np.load(path)
    fits = counts_A.shape == (size,)
  except (OSError, ValueError, EOFError):
    fits = False
  if not fits:
    raise pairs.DataError(
      f"{path}: not the {what.format(size)}; make the directory again with "
      "launch/prepare.py"
    )
  return counts_A


def open_source(data_dir: str | os.PathLike[str], split: str) -> Source:
  """Opens one split; checks that its files are whole.

  Raises:
    DataError: a missing directory, an unknown split, a missing or truncated
      file, or one whose records cannot be read.
  """
  directory = pathlib.Path(data_dir).absolute()
  manifest = pairs.read_manifest(directory)
  if split not in manifest["splits"]:
    raise pairs.DataError(
      f"{data_dir}: no split {split!r}; it has {sorted(manifest['splits'])}"
    )
  for name, entry in manifest["files"].items():
    if f"-{split}.array_record" in name or name == pairs.counts_name(split):
      _check_size(directory / name, entry["size"])
  source = Source(
    directory, split, manifest["splits"][split], read_schema(directory)
  )
  source[0]  # fails here rather than in a worker
  return source


def _check_size(path: pathlib.Path, size: int) -> None:
  found = path.stat().st_size if path.is_file() else None
  if found != size:
    state = "is missing" if found is None else f"has {found} of {size} bytes"
    raise pairs.DataError(
      f"{path} {state}; make the directory again with launch/prepare.py"
    )
