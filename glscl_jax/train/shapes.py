"""Shapes and types of a recipe's batches, without data.

The pipeline makes a row of a made-up pair: what a batch holds is said in one
place, there.
"""

from __future__ import annotations

import io

import jax
import numpy as np
from PIL import Image

from glscl_jax import config as config_lib
from glscl_jax import sharding, types
from glscl_jax.data import order, pipeline, sources
from glscl_jax.data import regions as regions_lib
from glscl_jax.data import tokenizer as tokenizer_lib


class _Tokenizer(tokenizer_lib.Tokenizer):
  """A vocabulary of the size asked for that reads every text as empty."""

  start_id, pad_id, end_id, unknown_id, sha256 = 0, 1, 2, 3, ""

  def __init__(self, vocab_size: int):
    self.vocab_size, self.mask_id = vocab_size, vocab_size - 1

  def pieces(self, ids):
    return ["" for _ in ids]

  def text(self, ids):
    return ""

  def _split(self, text):
    return [], [], [], False


class _Source:
  """One record."""

  name = "a made-up record"

  def __init__(self, config: config_lib.Config):
    region = config.model.region
    self.schema, regions = None, None
    if pipeline.reads_regions(config):
      self.schema = regions_lib.Schema(
        width=region.feature_width,
        classes=("thing",) * region.num_classes,
        images=False,
      )
      regions = regions_lib.Regions(
        feature_RP=np.zeros((1, region.feature_width), np.float16),
        box_R4=np.array([[0, 0, 1, 1]], np.float32),
        class_R=np.ones(1, np.int32),
        confidence_R=np.ones(1, np.float32),
      )
    image = io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "PNG")
    self._example = sources.Example(
      id=self.name,
      image=image.getvalue(),
      captions=("thing",),
      image_id=0,
      regions=regions,
    )

  def __len__(self) -> int:
    return 1

  def __getitem__(self, index: int) -> sources.Example:
    return self._example

  def count_captions(self) -> np.ndarray:
    return np.ones(1, np.int32)


def abstract_batch(
  config: config_lib.Config, mesh: jax.sharding.Mesh
) -> types.Batch:
  """What `pipeline.global_batch` gives, as ShapeDtypeStructs.

  Raises:
    ConfigError: the mesh does not divide the batch.
  """
  size = config.data.batch_size
  pipeline.check_batch(config, mesh.shape, 1)
  make_row = pipeline.make_row_maker(
    config,
    _Tokenizer(config.model.text.vocab_size),
    pipeline.make_pairs(_Source(config)),
    order=order.Listed((0,) * size),
    kinds=pipeline.mask_kinds(config),
    first=0,
    count=size,
  )
  row = make_row.row(0)
  names = types.Batch.__dataclass_fields__
  return types.Batch(
    **{
      name: jax.ShapeDtypeStruct(
        (size, *np.shape(value)),
        value.dtype,
        sharding=sharding.batch_sharding(mesh),
      )
      for name, value in row.items()
      if name in names
    }
  )
