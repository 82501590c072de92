"""The report on completed patches and words."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from glscl_jax.data import sources
from glscl_jax.export import (
  page,
  pictures,
  reconstruction,
  report_run,
  selection,
)
from glscl_jax.export.weights import Weights
from glscl_jax.systems import registry


def patches(
  weights: Weights,
  data_dir: str,
  splits: Sequence[str],
  options: selection.Options,
) -> str:
  """Masked images, completed from their own captions and from others."""
  system, config = registry.find(weights.config), weights.config
  name = system.patch_objective
  if name not in config.objectives.active:
    return ""
  title = "What stands in the hidden patches"
  split = selection.choose_split(data_dir, splits)
  examples = reconstruction.choose(
    sources.open_source(data_dir, split),
    count=options.num_measured,
    seed=options.seed,
  )
  if len({example.captions[0] for example in examples}) < 2:
    return page.absent(title, f"{split} has no two captions to compare.")
  found = reconstruction.complete(
    weights, examples, num_shown=options.num_maps, seed=options.seed
  )
  rows = "".join(_patch_row(one) for one in found.shown)
  note = (
    "The model predicts a patch up to its brightness and contrast, which are "
    "taken from the drawing. "
    if config.objectives.mim_patch_norm
    else ""
  )
  errors = _compare_errors(found, report_run.CURVES[name])
  return (
    f"<section><h2>{page.text(title)}</h2>"
    "<p>Pixels of hidden patches, predicted from the patches that are left "
    "and a caption: the drawing's own one, and for comparison that of another "
    "drawing, with the same patches hidden: "
    f"{page.text(system.describe_hidden(config))}. {note}"
    f"Split: {page.text(selection.cell_title(split))}; drawn at random (seed "
    f"{options.seed}).</p><p>{page.text(errors)}</p>"
    f'<div class="patches">{rows}</div></section>'
  )


def _compare_errors(found: reconstruction.Completions, title: str) -> str:
  """The numbers behind the pictures, with standard errors."""
  own_A, other_A = found.error_A, found.other_error_A
  count, gain_A = len(own_A), other_A - own_A
  if not gain_A.any():
    return (
      f"{title} over {count:,} drawings: {own_A.mean():.4f}, whatever the "
      "caption; it is not read."
    )
  share = float(np.mean(gain_A > 0))
  error = float(np.std(gain_A)) / count**0.5
  return (
    f"{title} over {count:,} drawings: {own_A.mean():.4f} from the own "
    f"caption, {other_A.mean():.4f} from another one; difference "
    f"{gain_A.mean():.4f}, "
    f"standard error {error:.4f}. From the own caption it is lower for "
    f"{100 * share:.0f} % of the drawings, standard error "
    f"{100 * (share * (1 - share) / count) ** 0.5:.0f} %."
  )


def _patch_row(found: reconstruction.Completion) -> str:
  image_YXC, hidden_I = found.image_YXC, found.hidden_I
  tiles = {
    "which are hidden": pictures.mark(image_YXC, hidden_I),
    "what is seen": pictures.hide(image_YXC, hidden_I),
    "from its caption": found.by_caption_YXC,
    f"from: {found.other}": found.by_other_YXC,
    "drawing": image_YXC,
  }
  figures = "".join(
    f"<figure>{page.thumbnail(tile_YXC, label)}"
    f"<figcaption>{page.text(label)}</figcaption></figure>"
    for label, tile_YXC in tiles.items()
  )
  return (
    f"<div><h4>{page.text(found.caption)}</h4>"
    f'<div class="row">{figures}</div></div>'
  )


def words(
  weights: Weights,
  data_dir: str,
  splits: Sequence[str],
  options: selection.Options,
) -> str:
  """Masked words as guessed with the image and without it."""
  system, config = registry.find(weights.config), weights.config
  if system.word_objective not in config.objectives.active:
    return ""
  split = selection.choose_split(data_dir, splits)
  examples = reconstruction.choose(
    sources.open_source(data_dir, split),
    count=options.num_measured,
    seed=options.seed,
  )
  title = "What stands in the place of masked words"
  if not examples:
    return page.absent(title, f"{split} has no captions.")
  found = reconstruction.guess(
    weights, examples, num_shown=options.num_maps, seed=options.seed
  )
  rows = "".join(_word_row(one) for one in found.shown)
  return (
    f"<section><h2>{page.text(title)}</h2><p>The "
    f"{reconstruction.TOP} likeliest tokens at masked places, with the drawing "
    "and with a blank image of the mean colour. Right ones are green with a "
    f"tick. Split: {page.text(selection.cell_title(split))}; drawn at random "
    "(seed "
    f"{options.seed}).</p><p>The likeliest token is right for "
    f"{100 * found.by_image:.1f} % of {found.num_words:,} masked tokens with "
    f"the drawing, for {100 * found.by_blank:.1f} % without.</p>"
    f'<div class="i2t">{rows}</div></section>'
  )


def _word_row(found: reconstruction.MaskedText) -> str:
  lists = "".join(
    f"<p>with the drawing</p>{_guesses(one.by_image)}"
    f"<p>without</p>{_guesses(one.by_blank)}"
    for one in found.guesses
  )
  return (
    f'<div class="query">{page.thumbnail(found.image_YXC, "drawing")}'
    f"<div><h4>{page.text(' '.join(found.pieces))}</h4>{lists}</div></div>"
  )


def _guesses(guesses: Sequence[reconstruction.Candidate]) -> str:
  items = "".join(
    f"<li{page.right({'match': one.right})}>{page.text(one.name)}"
    f"<i>{one.probability:.2f}</i></li>"
    for one in guesses
  )
  return f"<ol>{items}</ol>"
