"""The contracts between folders, and the legend of shape letters.

Every array of known rank ends in `_` and one capital per dimension; a digit
is a fixed size. Letters name logical dimensions, never the sharded layout.

  B batch (global)   I image tokens      T text tokens     L any sequence
  M other sequence   Q rows asked for    D model width     H heads
  K head width       F mlp width         V vocabulary      E joint space
  N layers           Y, X image rows, columns   C colour   R regions
  J masked items     G group             A any             W words
  P values of a patch or of a region

M also counts the ids of a pair.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax

Params = Any  # nested dict of arrays
BATCH_AXES = ("data", "fsdp")  # of the mesh, over which the samples are spread


def sample_axes() -> tuple[tuple[str, ...], int]:
  """Axes of the mesh in jax's context that hold samples, and their devices.

  No axes and one device without a mesh.
  """
  mesh = jax.sharding.get_abstract_mesh()
  axes = tuple(axis for axis in BATCH_AXES if axis in mesh.axis_names)
  return axes, math.prod(mesh.shape[axis] for axis in axes)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
  """One global batch. Every mask is an array made by the data pipeline.

  Index masks are (B, J) int32 with a boolean `_ok` twin of static J; slots
  that are not `ok` hold index 0 and count for nothing. Ratio masks of images
  hold exact counts and need no `ok`.
  """

  image_BYXC: jax.Array | None = None  # uint8; normalised on the device
  identity_BM: jax.Array  # int32; rows that agree in any column show the same,
  # see data.identity and objectives.same_image
  text_ids_BT: jax.Array  # int32
  text_valid_BT: jax.Array  # bool; True where a token (or special) stands
  mlm_ids_BT: jax.Array | None = None  # T_mlm
  mlm_pos_BJ: jax.Array | None = None  # positions that carry a label
  mlm_labels_BJ: jax.Array | None = None  # original ids there
  mlm_ok_BJ: jax.Array | None = None
  scl_ids_BT: jax.Array | None = None  # T_40
  scl_pos_BJ: jax.Array | None = None  # positions hidden in T_40
  scl_ok_BJ: jax.Array | None = None
  keep_idx_BI: jax.Array | None = None  # patches kept in I~80
  tok_idx_BI: jax.Array | None = None  # patches replaced in I~30
  block_idx_BI: jax.Array | None = None  # patches replaced for MIM, ascending
  itm_labels_B: jax.Array | None = None  # data-set negatives only: 1 = own
  false_image_BYXC: jax.Array | None = None  # data-set negatives only
  # CMAL reads regions in place of the image. Slots of padding are not valid.
  region_BRP: jax.Array | None = None  # float32, features
  box_BR7: jax.Array | None = None  # float32; x1, y1, x2, y2, w, h, w h, of 1
  region_valid_BR: jax.Array | None = None
  region_class_BR: jax.Array | None = None  # int32; 0, background, is no target
  anchor_pos_BA: jax.Array | None = None  # first token of the word that is
  anchor_region_BA: jax.Array | None = None  # swapped with this region
  anchor_ok_BA: jax.Array | None = None
  amc_ids_BT: jax.Array | None = None  # text of AMC: other words are masked,
  # and what an anchor's word has besides its first token; with masking.swap
  # "none" that token too
  amc_pos_BJ: jax.Array | None = None  # anchors' first tokens, masked tokens
  amc_labels_BJ: jax.Array | None = None
  amc_ok_BJ: jax.Array | None = None
  amc_region_BJ: jax.Array | None = None  # regions of anchors, regions hidden
  amc_region_ok_BJ: jax.Array | None = None
  hidden_region_BR: jax.Array | None = None  # bool: the mask vector's; with
  # masking.swap "none" anchors' regions too, else none of them
  pair_pos_BA: jax.Array | None = None  # WRC: every word and region that match
  pair_region_BA: jax.Array | None = None
  pair_ok_BA: jax.Array | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Visual:
  """What is seen beside a text: the pixels of images, or regions instead.

  Names and types are those of Batch.
  """

  image_BYXC: jax.Array | None = None
  region_BRP: jax.Array | None = None
  box_BR7: jax.Array | None = None
  region_valid_BR: jax.Array | None = None

  @property
  def valid(self) -> jax.Array | None:
    """Which of its states count, (B, M) bool; None: all, as of pixels."""
    return self.region_valid_BR


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LossOutput:
  """A scalar to minimise and scalars to log."""

  loss: jax.Array
  metrics: dict[str, jax.Array]
