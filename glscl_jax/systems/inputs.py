"""What every system does with a batch before it encodes it."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from glscl_jax.config import Config
from glscl_jax.data import masking
from glscl_jax.models import products, stem, vision
from glscl_jax.systems import views
from glscl_jax.types import Batch, Visual


def see_images(batch: Batch) -> Visual:
  """What a system of images sees of a batch."""
  return Visual(image_BYXC=batch.image_BYXC)


def see_regions(batch: Batch) -> Visual:
  """What a system of regions sees of a batch."""
  return Visual(
    region_BRP=batch.region_BRP,
    box_BR7=batch.box_BR7,
    region_valid_BR=batch.region_valid_BR,
  )


def standardize_images(image_BYXC: jax.Array, config: Config) -> jax.Array:
  """uint8 to float32 (x / 255 - mean) / std; floats are so already."""
  if jnp.issubdtype(image_BYXC.dtype, jnp.floating):
    return image_BYXC.astype(jnp.float32)
  mean_111C = jnp.asarray(config.data.mean, jnp.float32)[None, None, None]
  std_111C = jnp.asarray(config.data.std, jnp.float32)[None, None, None]
  unit_BYXC = image_BYXC.astype(jnp.float32) / 255.0
  return (unit_BYXC - mean_111C) / std_111C


def normalize_images(image_BYXC: jax.Array, config: Config) -> jax.Array:
  """`standardize_images`, of the type that travels between products."""
  dtype = products.activation_dtype(config.model.compute_dtype)
  return standardize_images(image_BYXC, config).astype(dtype)


def embed_versions(
  encoder: vision.VisionEncoder,
  image_BYXC: jax.Array,
  visible: Mapping[str, jax.Array | None],
) -> dict[str, jax.Array]:
  """Patch embeddings of each version of the images, (B, I, D).

  A patch matrix sees one patch at a time: all versions share one embedding. A
  convolution stem runs once a version, without the pixels hidden there.

  Args:
    encoder: whose `embed` is called.
    image_BYXC: normalised.
    visible: version -> (B, I) bool, which patches it shows; None: all.
  """
  sizes = encoder.config.vision
  if not sizes.stem:
    return dict.fromkeys(visible, encoder.embed(image_BYXC))

  def without_hidden(visible_BI: jax.Array | None) -> jax.Array:
    if visible_BI is None:
      return image_BYXC
    return stem.blank(image_BYXC, visible_BI, sizes.patch_size)

  return views.batch_by_shape(
    encoder.embed,
    {name: (without_hidden(shown),) for name, shown in visible.items()},
  )


def pixel_targets(image_BYXC: jax.Array, config: Config) -> jax.Array:
  """The patches of the image as the encoder sees it, float32, (B, I, P)."""
  return vision.patchify(
    standardize_images(image_BYXC, config), config.model.vision.patch_size
  )


def example_batch(config: Config) -> Batch:
  """A batch of two samples with the shapes of the real one, all zeros."""
  image, text, mask = config.model.vision, config.model.text, config.masking
  region = config.model.region
  num_kept = masking.num_kept(image.num_patches, mask.image_drop_ratio)
  num_tok = masking.num_hidden(image.num_patches, mask.image_token_ratio)
  num_block = masking.num_block_patches(
    image.image_size,
    image.patch_size,
    block_size=mask.image_block_size,
    ratio=mask.image_block_ratio,
  )
  size = image.image_size
  ids_BT = jnp.zeros((2, text.max_length), jnp.int32)
  valid_BT = jnp.ones((2, text.max_length), bool)
  pos_BJ = jnp.zeros((2, 1), jnp.int32)
  ok_BJ = jnp.ones((2, 1), bool)
  class_BR = jnp.ones((2, region.number), jnp.int32)
  image_BYXC = jnp.zeros((2, size, size, 3), jnp.uint8)
  return Batch(
    image_BYXC=image_BYXC,
    identity_BM=jnp.arange(2, dtype=jnp.int32)[:, None],
    text_ids_BT=ids_BT,
    text_valid_BT=valid_BT,
    mlm_ids_BT=ids_BT,
    mlm_pos_BJ=pos_BJ,
    mlm_labels_BJ=pos_BJ,
    mlm_ok_BJ=ok_BJ,
    scl_ids_BT=ids_BT,
    scl_pos_BJ=pos_BJ,
    scl_ok_BJ=ok_BJ,
    keep_idx_BI=jnp.zeros((2, num_kept), jnp.int32),
    tok_idx_BI=jnp.zeros((2, num_tok), jnp.int32),
    block_idx_BI=jnp.zeros((2, num_block), jnp.int32),
    itm_labels_B=jnp.array([0, 1], jnp.int32),
    false_image_BYXC=image_BYXC,
    region_BRP=jnp.zeros((2, region.number, region.feature_width)),
    box_BR7=jnp.zeros((2, region.number, 7)),
    region_valid_BR=class_BR > 0,
    region_class_BR=class_BR,
    anchor_pos_BA=pos_BJ,
    anchor_region_BA=pos_BJ,
    anchor_ok_BA=ok_BJ,
    amc_ids_BT=ids_BT,
    amc_pos_BJ=pos_BJ,
    amc_labels_BJ=pos_BJ,
    amc_ok_BJ=ok_BJ,
    amc_region_BJ=pos_BJ,
    amc_region_ok_BJ=ok_BJ,
    hidden_region_BR=class_BR > 1,
    pair_pos_BA=pos_BJ,
    pair_region_BA=pos_BJ,
    pair_ok_BA=ok_BJ,
  )
