"""Random numbers of the rows of a batch.

A row draws from the key and its place in the whole batch alone, so that a
micro-batch (`train/accumulate.py`) draws what its rows draw in one piece. All
that a training step draws for samples, or for groups of them, comes from here.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Iterator

import jax
import jax.extend
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Share:
  """Which rows of a batch are there: one piece of each of its parts.

  A batch is `parts` equal runs of rows, each of them `number` equal pieces.
  """

  index: jax.Array | int  # of the piece
  number: int
  parts: int


WHOLE = Share(0, 1, 1)  # all rows
_SHARE: contextvars.ContextVar[Share] = contextvars.ContextVar(
  "share", default=WHOLE
)


@contextlib.contextmanager
def share(rows: Share) -> Iterator[None]:
  """What is traced inside sees these rows of the batch alone."""
  token = _SHARE.set(rows)
  try:
    yield
  finally:
    _SHARE.reset(token)


def places(count: int) -> jax.Array:
  """(A,) uint32: where each of `count` rows stands in the whole batch.

  Rows of samples, of several versions of each, or of groups: any whose number
  `Share.parts` divides.
  """
  here = _SHARE.get()
  length = count // here.parts
  row_A = jnp.arange(count, dtype=jnp.uint32)
  if here.number == 1:
    return row_A
  part_A, inside_A = row_A // length, row_A % length
  piece_A = part_A * here.number + jnp.asarray(here.index, jnp.uint32)
  return piece_A * length + inside_A


def bits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """uint16 of a shape whose first axis counts rows."""
  count, size = shape[0], math.prod(shape[1:])
  row_A = places(count)
  # One block of threefry, 64 bits, is four numbers. Its counter is the place
  # of the row and that of the block in it: nothing is drawn for other rows.
  # Keys of other generators serve as keys of this one.
  num_blocks = -(-size // 4)
  block_AJ = jax.lax.broadcasted_iota(jnp.uint32, (count, num_blocks), 1)
  words = jax.extend.random.threefry2x32_p.bind(
    *jax.random.key_data(key)[:2],
    jnp.broadcast_to(row_A[:, None], block_AJ.shape),
    block_AJ,
  )
  parts = [jax.lax.bitcast_convert_type(word, jnp.uint16) for word in words]
  drawn_AJ4 = jnp.concatenate(parts, axis=-1)
  return drawn_AJ4.reshape(count, -1)[:, :size].reshape(shape)


def keep(key: jax.Array, rate: float, shape: tuple[int, ...]) -> jax.Array:
  """bool, True with probability 1 - `rate`, to 2^-17."""
  return bits(key, shape) >= round(rate * 2**16)


def uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """float32 inside (0, 1), of 23 bits: the half is exact, 1 is never met."""
  high, low = jnp.moveaxis(bits(key, (*shape, 2)), -1, 0).astype(jnp.uint32)
  number = ((high << 16) | low) >> 9
  return (number.astype(jnp.float32) + 0.5) * 2.0**-23


def gumbel(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """float32 of the standard Gumbel distribution."""
  return -jnp.log(-jnp.log(uniform(key, shape)))
