"""Ranks and R@k against slow references, ties, and chance by simulation."""

import itertools

import numpy as np
import pytest

from glscl_jax.tasks import ranking


def slow_rank(scores, matches):
  """Systems.md 6.1, word for word, for one query."""
  best = max(s for s, m in zip(scores, matches, strict=True) if m)
  worse = [m or s < best for s, m in zip(scores, matches, strict=True)]
  return 1 + worse.count(False)


def random_case(seed, *, queries=40, candidates=25, levels=6):
  """Few score levels, so ties are frequent; 1 to 5 matches a query."""
  rng = np.random.default_rng(seed)
  scores = rng.integers(0, levels, (queries, candidates)).astype(np.float32)
  matches = np.zeros((queries, candidates), bool)
  for row in matches:
    row[rng.choice(candidates, rng.integers(1, 6), replace=False)] = True
  return scores, matches


@pytest.mark.parametrize("seed", range(5))
def test_ranks_equal_the_slow_reference_with_ties_and_unequal_counts(seed):
  scores, matches = random_case(seed)
  expected = [slow_rank(s, m) for s, m in zip(scores, matches, strict=True)]
  found = ranking.ranks(scores, matches)
  np.testing.assert_array_equal(found, expected)
  assert len(set(matches.sum(1))) > 1
  summary, _ = ranking.summary(found, matches.sum(1), matches.shape[1])
  for k in (1, 5, 10):
    assert summary[f"r{k}"] == np.mean(np.array(expected) <= k)
  assert summary["median_rank"] == np.median(expected)


def test_ranks_do_not_depend_on_how_rows_are_chunked(monkeypatch):
  scores, matches = random_case(0)
  whole = ranking.ranks(scores, matches)
  best = ranking.best_candidates(scores, matches, count=7)
  monkeypatch.setattr(ranking, "_CHUNK", 60)
  np.testing.assert_array_equal(ranking.ranks(scores, matches), whole)
  np.testing.assert_array_equal(
    ranking.best_candidates(scores, matches, count=7), best
  )


def test_constant_scores_give_zero_in_every_mode():
  matches = np.eye(50, dtype=bool)
  scores = np.full((50, 50), 0.25, np.float32)
  rank = ranking.ranks(scores, matches)
  assert (rank == 50).all()
  candidates = ranking.best_candidates(scores, matches, count=20)
  rank = ranking.reranked_ranks(
    scores, matches, candidates, np.zeros((50, 20), np.float32)
  )
  assert (rank == 50).all()


def test_perfect_scores_give_rank_one():
  matches = np.eye(9, dtype=bool)
  assert (ranking.ranks(matches.astype(np.float32), matches) == 1).all()


def test_one_of_several_matches_at_the_top_is_a_hit():
  scores = np.array([[3.0, 2.0, 1.0, 0.0]])
  matches = np.array([[True, False, False, True]])
  assert ranking.ranks(scores, matches)[0] == 1


def test_other_matches_ahead_of_a_query_do_not_worsen_its_rank():
  scores = np.array([[3.0, 3.0, 2.0, 1.0]])
  matches = np.array([[True, True, False, False]])
  assert ranking.ranks(scores, matches)[0] == 1


@pytest.mark.parametrize("seed", range(3))
def test_reranking_all_candidates_equals_ranking_by_the_new_scores(seed):
  scores, matches = random_case(seed)
  fused = random_case(seed + 100)[0]
  candidates = ranking.best_candidates(scores, matches, count=10_000)
  found = ranking.reranked_ranks(
    scores, matches, candidates, np.take_along_axis(fused, candidates, axis=1)
  )
  np.testing.assert_array_equal(found, ranking.ranks(fused, matches))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("count", (1, 4, 9))
def test_reranked_ranks_equal_an_explicit_order(seed, count):
  scores, matches = random_case(seed)
  fused = random_case(seed + 100)[0]
  candidates = ranking.best_candidates(scores, matches, count=count)
  found = ranking.reranked_ranks(
    scores, matches, candidates, np.take_along_axis(fused, candidates, axis=1)
  )
  for q in range(len(scores)):
    chosen = set(candidates[q])
    # Candidates first, then the rest by cosine, as one list of keys.
    keys = [
      (1, fused[q, a]) if a in chosen else (0, scores[q, a])
      for a in range(scores.shape[1])
    ]
    best = max(key for a, key in enumerate(keys) if matches[q, a])
    ahead = [
      a for a, key in enumerate(keys) if key >= best and not matches[q, a]
    ]
    assert found[q] == 1 + len(ahead)


def test_candidates_are_the_best_and_a_tie_lets_no_match_in():
  scores = np.array([[0.5, 0.9, 0.5, 0.1]])
  matches = np.array([[True, False, False, False]])
  found = ranking.best_candidates(scores, matches, count=2)
  assert found.tolist() == [[1, 2]]


def test_chance_equals_the_mean_over_all_orders():
  counts = np.array([1, 2, 2, 3])
  total = 6
  for k in (1, 2, 5):
    expected = np.mean(
      [
        np.mean([min(order[:m]) < k for order in _orders(total)])
        for m in counts
      ]
    )
    assert ranking.chance_recall(counts, total, k) == pytest.approx(expected)


def test_chance_of_single_matches_is_k_over_n():
  counts = np.ones(7, int)
  assert ranking.chance_recall(counts, 122, 1) == pytest.approx(1 / 122)
  assert ranking.chance_recall(counts, 122, 10) == pytest.approx(10 / 122)


def test_chance_is_certain_when_every_candidate_is_looked_at():
  assert ranking.chance_recall(np.array([1, 3]), 4, 10) == pytest.approx(1)


def test_chance_median_rank_is_where_half_of_the_random_queries_hit():
  assert ranking.chance_median_rank(np.ones(3, int), 100) == 50
  rng = np.random.default_rng(0)
  counts = np.array([1, 3])
  drawn = [
    1 + rng.permutation(30)[:m].min() for m in counts for _ in range(4000)
  ]
  assert ranking.chance_median_rank(counts, 30) == np.median(drawn)


def test_random_scores_score_as_chance_says():
  rng = np.random.default_rng(0)
  matches = np.eye(40, dtype=bool)
  found = [
    (ranking.ranks(rng.random((40, 40)), matches) <= 5).mean()
    for _ in range(50)
  ]
  expected = ranking.chance_recall(matches.sum(1), 40, 5)
  assert np.mean(found) == pytest.approx(expected, abs=0.02)


def test_scores_that_are_not_finite_are_refused():
  scores, matches = random_case(0)
  scores[3, 4] = np.nan
  with pytest.raises(ranking.RankingError, match="1 of 1000 scores"):
    ranking.ranks(scores, matches)


def test_a_query_without_match_is_refused():
  scores, matches = random_case(0)
  matches[3] = False
  with pytest.raises(ranking.RankingError, match="query 3"):
    ranking.ranks(scores, matches)


def _orders(total):
  return list(itertools.permutations(range(total)))
