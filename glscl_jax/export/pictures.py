"""Charts and pictures of the report: arrays in, encoded bytes out.

The only module that draws. Charts are SVG, pictures PNG; equal input gives
equal bytes. Text inside charts uses the reader's system font.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib import figure, ticker
from PIL import Image, ImageDraw, ImageFont

INK = "#1f2933"
QUIET = "#7b8794"
GRID = "#e4e7eb"
# One colour a protocol, in the order met; told apart without colour vision.
SERIES = ("#1d4ed8", "#f59e0b", "#0f766e", "#9d174d")
# Those of anchors, more of them; begins again after the last.
ANCHORS = (*SERIES, "#7c3aed", "#4d7c0f", "#0284c7", "#78350f")
HEAT = np.array([204, 36, 29], np.float32)
HIDDEN = np.array([188, 196, 206], np.uint8)  # in place of a hidden patch

_STYLE = {
  "font.size": 9,
  "axes.edgecolor": QUIET,
  "axes.labelcolor": INK,
  "axes.titlecolor": INK,
  "axes.titlesize": 9,
  "axes.titlelocation": "left",
  "axes.spines.top": False,
  "axes.spines.right": False,
  "axes.grid": True,
  "axes.axisbelow": True,
  "grid.color": GRID,
  "grid.linewidth": 0.8,
  "xtick.color": QUIET,
  "ytick.color": QUIET,
  "xtick.labelcolor": INK,
  "ytick.labelcolor": INK,
  "legend.frameon": False,
  "svg.fonttype": "none",
  "svg.hashsalt": "glscl_jax",
}


def _svg(chart: figure.Figure) -> bytes:
  file = io.BytesIO()
  chart.savefig(file, format="svg", metadata={"Date": None})
  text = file.getvalue().decode()
  # Laid out with matplotlib's own font, shown in the reader's.
  font = "system-ui, 'Segoe UI', 'Helvetica Neue', Arial"
  return text.replace("'DejaVu Sans'", font).encode()


def png(image_YXC: np.ndarray) -> bytes:
  """Encodes a uint8 picture."""
  file = io.BytesIO()
  Image.fromarray(image_YXC).save(file, "PNG", optimize=True)
  return file.getvalue()


def curves(
  series: Mapping[str, Sequence[tuple[float, float]]],
  *,
  columns: int = 4,
  percent: frozenset[str] = frozenset(),
) -> bytes:
  """One small panel a quantity: (step, value) points and their running mean.

  Args:
    series: title -> points in order of steps.
    columns: panels a row.
    percent: titles whose values are shares, shown in percent.
  """
  rows = math.ceil(len(series) / columns)
  with matplotlib.rc_context(_STYLE):
    chart = figure.Figure(figsize=(10.4, 1.95 * rows), layout="constrained")
    panels = chart.subplots(rows, columns, squeeze=False).ravel()
    for panel in panels[len(series) :]:
      panel.set_axis_off()
    for panel, (title, points) in zip(panels, series.items(), strict=False):
      steps, values = np.array(points, float).T
      if len(points) > 30:
        panel.plot(steps, values, color=SERIES[0], alpha=0.25, linewidth=0.8)
        panel.plot(steps, running_mean(values), color=SERIES[0], linewidth=1.4)
      else:
        panel.plot(
          steps, values, color=SERIES[0], linewidth=1.4, marker="o", ms=2.5
        )
      panel.set_title(title)
      panel.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
      panel.xaxis.set_major_locator(ticker.MaxNLocator(4, integer=True))
      panel.yaxis.set_major_locator(ticker.MaxNLocator(4))
      if title in percent:
        panel.yaxis.set_major_formatter(ticker.PercentFormatter(1))
        panel.set_ylim(bottom=0)
    return _svg(chart)


def running_mean(values_A: np.ndarray, *, share: float = 0.05) -> np.ndarray:
  """Centred mean over `share` of the points, narrower at the ends."""
  half = max(1, round(len(values_A) * share / 2))
  total = np.concatenate([[0.0], np.cumsum(values_A)])
  index = np.arange(len(values_A))
  first = np.maximum(index - half, 0)
  last = np.minimum(index + half + 1, len(values_A))
  return (total[last] - total[first]) / (last - first)


def recall_bars(
  cells: Mapping[str, Mapping[str, Mapping[str, float]]],
  chance: Mapping[str, Mapping[str, float]],
) -> bytes:
  """R@1, R@5 and R@10 a cell and direction; a black line marks chance.

  Args:
    cells: cell title -> protocol -> metric name (`i2t_r1` ..) -> share.
    chance: cell title -> metric name -> share.
  """
  protocols = list(dict.fromkeys(p for cell in cells.values() for p in cell))
  ks = (1, 5, 10)
  width = 0.78 / len(protocols)
  with matplotlib.rc_context(_STYLE):
    # A single cell must not be stretched over the page.
    chart = figure.Figure(
      figsize=(max(5.5, 1.2 + 2.3 * len(cells)), 4.7), layout="constrained"
    )
    panels = chart.subplots(2, len(cells), sharey=True, squeeze=False)
    for row, (direction, title) in enumerate(
      (("i2t", "image to text"), ("t2i", "text to image"))
    ):
      for column, (cell, values) in enumerate(cells.items()):
        panel = panels[row, column]
        names = [f"{direction}_r{k}" for k in ks]
        for number, protocol in enumerate(protocols):
          if protocol not in values:
            continue
          shift = (number - (len(protocols) - 1) / 2) * width
          bars = panel.bar(
            np.arange(3) + shift,
            [values[protocol][name] for name in names],
            width * 0.94,
            color=SERIES[number % len(SERIES)],
            label=protocol,
          )
          panel.bar_label(
            bars,
            [f"{100 * values[protocol][name]:.0f}" for name in names],
            fontsize=7 if len(protocols) < 3 else 6,
            color=INK,
            padding=1.5,
          )
        for x, name in enumerate(names):
          panel.hlines(
            chance[cell][name],
            x - 0.45,
            x + 0.45,
            color="black",
            linewidth=1.4,
            label="chance" if x == 0 else None,
            zorder=3,
          )
        panel.set_xticks(range(3), [f"R@{k}" for k in ks])
        panel.tick_params(axis="x", length=0)
        panel.grid(False, axis="x")
        panel.set_ylim(0, 1.06)
        panel.yaxis.set_major_formatter(ticker.PercentFormatter(1, decimals=0))
        if row == 0:
          panel.set_title("\n".join(textwrap.wrap(cell, 30)))
        if column == 0:
          panel.set_ylabel(f"{title}\nqueries answered")
    handles = {
      label: handle
      for panel in panels.ravel()
      for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    chart.legend(
      handles.values(),
      handles.keys(),
      loc="outside lower center",
      ncols=len(handles) if len(cells) > 2 else 2,
    )
    return _svg(chart)


def dot_plot(
  rows: Sequence[str],
  panels: Mapping[str, Sequence[Sequence[float]]],
  chance: Mapping[str, float],
) -> bytes:
  """A panel a measure: each row's values as dots, their mean as a line.

  Args:
    rows: names, from the top.
    panels: title -> values of each row, as shares; none where not measured.
    chance: title -> share, a dashed line.
  """
  across = min(4, len(panels))
  down = -(-len(panels) // across)
  with matplotlib.rc_context(_STYLE):
    chart = figure.Figure(
      figsize=(3.2 + 2.6 * across, down * (1.2 + 0.34 * len(rows))),
      layout="constrained",
    )
    axes = chart.subplots(down, across, sharey=True, squeeze=False).ravel()
    for panel in axes[len(panels) :]:
      panel.remove()
    for panel, (title, values) in zip(axes, panels.items(), strict=False):
      for y, found in enumerate(values):
        if not found:
          continue
        panel.plot(found, [y] * len(found), "o", color=SERIES[0], alpha=0.45)
        mean = sum(found) / len(found)
        panel.plot([mean] * 2, [y - 0.3, y + 0.3], color=INK, linewidth=1.6)
      panel.axvline(chance[title], color="black", linewidth=0.9, ls="--")
      panel.set_title("\n".join(textwrap.wrap(title, 32)))
      panel.set_yticks(range(len(rows)), rows)
      panel.set_ylim(len(rows) - 0.5, -0.5)
      panel.set_xlim(left=0)
      panel.xaxis.set_major_formatter(ticker.PercentFormatter(1))
      panel.xaxis.set_major_locator(ticker.MaxNLocator(4))
    return _svg(chart)


def overlay(
  image_YXC: np.ndarray, map_GG: np.ndarray, *, top: float, size: int
) -> np.ndarray:
  """A pale grey copy of a picture with a map in red over it.

  Args:
    image_YXC: uint8.
    map_GG: one value a patch, row-major.
    top: value of full red.
    size: pixels a side of the result.
  """
  picture = Image.fromarray(image_YXC).resize(
    (size, size), Image.Resampling.LANCZOS
  )
  heat = Image.fromarray((map_GG / top).astype(np.float32)).resize(
    (size, size), Image.Resampling.BICUBIC
  )
  strength = np.clip(np.asarray(heat), 0, 1)[:, :, None] * 0.85
  grey = np.asarray(picture.convert("L"), np.float32)[:, :, None]
  pale = 255 - 0.6 * (255 - grey)
  return np.round(pale * (1 - strength) + HEAT * strength).astype(np.uint8)


def put_patches(
  image_YXC: np.ndarray,
  index_J: np.ndarray,
  pixel_JPC: np.ndarray,
  *,
  patch_size: int,
) -> np.ndarray:
  """A picture with other pixels, row by row, in some of its patches."""
  found_YXC = image_YXC.copy()
  columns = image_YXC.shape[1] // patch_size
  for index, pixel_PC in zip(index_J, pixel_JPC, strict=True):
    y, x = (patch_size * int(place) for place in divmod(int(index), columns))
    found_YXC[y : y + patch_size, x : x + patch_size] = pixel_PC.reshape(
      patch_size, patch_size, 3
    )
  return found_YXC


def hide(image_YXC: np.ndarray, hidden_I: np.ndarray) -> np.ndarray:
  """A picture with flat grey in place of its hidden patches, row-major."""
  where_YX1 = _enlarge(hidden_I, image_YXC.shape[0])
  return np.where(where_YX1, HIDDEN[None, None], image_YXC)


def mark(image_YXC: np.ndarray, hidden_I: np.ndarray) -> np.ndarray:
  """A picture with some of its patches, row-major, in red."""
  where_YX1 = _enlarge(hidden_I, image_YXC.shape[0])
  tinted_YXC = 0.55 * image_YXC + 0.45 * HEAT[None, None]
  return np.where(where_YX1, np.round(tinted_YXC), image_YXC).astype(np.uint8)


def _enlarge(hidden_I: np.ndarray, size: int) -> np.ndarray:
  """A flag a pixel from one a patch, (Y, X, 1)."""
  grid = round(len(hidden_I) ** 0.5)
  hidden_GG = hidden_I.reshape(grid, grid)
  return np.kron(hidden_GG, np.ones((size // grid,) * 2, bool))[:, :, None]


def anchor_colour(number: int) -> str:
  """The colour of an anchor of an image."""
  return ANCHORS[number % len(ANCHORS)]


def draw_boxes(
  image_YXC: np.ndarray,
  box_R4: np.ndarray,
  colours: Sequence[str | None],
  *,
  size: int,
) -> np.ndarray:
  """A picture with numbered boxes, from 1; thin and grey without a colour.

  Args:
    image_YXC: uint8.
    box_R4: x1, y1, x2, y2, of the picture's size.
    colours: of each box.
    size: pixels of the longer side of the result.
  """
  height, width = image_YXC.shape[:2]
  scale = size / max(height, width)
  shape = round(width * scale), round(height * scale)
  picture = Image.fromarray(image_YXC).resize(shape, Image.Resampling.LANCZOS)
  draw = ImageDraw.Draw(picture)
  font = ImageFont.load_default(size=max(10, size // 16))
  order = sorted(range(len(colours)), key=lambda i: colours[i] is not None)
  for number in order:  # coloured ones last, on top
    colour, thick = colours[number] or QUIET, max(1, size // 256)
    if colours[number]:
      thick *= 3
    left, top, right, bottom = (
      float(value) * (side - 1)
      for value, side in zip(box_R4[number], shape * 2, strict=True)
    )
    draw.rectangle((left, top, right, bottom), outline=colour, width=thick)
    label = draw.textbbox((left + thick, top), str(number + 1), font=font)
    edge = (left, top, label[2] + thick, label[3] + thick)
    draw.rectangle(edge, fill=colour)
    draw.text((left + thick, top), str(number + 1), fill="white", font=font)
  return np.asarray(picture)
