"""Huge pages for XLA on CPU. Imports nothing, to come before what is slow."""

from __future__ import annotations

import os
import sys


def use() -> None:
  """Starts this process again with huge pages, where that makes it faster.

  XLA maps its temporary buffers anew in each step, and a fifth of a step on
  CPU goes into page faults, which huge pages spare (measured 2026-11). glibc
  reads its tunables only when a process starts.
  """
  accelerators = ("/dev/nvidia0", "/dev/kfd", "/dev/accel0", "/dev/vfio/0")
  if (
    sys.platform == "linux"
    and "GLIBC_TUNABLES" not in os.environ
    and not any(map(os.path.exists, accelerators))
  ):
    os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    os.execv(sys.executable, sys.orig_argv)
