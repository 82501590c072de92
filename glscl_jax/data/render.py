"""SVG text to PNG bytes, in several processes, with resvg."""

from __future__ import annotations

import functools
import io
import multiprocessing
import signal
from collections.abc import Sequence

import resvg_py
from PIL import Image

from glscl_jax.data import progress


def render(svg: str, *, size: int) -> bytes:
  """PNG bytes of a size x size RGB image, the drawing centred on white.

  Raises:
    ValueError: the SVG cannot be parsed.
  """
  png = resvg_py.svg_to_bytes(
    svg_string=svg,
    background="white",
    width=size,  # with height: the largest that fits, proportions kept
    height=size,
    skip_system_fonts=True,  # the same picture on every machine
  )
  drawing = Image.open(io.BytesIO(bytes(png))).convert("RGB")
  canvas = Image.new("RGB", (size, size), "white")
  left, top = (size - drawing.width) // 2, (size - drawing.height) // 2
  canvas.paste(drawing, (left, top))
  out = io.BytesIO()
  canvas.save(out, "PNG")
  return out.getvalue()


def render_all(
  svgs: Sequence[str], *, size: int, num_processes: int = 2
) -> list[bytes]:
  """Renders in order; progress with the time left on the terminal."""
  one = functools.partial(render, size=size)
  if num_processes <= 1:
    return list(progress.bar(map(one, svgs), total=len(svgs), name="render"))
  # spawn: a fork of a process that runs threads may hang. Ctrl-C is
  # the parent's to handle.
  spawn = multiprocessing.get_context("spawn")
  ignore = (signal.SIGINT, signal.SIG_IGN)
  with spawn.Pool(num_processes, signal.signal, ignore) as pool:
    images = pool.imap(one, svgs, chunksize=32)
    return list(progress.bar(images, total=len(svgs), name="render"))
