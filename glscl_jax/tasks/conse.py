"""Vectors moved towards what they match among known ones, NumPy only.

ConSE (Norouzi et al., 1312.5650) describes an image of an unknown class by the
known classes it resembles: the mean of their texts' vectors, weighed by how
likely the model takes each to be the image's. Here the known texts are those
of a bank w, by default the training captions, and t is a temperature:

    v' = n(v + n(sum_b p_b w_b))    p = softmax_b(v . w_b / t)    n(x) = x / |x|

v stays a part of it, since unlike a class score it lies in the space of w. For
a caption the bank are the training images.
"""

from __future__ import annotations

import numpy as np

_CELLS = 1 << 24  # of the bank's shares at a time; bounds the memory


def expand(
  vector_QE: np.ndarray, bank_BE: np.ndarray, *, temperature: float
) -> np.ndarray:
  """The moved vectors, unit, float32 (Q, E).

  Args:
    vector_QE: unit vectors of one modality.
    bank_BE: unit vectors of the other one, at least one.
    temperature: t, in units of the cosine.
  """
  rows = max(1, _CELLS // len(bank_BE))
  chunks = [
    _expand(vector_QE[start : start + rows], bank_BE, temperature)
    for start in range(0, len(vector_QE), rows)
  ]
  return np.concatenate(chunks).astype(np.float32)


def _expand(
  vector_QE: np.ndarray, bank_BE: np.ndarray, temperature: float
) -> np.ndarray:
  logits_QB = vector_QE @ bank_BE.T / temperature
  share_QB = np.exp(logits_QB - logits_QB.max(axis=1, keepdims=True))
  share_QB /= share_QB.sum(axis=1, keepdims=True)
  return unit(vector_QE + unit(share_QB @ bank_BE))


def unit(x_QE: np.ndarray) -> np.ndarray:
  """Rows of length 1; a zero stays zero, as in `contrastive.normalize`."""
  return x_QE / np.maximum(np.linalg.norm(x_QE, axis=1, keepdims=True), 1e-8)
