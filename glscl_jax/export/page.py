"""Pieces of the report's HTML: figures, pictures, the page around them."""

from __future__ import annotations

import base64
import html
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from glscl_jax.data import transforms
from glscl_jax.export import pictures
from glscl_jax.export.weights import Weights

THUMBNAIL = 84  # pixels a side


def right(item: Mapping[str, Any]) -> str:
  """The class of what is marked as right; empty for the rest."""
  return ' class="right"' if item["match"] else ""


def absent(title: str, why: str) -> str:
  """A section that says why there is nothing to show."""
  return (
    f"<section><h2>{text(title)}</h2><p>Not shown: {text(why)}</p></section>"
  )


def figure(content: str, caption: str) -> str:
  """HTML with a caption below."""
  return f"<figure>{content}<figcaption>{text(caption)}</figcaption></figure>"


def thumbnail(image_YXC: np.ndarray, label: str) -> str:
  """A small picture."""
  # Twice the size shown, for fine screens.
  small = transforms.resize(image_YXC, size=2 * THUMBNAIL)
  return image(pictures.png(small), "png", label, "thumb")


def image(data: bytes, kind: str, label: str, css: str) -> str:
  """A picture inside the page; `kind` as in its media type."""
  content = base64.b64encode(data).decode()
  return (
    f'<img class="{css}" alt="{text(label)}" '
    f'src="data:image/{kind};base64,{content}">'
  )


def text(value: Any) -> str:
  """What HTML needs to show it as it is."""
  return html.escape(str(value))


def whole(
  workdir: pathlib.Path, weights: Weights, blocks: Sequence[str]
) -> str:
  """The document: all sections, styled."""
  title = f"{weights.config.system} / {pathlib.Path(workdir).absolute().name}"
  return (
    '<!doctype html><html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
    f"<title>{text(title)}</title><style>{STYLE}</style></head><body><main>"
    f"<h1>{text(title)}</h1><p class=lead>Image-text pre-training, step "
    f"{weights.step:,}</p>{''.join(blocks)}</main></body></html>\n"
  )


STYLE = f"""
:root {{ color-scheme: light; }}
body {{ margin: 0; background: #fff; color: #1f2933;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Arial, sans-serif; }}
main {{ max-width: 1060px; margin: 0 auto; padding: 32px 24px 64px; }}
h1 {{ font-size: 26px; font-weight: 600; margin: 0; }}
h2 {{ font-size: 19px; font-weight: 600; margin: 44px 0 10px;
  padding-top: 18px; border-top: 1px solid #e4e7eb; }}
h3 {{ font-size: 15px; font-weight: 600; margin: 22px 0 8px; }}
h4 {{ font-size: 14px; font-weight: 600; margin: 0 0 6px; }}
p {{ margin: 6px 0 12px; max-width: 76ch; }}
.lead, small, figcaption {{ color: #616e7c; }}
small {{ display: block; font-weight: 400; font-size: 12px; }}
figure {{ margin: 0; }}
figcaption {{ font-size: 12.5px; max-width: 92ch; }}
.chart {{ max-width: 100%; height: auto; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: 13.5px; }}
th, td {{ text-align: left; vertical-align: top; padding: 4px 12px 4px 0; }}
.facts th {{ color: #616e7c; font-weight: 400; white-space: nowrap; }}
.numbers {{ margin-top: 14px; width: 100%; }}
.numbers th {{ font-weight: 600; border-bottom: 1px solid #cbd2d9; }}
.numbers td {{ border-bottom: 1px solid #e4e7eb; }}
.numbers td:nth-last-child(-n+8), .numbers tr:nth-child(2) th {{
  text-align: right; font-variant-numeric: tabular-nums; }}
.chance td {{ color: #616e7c; }}
.warning {{ background: #fff8e1; padding: 8px 12px; }}
.thumb {{ width: {THUMBNAIL}px; height: {THUMBNAIL}px; display: block;
  background: #fff; border-radius: 4px; }}
.i2t, .t2i {{ display: grid; gap: 18px 28px;
  grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); }}
.t2i {{ grid-template-columns: repeat(auto-fill, minmax(500px, 1fr)); }}
.i2t .query {{ display: flex; gap: 16px; }}
.i2t .query > div {{ flex: 1; }}
ol {{ margin: 0; padding-left: 22px; font-size: 13.5px; }}
ol i {{ font-style: normal; color: #9aa5b1; font-size: 12px;
  margin-left: 8px; font-variant-numeric: tabular-nums; }}
li.right {{ color: #0b6e3a; font-weight: 600; }}
li.right::after {{ content: " \\2713"; }}
.row {{ display: flex; flex-wrap: wrap; gap: 8px; }}
.t2i .thumb {{ width: 66px; height: 66px; }}
.row figure {{ padding: 3px; border: 2px solid #e4e7eb; border-radius: 7px; }}
.row figure.right {{ border-color: #17924f; }}
.row figure.missed {{ border: 2px dashed #9aa5b1; margin-left: 8px; }}
.row figcaption {{ text-align: center; max-width: {THUMBNAIL}px;
  overflow-wrap: anywhere; line-height: 1.3; padding-top: 2px; }}
.row figure.right figcaption {{ color: #0b6e3a; font-weight: 600; }}
.row figure.right figcaption::after {{ content: " \\2713"; }}
.maps {{ display: grid; gap: 14px 28px;
  grid-template-columns: repeat(auto-fill, minmax(500px, 1fr)); }}
.maps .row figure {{ border-color: transparent; }}
.patches {{ display: grid; gap: 18px 28px;
  grid-template-columns: repeat(auto-fill, minmax(500px, 1fr)); }}
.patches .thumb {{ image-rendering: pixelated; }}
.patches .row figure {{ border-color: transparent; }}
.anchored td:first-child {{ text-align: left; }}
.scenes {{ display: grid; gap: 26px; }}
.scenes > div > div {{ display: flex; flex-wrap: wrap; gap: 10px 18px; }}
.scenes h4 b {{ font-weight: 600; }}
.boxes {{ width: 220px; height: auto; display: block; align-self: start;
  border: 1px solid #e4e7eb; }}
.anchor {{ font-size: 12.5px; flex: 1; min-width: 120px; }}
.anchor span, .anchor small {{ display: block; }}
.anchor i {{ font-style: normal; color: #616e7c; display: block; }}
.anchor q {{ quotes: none; font-weight: 600; }}
.anchor q.right {{ color: #0b6e3a; }}
.anchor q.right::after {{ content: " \\2713"; }}
.anchor q.wrong {{ color: #a4161a; }}
.bars {{ list-style: none; margin: 6px 0 0; padding: 0; }}
.bars li {{ font-variant-numeric: tabular-nums; line-height: 1.25; }}
.bars u {{ display: inline-block; height: 8px; background: #9aa5b1;
  margin-right: 5px; }}
.bars small {{ display: inline; font-size: 11.5px; }}
.bars li.right u {{ background: #17924f; }}
pre {{ font-size: 12px; background: #f5f7fa; padding: 12px; overflow-x: auto; }}
summary {{ cursor: pointer; }}
footer {{ margin-top: 44px; padding-top: 14px; border-top: 1px solid #e4e7eb;
  color: #616e7c; font-size: 12.5px; }}
"""
