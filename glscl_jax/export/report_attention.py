"""The report on where each word of a caption looks."""

from __future__ import annotations

from collections.abc import Sequence

from glscl_jax.data import sources
from glscl_jax.export import (
  attention,
  page,
  pictures,
  selection,
)
from glscl_jax.export.weights import Weights, name_arrays
from glscl_jax.systems import registry

FULL_RED = 4  # times even attention, at least

MAX_WORDS = 6  # of a caption whose attention is shown


def maps(
  weights: Weights,
  data_dir: str,
  splits: Sequence[str],
  options: selection.Options,
) -> str:
  """Attention maps of each word of some held-out captions."""
  if registry.find(weights.config).cross_attention is None:
    return ""
  if not _attends(weights):
    return page.absent(
      "Where each word looks",
      "no objective of this run uses the fusion of text with image.",
    )
  split = selection.choose_split(data_dir, splits)
  found = attention.attend(
    weights,
    attention.choose(
      sources.open_source(data_dir, split),
      count=options.num_maps,
      max_words=MAX_WORDS,
      seed=options.seed,
    ),
  )
  rows = "".join(_attention_row(example) for example in found)
  return (
    "<section><h2>Where each word looks</h2><p>Text-to-image attention of "
    "the last fusion layer: strongest head, mean over the pieces of a word, "
    "without the class token. Split: "
    f"{page.text(selection.cell_title(split))}; captions of "
    f"two to {MAX_WORDS} words, drawn at random (seed {options.seed}). The "
    "number is the largest value of a word as a multiple of even attention; "
    "full red is the largest value of the drawing, at least "
    f"{FULL_RED:g}x.</p>"
    f'<div class="maps">{rows}</div></section>'
  )


def _attends(weights: Weights) -> bool:
  """Whether the last fusion layer has parameters of its text stream."""
  part = registry.find(weights.config).attention_part
  return part is not None and any(
    name.startswith(f"{part}.") for name in name_arrays(weights.params)
  )


def _attention_row(found: attention.Attention) -> str:
  # What every patch gets when patches and class token share evenly.
  even = 1 / (found.maps_WGG[0].size + 1)
  top = max(float(found.maps_WGG.max()), FULL_RED * even)
  tiles = []
  for word, map_GG in zip(found.words, found.maps_WGG, strict=True):
    picture = pictures.overlay(
      found.image_YXC, map_GG, top=top, size=2 * page.THUMBNAIL
    )
    tiles.append(
      f"<figure>{page.image(pictures.png(picture), 'png', word, 'thumb')}"
      f"<figcaption><b>{page.text(word)}</b> {map_GG.max() / even:.1f}x"
      "</figcaption></figure>"
    )
  drawing = page.thumbnail(found.image_YXC, " ".join(found.words))
  return (
    f'<div class="row"><figure>{drawing}<figcaption>drawing</figcaption>'
    f"</figure>{''.join(tiles)}</div>"
  )
