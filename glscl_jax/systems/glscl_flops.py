"""Forward FLOPs of SCL and GLSCL for one sample: each version and pass once."""

from __future__ import annotations

import dataclasses

from glscl_jax.config import Config, ObjectiveConfig
from glscl_jax.data import masking
from glscl_jax.models import flops
from glscl_jax.systems import glscl, views
from glscl_jax.systems.flops import Forward


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
  """Tokens of each version, and how many rows each row name stands for."""

  image: dict[str, int]
  text: int
  text_rows: dict[str, int]
  image_rows: dict[str, int]


def make_sizes(config: Config) -> Sizes:
  """What the data pipeline makes for this configuration."""
  num_patches = config.model.vision.num_patches
  mask, length = config.masking, config.model.text.max_length
  full = 1 + num_patches
  return Sizes(
    image={
      "full": full,
      "itm": full,
      "token": full,
      "drop": 1 + masking.num_kept(num_patches, mask.image_drop_ratio),
    },
    text=length,
    text_rows={
      "class": 1,
      "mlm": masking.mlm_slots(
        length,
        rate=mask.mlm_rate,
        whole_word=mask.mlm_whole_word,
        padded_draw=mask.mlm_padded_draw,
      ),
      "scl": masking.completion_slots(
        length,
        rate=mask.completion_text_rate,
        with_replacement=mask.text_mask_with_replacement,
      ),
    },
    image_rows={
      "class": 1,
      "token": masking.num_hidden(num_patches, mask.image_token_ratio),
    },
  )


def image_encoding(config: Config, tokens: int) -> int:
  """One version of an image, without its patch embedding."""
  vision = config.model.vision
  return flops.encoder(vision.width, vision.depth, tokens) + flops.linear(
    tokens, vision.width, config.model.fusion.width
  )


def text_encoding(config: Config) -> int:
  """One version of a text."""
  text = config.model.text
  return flops.encoder(text.width, text.depth, text.max_length) + flops.linear(
    text.max_length, text.width, config.model.fusion.width
  )


def forward(config: Config) -> Forward:
  """What `glscl.loss` computes."""
  model, objectives = config.model, config.objectives
  sizes, plan = make_sizes(config), glscl.make_plan(objectives)
  versions = [name for name in plan.image_versions if name != "itm"]
  # A patch matrix serves all versions at once, a stem runs for each.
  image = float(
    flops.embedding(model.vision) * (len(versions) if model.vision.stem else 1)
  ) + sum(image_encoding(config, sizes.image[name]) for name in versions)
  if "itm" in plan.image_versions and objectives.itm_negatives == "dataset":
    group = min(objectives.neg_group, config.data.batch_size)
    false_share = (group - group // 2) / group
    image += false_share * (
      flops.embedding(model.vision) + image_encoding(config, sizes.image["itm"])
    )
  fusion = targets = 0.0
  trained = trained_streams(objectives)
  for fused in plan.passes:
    image_length = sizes.image[fused.image]
    fusion += (model.fusion.depth - 1) * flops.co_attention(
      sizes.text, image_length, model.fusion.width
    )
    streams = last_layer(
      config,
      image_length,
      text_rows=sum(sizes.text_rows[name] for name in plan.text_rows[fused]),
      image_rows=sum(sizes.image_rows[name] for name in plan.image_rows[fused]),
    )
    fusion += sum(streams.values())
    targets += sum(
      count
      for stream, count in streams.items()
      if (fused, stream) not in trained
    )
  return Forward(
    image=image,
    text=float(len(plan.text_versions) * text_encoding(config)),
    fusion=fusion,
    heads=heads(config, mlm_rows=sizes.text_rows["mlm"]),
    targets=targets,
  )


def trained_streams(
  objectives: ObjectiveConfig,
) -> frozenset[tuple[views.Pass, str]]:
  """Streams of passes that some active objective reads with a gradient."""
  reads = glscl.objective_reads(objectives)
  return frozenset(
    (read.fused, stream)
    for name in objectives.active
    for read in reads[name]
    for stream, rows in (("text", read.text_rows), ("image", read.image_rows))
    if rows and not read.target
  )


def last_layer(
  config: Config, image_length: int, *, text_rows: int, image_rows: int
) -> dict[str, int]:
  """The last fusion layer of one pass by stream, for the rows it computes.

  A stream of which no row is read is not computed at all.
  """
  text_length, width = config.model.text.max_length, config.model.fusion.width
  if not config.model.fusion.restrict_last_layer:
    text_rows = text_length if text_rows else 0
    image_rows = image_length if image_rows else 0
  return {
    "text": flops.cross_block(text_rows, text_length, image_length, width),
    "image": flops.cross_block(image_rows, image_length, text_length, width),
  }


def heads(config: Config, *, mlm_rows: int) -> float:
  """The heads of the active objectives; completion losses have none."""
  model, width = config.model, config.model.fusion.width
  parts = {
    "mlm": flops.vocabulary_head(mlm_rows, width, model.text.vocab_size),
    "itm": flops.match_head(width),
    "itc": 2
    * flops.joint_projection(model.joint_projection, width, model.joint_width),
  }
  active = config.objectives.active
  return float(sum(parts[name] for name in parts if name in active))
