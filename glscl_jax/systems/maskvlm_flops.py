"""Forward FLOPs of MaskVLM for one sample: each version and pair once."""

from __future__ import annotations

from glscl_jax.config import Config
from glscl_jax.data import masking
from glscl_jax.models import flops
from glscl_jax.systems import maskvlm
from glscl_jax.systems.flops import Forward


def masked_rows(config: Config) -> tuple[int, int]:
  """Masked words and hidden patches of a sample."""
  vision, mask = config.model.vision, config.masking
  words = masking.mlm_slots(
    config.model.text.max_length,
    rate=mask.mlm_rate,
    whole_word=mask.mlm_whole_word,
    padded_draw=mask.mlm_padded_draw,
  )
  patches = masking.num_block_patches(
    vision.image_size,
    vision.patch_size,
    block_size=mask.image_block_size,
    ratio=mask.image_block_ratio,
  )
  return words, patches


def stack(
  config: Config, depth: int, length: int, context: int, *, rows: int
) -> int:
  """One pass of a cross-attention stack of which `rows` are read."""
  width = config.model.fusion.width
  if not config.model.fusion.restrict_last_layer:
    rows = length
  return (depth - 1) * flops.cross_block(
    length, length, context, width
  ) + flops.cross_block(rows, length, context, width)


def fusion(config: Config) -> int:
  """g_text, g_image and the decoder, for the active objectives."""
  sizes, active = config.model.fusion, config.objectives.active
  words, patches = masked_rows(config)
  text, num_patches = (
    config.model.text.max_length,
    config.model.vision.num_patches,
  )
  image = 1 + num_patches
  total = 0
  if "mlm" in active:
    total += stack(config, sizes.text_depth, text, image, rows=words)
  if "mim" in active:
    total += stack(config, sizes.image_depth, image, text, rows=num_patches)
    total += stack(config, sizes.decoder_depth, num_patches, text, rows=patches)
  if "itm" in active:
    total += len(maskvlm.ITM_PAIRS) * (
      stack(config, sizes.text_depth, text, image, rows=1)
      + stack(config, sizes.image_depth, image, text, rows=1)
    )
  return total


def heads(config: Config) -> int:
  """The heads of the active objectives."""
  model, width = config.model, config.model.fusion.width
  words, patches = masked_rows(config)
  features = 2 * width if model.match_features == "concat" else width
  parts = {
    "mlm": flops.vocabulary_head(words, width, model.text.vocab_size),
    "mim": flops.linear(patches, width, 3 * model.vision.patch_size**2),
    "itm": len(maskvlm.ITM_PAIRS) * flops.linear(1, features, 2),
    "itc": 2
    * flops.joint_projection(model.joint_projection, width, model.joint_width),
  }
  return sum(parts[name] for name in config.objectives.active)


def forward(config: Config) -> Forward:
  """What `maskvlm.loss` computes."""
  vision, text = config.model.vision, config.model.text
  num_images = len(maskvlm.image_versions(config))
  num_texts = len(maskvlm.text_versions(config))
  # A patch matrix serves all versions at once, a stem runs for each.
  embedded = num_images if vision.stem else 1
  return Forward(
    image=float(
      embedded * flops.embedding(vision)
      + num_images
      * flops.encoder(vision.width, vision.depth, 1 + vision.num_patches)
    ),
    text=float(
      num_texts * flops.encoder(text.width, text.depth, text.max_length)
    ),
    fusion=float(fusion(config)),
    heads=float(heads(config)),
  )
