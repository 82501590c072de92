"""A trained image encoder as a source of features for other data.

`launch/prepare.py --source=scenes` describes cut-outs by it.
"""

from __future__ import annotations

import os

import jax
import numpy as np

from glscl_jax.data import pipeline, scenes
from glscl_jax.export import weights as weights_lib
from glscl_jax.systems import registry
from glscl_jax.types import Params, Visual


def open_encoder(
  path: str | os.PathLike[str], *, batch_size: int = 64
) -> scenes.Encoder:
  """The image encoder of a work dir or an export directory.

  A feature is the class state, of `model.vision.width` values, before any
  projection.

  Args:
    path: either.
    batch_size: images of one call; one program is compiled.

  Raises:
    UserError: neither, or a system that reads no images.
  """
  weights = weights_lib.open_weights(path)
  config = weights.config
  if pipeline.reads_regions(config):
    raise weights_lib.WeightsError(
      f"{path}: system {config.system!r} has no image encoder: name weights of "
      "a system that reads images"
    )
  system = registry.find(config)

  @jax.jit
  def states(params: Params, image_BYXC: jax.Array) -> jax.Array:
    visual = Visual(image_BYXC=image_BYXC)
    return system.encode_visual(params, visual, config=config)[:, 0]

  def encode(image_AYXC: np.ndarray) -> np.ndarray:
    parts = []
    for start in range(0, len(image_AYXC), batch_size):
      part_MYXC = image_AYXC[start : start + batch_size]
      missing = batch_size - len(part_MYXC)
      image_BYXC = np.pad(part_MYXC, ((0, missing), *[(0, 0)] * 3))
      state_BP = np.asarray(states(weights.params, image_BYXC), np.float32)
      parts.append(state_BP[: len(part_MYXC)])
    return np.concatenate(parts)

  return scenes.Encoder(
    encode=encode,
    size=config.model.vision.image_size,
    width=config.model.vision.width,
    sha256=weights_lib.params_sha256(weights.params),
    about={
      "system": config.system,
      "step": weights.step,
      "lineage": weights.lineage,
    },
  )
