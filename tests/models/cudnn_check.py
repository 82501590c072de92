"""cuDNN's attention against the plain one, on the GPU of this machine.

A program of its own, because the suite's process sees no GPU. Prints the
largest difference of each case and ends with an error where one is too large.
"""

from __future__ import annotations

import functools
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import jax
import jax.numpy as jnp
import numpy as np

from glscl_jax.models import fused_attention
from tests.models import fused_attention_test as cases

BOUND = 0.03  # of values and gradients about 1, in bfloat16


def main() -> None:
  for name in cases.CASES:
    (q, k, v, valid_BM), causal = cases.make_case(name)
    operands = [x.astype(jnp.bfloat16) for x in (q, k, v)]

    def kernel(*operands, causal=causal):
      mixed = fused_attention.attend(*operands, dtype="bfloat16", causal=causal)
      assert mixed is not None, "no kernel was chosen"
      return mixed.astype(jnp.float32)

    with cases.on_one_device():
      found = cases.value_and_gradients(kernel, *operands, valid_BM)
    expected = cases.value_and_gradients(
      functools.partial(cases.plain, causal=causal),
      *(x.astype(jnp.float32) for x in operands),
      valid_BM,
    )
    for one, other in zip(
      jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
    ):
      scale = max(1.0, float(np.abs(other).max()))
      error = float(np.abs(np.asarray(one, np.float32) - other).max()) / scale
      print(f"{name}: {error:.4f}")
      assert error < BOUND, name
  print(f"{jax.devices()[0].device_kind}: cuDNN agrees")


if __name__ == "__main__":
  main()
