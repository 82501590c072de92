"""What the makers say their accelerators can do: per chip, dense bfloat16.

FLOP/s and memory: Google's pages "TPU v4", "TPU v5e", "TPU v5p", "TPU v6e"
(docs.cloud.google.com/tpu/docs, 2026-11), NVIDIA's data sheets.
Links of TPUs: the ICI bandwidth a chip of these pages, which counts both
directions, over two ways and the links of a chip, two for each dimension of the
torus; of v4, that page says none, from its paper (2304.01433). Links of GPUs:
NVLink of a data sheet, one way, and between hosts a 400 Gb/s adapter a GPU.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
  """One device."""

  words: tuple[str, ...]  # that all occur in its `device_kind`
  flops: float  # a second
  # None: nobody compiles for it ahead of time.
  memory: float | None = None  # bytes
  memory_rate: float | None = None  # bytes a second
  link_rate: float | None = None  # bytes a second of a link, one way
  # Of a GPU, one way, between hosts; None: ICI reaches everywhere.
  host_rate: float | None = None
  # A dimension of the torus closes to a ring where its length is a multiple.
  wraps: int = 1


# The first entry whose words all occur in `device_kind` counts.
CHIPS = (
  Chip(
    words=("tpu", "v6"),
    flops=918e12,
    memory=32 * 2**30,
    memory_rate=1638e9,
    link_rate=100e9,
    wraps=16,
  ),
  Chip(
    words=("tpu", "v5 lite"),
    flops=197e12,
    memory=16 * 2**30,
    memory_rate=819e9,
    link_rate=50e9,
    wraps=16,
  ),
  Chip(words=("tpu", "v5e"), flops=197e12),
  # v5p, which reports itself as "TPU v5".
  Chip(
    words=("tpu", "v5"),
    flops=459e12,
    memory=95 * 2**30,
    memory_rate=2765e9,
    link_rate=100e9,
    wraps=4,
  ),
  Chip(
    words=("tpu", "v4"),
    flops=275e12,
    memory=32 * 2**30,
    memory_rate=1200e9,
    link_rate=50e9,
    wraps=4,
  ),
  Chip(
    words=("h200",),
    flops=989.4e12,
    memory=141e9,
    memory_rate=4800e9,
    link_rate=450e9,
    host_rate=50e9,
  ),
  Chip(words=("h100", "pcie"), flops=756e12),
  Chip(words=("h100", "nvl"), flops=835e12),
  Chip(
    words=("h100",),
    flops=989.4e12,
    memory=80e9,
    memory_rate=3350e9,
    link_rate=450e9,
    host_rate=50e9,
  ),
  Chip(words=("a100",), flops=312e12),
)


def find(device_kind: str) -> Chip | None:
  """The entry of a device, or None."""
  kind = device_kind.lower()
  return next(
    (chip for chip in CHIPS if all(word in kind for word in chip.words)), None
  )
