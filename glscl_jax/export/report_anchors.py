"""The report on CMAL's anchors and swaps."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from glscl_jax import config as config_lib
from glscl_jax.data import sources
from glscl_jax.export import (
  anchor_pictures,
  page,
  pictures,
  selection,
)
from glscl_jax.export.weights import Weights, params_sha256
from glscl_jax.systems import registry
from glscl_jax.tasks import results


def anchors(
  workdir: pathlib.Path,
  weights: Weights,
  data_dir: str,
  splits: Sequence[str],
  options: selection.Options,
) -> str:
  """What stands in swapped slots: figures, and images with their anchors."""
  system, config = registry.find(weights.config), weights.config
  if system.answer is None:
    return ""
  title = "Anchors and swaps"
  if not system.answered(config):
    return page.absent(
      title, "no objective of this run asks for words or regions."
    )
  found = results.read(workdir / "eval" / "anchors" / results.METRICS)
  name = results.identify(data_dir).name
  if not options.splits and name in found["results"]:
    splits = selection.held_out(found["results"][name]) or splits
  split = selection.choose_split(data_dir, splits)
  source = sources.open_source(data_dir, split)
  scenes = anchor_pictures.make_scenes(
    weights,
    source,
    num_shown=options.num_maps,
    num_tried=options.num_measured,
    seed=options.seed,
  )
  if scenes:
    shown = (
      f"<h3>{page.text(selection.cell_title(split))}</h3>"
      f"<p>{page.text(_say_swap(config))} "
      f"Images with an anchor, drawn at random (seed {options.seed}).</p>"
      f'<div class="scenes">{"".join(map(_scene, scenes))}</div>'
    )
  else:
    shown = (
      f"<p>No image is shown: none of {min(options.num_measured, len(source))} "
      f"of {page.text(split)} has an anchor that this run asks for.</p>"
    )
  return (
    f"<section><h2>{page.text(title)}</h2>"
    "<p>An anchor is a word of the caption and a region of the image that "
    "name the same.</p>"
    f"{_anchor_table(found['results'], weights)}{shown}</section>"
  )


def _say_swap(config: config_lib.Config) -> str:
  """What the model of the pictures is shown, and asked."""
  masking, fields = config.masking, registry.find(config).answered(config)
  parts = ["Anchors have a colour each; other regions are grey."]
  if fields & {"words", "classes"}:
    parts.append(
      {
        "both": "The contents of an anchor's word and region change places; ",
        "text": "An anchor's word takes the content of its region; ",
        "image": "An anchor's region takes the content of its word; ",
        "none": "Nothing is swapped, anchors are hidden; ",
      }[masking.swap]
      + "beside it stands what the model says was there: the first token of "
      "the word, the class of the region. Other words and regions are masked "
      "as in training."
    )
  if "cosine_BTR" in fields:
    parts.append(
      "Bars, from -1 to 1: cosine of the word's state with those of the "
      "regions, nothing swapped or masked; the regions that the word names are "
      "green with a tick."
    )
  return " ".join(parts)


ANCHOR_COLUMNS = {
  "word_accuracy": "word, swapped",
  "masked_word_accuracy": "word, masked",
  "class_accuracy": "class, swapped",
  "masked_class_accuracy": "class, hidden",
  "pair_accuracy": "nearest region",
}


def _anchor_table(found: Mapping[str, Any], weights: Weights) -> str:
  if not found:
    return "<p>Not measured: launch/evaluate.py --task=anchors was not run.</p>"
  head = "".join(f"<th>{title}</th>" for title in ANCHOR_COLUMNS.values())
  rows, stale, fingerprint = [], False, params_sha256(weights.params)
  for name, measured in sorted(found.items()):
    for split in selection.in_order(measured):
      for entry in measured[split].values():
        stale = stale or entry["lineage"]["params_sha256"] != fingerprint
        cells = "".join(_anchor_cell(entry, name) for name in ANCHOR_COLUMNS)
        rows.append(
          f"<tr><td>{page.text(selection.cell_title(split))}"
          f"<small>{page.text(name)}, {entry['num_samples']:,} images, "
          f"{page.text(_per_sample(entry))}<br>"
          f"{page.text(entry['lineage']['regime'])}, step "
          f"{entry['lineage']['step']:,}</small></td>{cells}</tr>"
        )
  note = (
    '<p class="warning">Some results are of other weights than those of '
    "this page; run launch/evaluate.py --task=anchors again.</p>"
    if stale
    else ""
  )
  return (
    f'{note}<div class="wide"><table class="numbers anchored"><tr><th>split'
    f"</th>{head}</tr>{''.join(rows)}</table></div><p>Right answers in "
    "percent, of first captions. Small: for words and classes what always "
    "giving the commonest right answer would reach, for the nearest region "
    "what a random one would; n: slots or words asked. Ties count against the "
    "model.</p>"
  )


def _per_sample(entry: Mapping[str, Any]) -> str:
  name = "anchors_per_sample"
  if name not in entry["metrics"]:
    return "no anchors asked"
  return f"{entry['metrics'][name]:.2f} anchors an image"


def _anchor_cell(entry: Mapping[str, Any], name: str) -> str:
  if name not in entry["metrics"]:
    return "<td>not asked</td>"
  return (
    f"<td>{100 * entry['metrics'][name]:.1f}<small>"
    f"{100 * entry['chance'][name]:.1f}; n = {entry['counts'][name]:,}"
    "</small></td>"
  )


def _scene(scene: anchor_pictures.Scene) -> str:
  caption = " ".join(
    page.text(word)
    if number is None
    else f'<b style="{_underline(number)}">{page.text(word)}</b>'
    for word, number in scene.words
  )
  rows = "".join(
    f'<div class="anchor"><b style="{_underline(i)}">{page.text(anchor.phrase)}'
    f"</b>{_said('word', anchor.word)}{_said('class', anchor.classed)}"
    f"{_bars(anchor, scene)}</div>"
    for i, anchor in enumerate(scene.anchors)
  )
  picture = page.image(pictures.png(scene.image_YXC), "png", "regions", "boxes")
  return f"<div><h4>{caption}</h4><div>{picture}{rows}</div></div>"


def _underline(number: int) -> str:
  return f"border-bottom: 3px solid {pictures.anchor_colour(number)}"


def _said(title: str, answer: anchor_pictures.Answer | None) -> str:
  if answer is None:
    return ""
  own = "" if answer.right else f" <i>is: {page.text(answer.own)}</i>"
  kind = "right" if answer.right else "wrong"
  return (
    f'<span>{title} <q class="{kind}">{page.text(answer.said)}</q>{own}</span>'
  )


def _bars(anchor: anchor_pictures.Anchor, scene: anchor_pictures.Scene) -> str:
  rows = "".join(
    f'<li{page.right({"match": near.named})}><u style="width: '
    f'{30 * (1 + near.cosine):.0f}px"></u>{near.cosine:.2f} '
    f"<small>{near.region + 1} "
    f"{page.text(scene.classes[near.region])}</small></li>"
    for near in anchor.near
  )
  return f'<ul class="bars">{rows}</ul>' if rows else ""
