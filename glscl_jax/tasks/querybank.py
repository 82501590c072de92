"""Querybank normalisation (Bogolin et al., 2112.12777), NumPy only.

Some candidates, the hubs, are near to every query and push the right ones
down. Queries that are not asked, here those of the training split, tell which
they are: with the bank b and a temperature t,

    s'(q, a) = s(q, a) - t log mean_b exp(s(b, a) / t)

the logarithm of the paper's inverted softmax, times t. Other queries of the
test never enter.
"""

from __future__ import annotations

import numpy as np

_CHUNK = 4096  # queries of the bank at a time; bounds the memory


def normalize(
  score_QA: np.ndarray,
  bank_BE: np.ndarray,
  candidate_AE: np.ndarray,
  *,
  temperature: float,
) -> np.ndarray:
  """Scores less what the bank's queries give each candidate, float32.

  Args:
    score_QA: cosines of the queries.
    bank_BE: unit vectors of the bank's queries, at least one.
    candidate_AE: unit vectors of the candidates.
    temperature: t, in units of the cosine.
  """
  total_A = np.full(len(candidate_AE), -np.inf)
  for start in range(0, len(bank_BE), _CHUNK):
    logits_JA = bank_BE[start : start + _CHUNK] @ candidate_AE.T / temperature
    total_A = np.logaddexp(total_A, np.logaddexp.reduce(logits_JA, axis=0))
  hub_A = temperature * (total_A - np.log(len(bank_BE)))
  return (score_QA - hub_A[None]).astype(np.float32)
