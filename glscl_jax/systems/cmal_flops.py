"""Forward FLOPs of CMAL for one sample, of a step that is drawn: the mean."""

from __future__ import annotations

from glscl_jax.config import Config
from glscl_jax.data import masking
from glscl_jax.models import flops
from glscl_jax.systems import cmal
from glscl_jax.systems.flops import Forward


def count_words(name: str, config: Config) -> int:
  """Slots that may carry a word's label, as many as a batch has."""
  mask, length = config.masking, config.model.text.max_length
  if cmal.find_pass(name, config).text == "amc":
    return masking.anchor_slots(
      length, rate=mask.mlm_rate, max_anchors=mask.max_anchors
    )
  return masking.mlm_slots(
    length,
    rate=mask.mlm_rate,
    whole_word=mask.mlm_whole_word,
    padded_draw=mask.mlm_padded_draw,
  )


def count_runs(tasks: tuple[str, ...], config: Config) -> float:
  """Passes through the stack, in batches; false pairs are half a batch."""
  found = {cmal.find_pass(name, config) for name in tasks if name != "itm"}
  if "itm" not in tasks:
    return len(found)
  return len(found) + (0.5 if cmal.CLEAN in found else 1.0)


def heads(name: str, config: Config) -> float:
  """What an objective reads its states with."""
  model, width = config.model, config.model.fusion.width
  region = model.region

  def word_head() -> int:
    rows = count_words(name, config)
    return flops.vocabulary_head(rows, width, model.text.vocab_size)

  def region_head() -> int:
    return flops.vocabulary_head(region.number, width, region.num_classes + 1)

  return {
    "amc": lambda: word_head() + region_head(),
    "mlm": word_head,
    "mrc": region_head,
    "mrfr": lambda: flops.vocabulary_head(
      region.number, width, region.feature_width
    ),
    "wrc": lambda: flops.linear(model.text.max_length, width, region.number),
    "itm": lambda: flops.linear(1, width, width) + flops.linear(1, width, 2),
  }[name]()


def compute(tasks: tuple[str, ...], config: Config) -> Forward:
  """A step that computes these objectives."""
  model, width = config.model, config.model.fusion.width
  regions, words = model.region.number, model.text.max_length
  passes = [cmal.find_pass(name, config) for name in tasks]
  own_regions, own_words = model.unimodal_layers
  num_regions = len({item.regions for item in passes})
  num_words = len({item.text for item in passes})
  judged = 1.5 if count_runs(tasks, config) % 1 else 1.0
  return Forward(
    image=float(
      flops.linear(regions, model.region.feature_width, width)
      + flops.linear(regions, 7, width)
      + num_regions * flops.encoder(width, own_regions, regions)
    ),
    text=float(num_words * flops.encoder(width, own_words, words)),
    fusion=float(
      count_runs(tasks, config)
      * flops.encoder(width, model.fusion.depth, words + regions)
    ),
    heads=float(
      sum(
        heads(name, config) * (judged if name == "itm" else 1.0)
        for name in tasks
      )
    ),
  )


def forward(config: Config) -> Forward:
  """What `cmal.loss` computes."""
  objectives = config.objectives
  if objectives.task_mix == "sum":
    return compute(objectives.active, config)
  weights = {name: getattr(objectives, name) for name in objectives.active}
  shares = {
    name: weight / sum(weights.values()) for name, weight in weights.items()
  }
  steps = {name: compute((name,), config) for name in shares}
  return Forward(
    **{
      part: sum(
        share * getattr(steps[name], part) for name, share in shares.items()
      )
      for part in ("image", "text", "fusion", "heads")
    }
  )
