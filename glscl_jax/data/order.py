"""Which pair each row of a run shows, and how many tokens its batch has."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence
from typing import Any, Protocol

import grain
import numpy as np

from glscl_jax import config as config_lib
from glscl_jax.data import masking


@dataclasses.dataclass(frozen=True)
class Place:
  """A row of the run."""

  epoch: int
  pair: int
  length: int | None = None  # tokens of its batch's texts, with padding; None:
  # model.text.max_length


class Order(Protocol):
  """Row of the run -> its place. The same in every process and worker."""

  def __call__(self, position: int) -> Place: ...


@dataclasses.dataclass(frozen=True)
class Listed:
  """Once, one after the other."""

  pairs: Sequence[int]

  def __call__(self, position: int) -> Place:
    return Place(0, self.pairs[position])


class Shuffled:
  """All pairs, anew in every epoch."""

  def __init__(self, num_pairs: int, *, seed: int):
    self._num_pairs = num_pairs
    numbers = grain.MapDataset.range(num_pairs)
    self._order = numbers.seed(seed).shuffle().repeat()

  def __call__(self, position: int) -> Place:
    return Place(position // self._num_pairs, int(self._order[position]))


class ByLength:
  """Batches of pairs whose texts are about as long, shuffled in every epoch.

  Pairs are sorted into classes: a text belongs to the first length that holds
  all of it. Each class is shuffled and cut into batches; pairs that fill none
  go to the next longer class, and those left at the end, fewer than a batch,
  wait for the next epoch. Then the batches are shuffled.

  Args:
    tokens_A: of the text of each pair.
    lengths: of the classes, rising; longer texts are cut to the last one.
    batch_size: of all processes together.
    seed: of the run's data.

  Raises:
    ConfigError: not one batch.
  """

  def __init__(
    self,
    tokens_A: np.ndarray,
    lengths: Sequence[int],
    *,
    batch_size: int,
    seed: int,
  ):
    if len(tokens_A) < batch_size:
      raise config_lib.ConfigError(
        f"config.data.text_lengths: {len(tokens_A)} pairs do not fill a batch "
        f"of {batch_size}; lower data.batch_size, or set it to ()"
      )
    number_A = np.searchsorted(lengths[:-1], tokens_A)
    self._classes = [
      np.flatnonzero(number_A == number).astype(np.int32)
      for number in range(len(lengths))
    ]
    self._lengths = np.array(lengths, np.int32)
    self._batch_size = batch_size
    self._num_batches = len(tokens_A) // batch_size
    self._seed = seed
    # The last epochs asked for: threads at a border ask for two.
    self._made: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    self._lock = threading.Lock()

  def __call__(self, position: int) -> Place:
    step, row = divmod(position, self._batch_size)
    epoch, batch = divmod(step, self._num_batches)
    with self._lock:
      if epoch not in self._made:
        kept = {e: made for e, made in self._made.items() if e >= epoch - 1}
        self._made = {**kept, epoch: self._make(epoch)}
      pair_NB, length_N = self._made[epoch]
    return Place(epoch, int(pair_NB[batch, row]), int(length_N[batch]))

  def __getstate__(self) -> dict[str, Any]:
    # Workers have locks of their own, and make the epochs that they read.
    return {**self.__dict__, "_made": {}, "_lock": None}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state, _lock=threading.Lock())

  def _make(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of each batch, and its length."""
    rng = masking.sample_rng(self._seed, epoch, 0, "order by length")
    left_M = np.zeros(0, np.int32)
    pairs, lengths = [], []
    for class_A, length in zip(self._classes, self._lengths, strict=True):
      all_L = np.concatenate([left_M, rng.permutation(class_A)])
      count = len(all_L) // self._batch_size
      full = count * self._batch_size
      pairs.append(all_L[:full].reshape(count, self._batch_size))
      lengths.append(np.full(count, length))
      left_M = all_L[full:]
    order_N = rng.permutation(self._num_batches)
    return np.concatenate(pairs)[order_N], np.concatenate(lengths)[order_N]
