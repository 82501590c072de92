"""Ranks, R@k and what chance would give; NumPy only.

A query has one or several matching candidates. Its rank is 1 + the number of
non-matching candidates whose score is >= that of its best matching one: ties
count against the model, so constant scores give R@k near 0 and not near
1. R@k is the share of queries with rank <= k.

Shape letters beside those of types.py: Q queries, A candidates, J candidates
of a query that are scored again.
"""

from __future__ import annotations

import numpy as np

from glscl_jax import errors

CUTOFFS = (1, 5, 10)
_CHUNK = 1 << 24  # scores compared at a time; bounds the memory


class RankingError(errors.UserError):
  """Scores or relevance that no rank can be computed from."""


def ranks(score_QA: np.ndarray, relevant_QA: np.ndarray) -> np.ndarray:
  """Rank of each query, 1 is best; every query needs a matching candidate."""
  _check(score_QA, relevant_QA)
  rank_Q = np.zeros(len(score_QA), np.int64)
  for rows in _row_chunks(*score_QA.shape):
    rank_Q[rows] = _ranks_of_rows(score_QA[rows], relevant_QA[rows])
  return rank_Q


def _ranks_of_rows(score_QA: np.ndarray, relevant_QA: np.ndarray) -> np.ndarray:
  best_Q1 = np.where(relevant_QA, score_QA, -np.inf).max(1, keepdims=True)
  return 1 + (~relevant_QA & (score_QA >= best_Q1)).sum(1)


def best_candidates(
  score_QA: np.ndarray, relevant_QA: np.ndarray, *, count: int
) -> np.ndarray:
  """The `count` best candidates of each query, best first, (Q, J) int64.

  Among equal scores non-matching candidates come first, so that a tie never
  lets a matching one in.
  """
  _check(score_QA, relevant_QA)
  count = min(count, score_QA.shape[1])
  found = np.zeros((len(score_QA), count), np.int64)
  for rows in _row_chunks(*score_QA.shape):
    order = np.lexsort((relevant_QA[rows], -score_QA[rows]), axis=-1)
    found[rows] = order[:, :count]
  return found


def reranked_ranks(
  score_QA: np.ndarray,
  relevant_QA: np.ndarray,
  candidate_QJ: np.ndarray,
  fused_QJ: np.ndarray,
) -> np.ndarray:
  """Ranks after the candidates of each query were scored again.

  Candidates are ordered by `fused_QJ`; all others follow after them, ordered
  by `score_QA`.
  """
  _check(score_QA, relevant_QA)
  if not np.isfinite(fused_QJ).all():
    raise RankingError("fused scores are not finite")
  rank_Q = np.zeros(len(score_QA), np.int64)
  for rows in _row_chunks(*score_QA.shape):
    rank_Q[rows] = _reranked_rows(
      score_QA[rows], relevant_QA[rows], candidate_QJ[rows], fused_QJ[rows]
    )
  return rank_Q


def _reranked_rows(
  score_QA: np.ndarray,
  relevant_QA: np.ndarray,
  candidate_QJ: np.ndarray,
  fused_QJ: np.ndarray,
) -> np.ndarray:
  fits_QJ = np.take_along_axis(relevant_QA, candidate_QJ, axis=1)
  among_Q = _ranks_of_rows(fused_QJ, fits_QJ)
  rest_QA = np.ones_like(relevant_QA)
  np.put_along_axis(rest_QA, candidate_QJ, False, axis=1)
  fits_QA = relevant_QA & rest_QA
  best_Q1 = np.where(fits_QA, score_QA, -np.inf).max(1, keepdims=True)
  ahead_Q = (~relevant_QA & rest_QA & (score_QA >= best_Q1)).sum(1)
  after_Q = 1 + (~fits_QJ).sum(1) + ahead_Q
  return np.where(fits_QJ.any(1), among_Q, after_Q)


def chance_recall(num_relevant_Q: np.ndarray, total: int, k: int) -> float:
  """Expected R@k of a random order of `total` candidates, exact.

  A query with m matching candidates misses with the hypergeometric
  probability C(total - m, k) / C(total, k).
  """
  return float(_chance_hits(num_relevant_Q, total, min(k, total))[-1])


def chance_median_rank(num_relevant_Q: np.ndarray, total: int) -> int:
  """Smallest rank that a random order reaches for half of the queries."""
  hits_A = _chance_hits(num_relevant_Q, total, total)
  return int(np.argmax(hits_A >= 0.5)) + 1


def _chance_hits(
  num_relevant_Q: np.ndarray, total: int, depth: int
) -> np.ndarray:
  """Expected R@1 .. R@depth of a random order, mean over the queries."""
  kinds_J, times_J = np.unique(num_relevant_Q, return_counts=True)
  step_A = np.arange(depth)
  miss_JA = np.cumprod(
    np.clip(total - kinds_J[:, None] - step_A[None], 0, None)
    / (total - step_A)[None],
    axis=1,
  )
  return ((1 - miss_JA) * times_J[:, None]).sum(0) / times_J.sum()


def summary(
  rank_Q: np.ndarray, num_relevant_Q: np.ndarray, total: int
) -> tuple[dict[str, float], dict[str, float]]:
  """R@1, R@5, R@10 as shares and the median rank; then the same by chance."""
  found = {f"r{k}": float((rank_Q <= k).mean()) for k in CUTOFFS}
  found["median_rank"] = float(np.median(rank_Q))
  chance = {f"r{k}": chance_recall(num_relevant_Q, total, k) for k in CUTOFFS}
  chance["median_rank"] = float(chance_median_rank(num_relevant_Q, total))
  return found, chance


def _check(score_QA: np.ndarray, relevant_QA: np.ndarray) -> None:
  if score_QA.shape != relevant_QA.shape:
    raise RankingError(
      f"scores {score_QA.shape} and relevance {relevant_QA.shape} differ"
    )
  if not np.isfinite(score_QA).all():
    count = int((~np.isfinite(score_QA)).sum())
    raise RankingError(f"{count} of {score_QA.size} scores are not finite")
  if not relevant_QA.any(1).all():
    row = int(np.argmin(relevant_QA.any(1)))
    raise RankingError(f"query {row} has no matching candidate")


def _row_chunks(rows: int, columns: int) -> list[slice]:
  step = max(1, _CHUNK // max(columns, 1))
  return [slice(start, start + step) for start in range(0, rows, step)]
