"""Forward FLOPs of SyCoCa, CoCa and CLIP for one sample."""

from __future__ import annotations

from glscl_jax.config import Config
from glscl_jax.models import flops
from glscl_jax.systems import sycoca
from glscl_jax.systems.flops import Forward


def captions(config: Config) -> int:
  """The caption decoder: all tokens but the last ask the kept patches."""
  width = config.model.fusion.width
  rows, keys = config.model.text.max_length - 1, config.model.vision.num_patches
  if config.masking.ic_mask:
    keys -= sycoca.count_split(config)[1]
  return config.model.fusion.text_depth * (
    flops.cross_block(rows, rows, keys, width) + flops.mlp(rows, width)
  )


def pixels(config: Config) -> int:
  """The image decoder: all patches, the last block only the hidden ones."""
  fusion, num_patches = config.model.fusion, config.model.vision.num_patches
  asked = config.model.text.max_length if fusion.mim_text else None

  def block(rows: int) -> int:
    if asked is not None:
      return flops.cross_block(rows, num_patches, asked, fusion.width)
    return flops.attention(rows, num_patches, fusion.width) + flops.mlp(
      rows, fusion.width
    )

  last = num_patches
  if fusion.restrict_last_layer:
    last = sycoca.count_split(config)[0]
  return (fusion.image_depth - 1) * block(num_patches) + block(last)


def scores(config: Config) -> int:
  """Which patches the caption speaks of: projections and similarities."""
  if not sycoca.needs_scores(config):
    return 0
  model = config.model
  patches, words = model.vision.num_patches, model.text.max_length
  return (patches + words) * flops.joint_projection(
    model.joint_projection, model.fusion.width, model.joint_width
  ) + flops.linear(patches, model.joint_width, words)


def heads(config: Config) -> int:
  """The heads of the active objectives."""
  model, width = config.model, config.model.fusion.width
  parts = {
    "itc": 2
    * flops.joint_projection(model.joint_projection, width, model.joint_width),
    "ic": flops.linear(model.text.max_length - 1, width, model.text.vocab_size),
    "tg_mim": flops.linear(
      sycoca.count_split(config)[0], width, 3 * model.vision.patch_size**2
    ),
  }
  return sum(parts[name] for name in config.objectives.active)


def forward(config: Config) -> Forward:
  """What `sycoca.loss` computes."""
  vision, text = config.model.vision, config.model.text
  decoders = {"ic": captions, "tg_mim": pixels}
  num_images = len(sycoca.image_versions(config))
  # A patch matrix serves both versions at once, a stem runs for each.
  embedded = num_images if vision.stem else 1
  return Forward(
    image=float(
      embedded * flops.embedding(vision)
      + num_images
      * flops.encoder(vision.width, vision.depth, 1 + vision.num_patches)
    ),
    text=float(
      sycoca.needs_text(config)
      * flops.encoder(text.width, text.depth, text.max_length + 1)
    ),
    fusion=float(
      sum(
        decoders[name](config)
        for name in config.objectives.active
        if name in decoders
      )
    ),
    heads=float(heads(config) + scores(config)),
    targets=float(scores(config)),
  )
