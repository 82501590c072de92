"""What makes XLA on CPU fast. Imports nothing, to come before what is slow."""

from __future__ import annotations

import os
import sys

ACCELERATORS = ("/dev/nvidia0", "/dev/kfd", "/dev/accel0", "/dev/vfio/0")


def prepare() -> None:
  """Sets this process up, where there is no accelerator; may start it again.

  To be called before jax is imported. What the caller's environment says of
  the same things stays.
  """
  if any(map(os.path.exists, ACCELERATORS)):
    return
  _join_loops()
  _use_huge_pages()


def _join_loops() -> None:
  """Lets XLA write several arrays in one loop.

  Else the optimizer is several passes over all numbers, and before the first of
  them XLA copies the whole state.
  """
  flags = os.environ.get("XLA_FLAGS", "")
  if "--xla_backend_extra_options" not in flags:
    join = "--xla_backend_extra_options=xla_cpu_use_multi_output_fusion"
    os.environ["XLA_FLAGS"] = f"{flags} {join}".lstrip()


def _use_huge_pages() -> None:
  """Starts this process again, since glibc reads its tunables only then.

  XLA maps its temporary buffers anew in each step, and a fifth of a step goes
  into page faults, which huge pages spare (measured 2026-11).
  """
  if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
    os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    os.execv(sys.executable, sys.orig_argv)
