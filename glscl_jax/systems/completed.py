"""Hidden patches completed from a text, for the report."""

from __future__ import annotations

import dataclasses

import jax

from glscl_jax.config import Config
from glscl_jax.objectives import masked_regression
from glscl_jax.systems import inputs


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Completed:
  """What a system predicts where it does not see an image."""

  hidden_BJ: jax.Array  # patch numbers
  pixel_BJP: jax.Array  # as the encoder sees pixels: after mean and deviation
  error_B: jax.Array  # the objective of each image by itself


def compare(
  prediction_BJP: jax.Array,
  image_BYXC: jax.Array,
  hidden_BJ: jax.Array,
  config: Config,
) -> Completed:
  """The output of a pixel head beside the image it is to complete."""
  options = config.objectives
  target_BIP = inputs.pixel_targets(image_BYXC, config)
  error_BJ = masked_regression.patch_errors(
    prediction_BJP,
    target_BIP,
    hidden_BJ,
    loss=options.mim_loss,
    patch_norm=options.mim_patch_norm,
  )
  pixel_BJP = prediction_BJP
  if options.mim_patch_norm:
    pixel_BJP = masked_regression.restore_patches(
      prediction_BJP, target_BIP, hidden_BJ
    )
  return Completed(hidden_BJ, pixel_BJP, error_BJ.mean(axis=1))
