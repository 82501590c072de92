"""Small real things for tests: a data directory, a model, its weights."""

from __future__ import annotations

import dataclasses
import functools
import io
import pathlib
from collections.abc import Callable

import numpy as np
from PIL import Image

from glscl_jax import config as config_lib
from glscl_jax.data import pairs, tokenizer
from glscl_jax.export import weights as weights_lib
from tests import random_pairs

NAMES = (
  "red cat face",
  "two blue fish",
  "old clock tower",
  "green apple",
  "small boat",
  "open book",
  "yellow sun with a smiling face",
  "snow on the mountain",
)


def png(seed: int, *, size: int = 24) -> bytes:
  """An encoded picture of random blocks, the same for the same seed."""
  rng = np.random.default_rng(seed)
  blocks = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
  picture = Image.fromarray(blocks).resize((size, size), Image.Resampling.BOX)
  file = io.BytesIO()
  picture.save(file, "PNG")
  return file.getvalue()


def record(
  split: str, number: int, captions: tuple[str, ...], *, seed: int | None = None
) -> pairs.Record:
  """One record; `seed` draws the picture, by default the number does."""
  return pairs.Record(
    id=f"{split}-{number}",
    split=split,
    image=png(number if seed is None else seed),
    captions=captions,
  )


def write_data(
  data_dir: pathlib.Path, splits: dict[str, list[pairs.Record]]
) -> pathlib.Path:
  """A data directory with a sentencepiece tokenizer of a few dozen pieces."""

  def finish(directory, manifest):
    del manifest
    tokenizer.train_sentencepiece(
      list(NAMES) * 3, directory / "tokenizer.model", 48
    )

  pairs.write(
    data_dir,
    splits={name: lambda rows=rows: rows for name, rows in splits.items()},
    source={"kind": "tiny"},
    finish=finish,
  )
  return data_dir


def write_names(data_dir: pathlib.Path, *splits: str) -> pathlib.Path:
  """One picture for each of NAMES in every split."""
  return write_data(
    data_dir,
    {
      split: [
        record(split, 100 * s + i, (name, f"{name}, drawn"))
        for i, name in enumerate(NAMES)
      ]
      for s, split in enumerate(splits)
    },
  )


def config(data_dir: pathlib.Path) -> config_lib.Config:
  """The smallest model of the system that reads `data_dir`."""
  vocab_size = tokenizer.load(data_dir / "tokenizer.model").vocab_size
  return config_lib.Config(
    model=config_lib.ModelConfig(
      vision=config_lib.VisionConfig(
        image_size=32, patch_size=16, width=64, depth=1
      ),
      text=config_lib.TextConfig(
        vocab_size=vocab_size, max_length=20, width=64, depth=1
      ),
      fusion=config_lib.FusionConfig(width=64, depth=1),
      joint_width=32,
      compute_dtype="float32",
      remat="none",
    ),
    data=config_lib.DataConfig(dir=str(data_dir), batch_size=8),
    train=config_lib.TrainConfig(num_steps=4),
  )


# Random weights, wide enough that the few pictures of a split rank apart.
params = functools.partial(random_pairs.spread_params, spread=0.2)


def of_system(
  data_dir: pathlib.Path, make: Callable[..., config_lib.Config]
) -> config_lib.Config:
  """A configuration of tests/random_pairs.py that reads `data_dir`."""
  vocab_size = tokenizer.load(data_dir / "tokenizer.model").vocab_size
  made = make(vocab_size=vocab_size, max_length=9)
  data = dataclasses.replace(made.data, dir=str(data_dir))
  return dataclasses.replace(made, data=data)


def save(folder: pathlib.Path, config: config_lib.Config) -> pathlib.Path:
  """An export of random weights at step 7, in `folder`."""
  weights_lib.save_export(
    folder,
    weights_lib.Weights(
      config=config,
      params=params(config),
      tokenizer_path=pathlib.Path(config.data.dir) / "tokenizer.model",
      step=7,
      metrics={},
      lineage={"tokenizer_sha256": "t" * 64, "init_from": None},
    ),
  )
  return folder
