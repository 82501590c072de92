"""Image-text matching: which false pairs are shown, and the loss."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from glscl_jax.objectives import matching

same_in_groups = jax.jit(matching.same_in_groups, static_argnums=1)
random_negatives = jax.jit(matching.random_negatives, static_argnums=2)
hard_negatives = jax.jit(matching.hard_negatives)
half_labels = jax.jit(matching.half_labels, static_argnums=(1, 2))


def chosen_ids(ids, index, group):
  """Ids of the drawn samples, as seen from the whole batch."""
  start = np.arange(len(ids)) // group * group
  return ids[start + np.asarray(index)]


def test_samples_of_a_group_show_the_same_if_they_agree_in_any_column():
  ids = np.array([[0, 1], [0, 2], [3, 2], [3, 1]], np.int32)
  np.testing.assert_array_equal(
    same_in_groups(ids, 2), np.ones((2, 2, 2), bool)
  )
  opposite = np.roll(np.eye(4, dtype=bool), 2, axis=1)
  np.testing.assert_array_equal(same_in_groups(ids, 4)[0], ~opposite)


def test_match_cross_entropy_is_the_mean_over_pairs():
  logits = np.array([[2.0, 0.5], [0.0, 0.0], [-1.0, 3.0]], np.float32)
  labels = np.array([0, 1, 0], np.int32)
  log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
  wanted = -np.mean([log_p[0, 0], log_p[1, 1], log_p[2, 0]])
  found = matching.match_cross_entropy(logits, labels)
  np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_undecided_logits_cost_the_logarithm_of_two():
  found = matching.match_cross_entropy(
    jnp.full((4, 2), 100.0, jnp.bfloat16), np.array([0, 1, 1, 0], np.int32)
  )
  np.testing.assert_allclose(found, np.log(2), rtol=1e-6)


@pytest.mark.parametrize("group", [1, 2, 3, 5, 16])
def test_exactly_half_of_each_group_is_labelled_true(group, key):
  labels = half_labels(key, 4 * group, group)
  assert labels.dtype == jnp.int32
  ones = np.asarray(labels).reshape(4, group).sum(axis=1)
  np.testing.assert_array_equal(ones, [group // 2] * 4)


@pytest.mark.parametrize("group", [1, 2, 3, 5])
def test_false_pairs_are_found_among_labels_rounded_up(group, key):
  labels = matching.half_labels(key, 4 * group, group, round_up=True)
  rows = np.asarray(matching.false_rows(labels, group)).reshape(4, -1)
  assert rows.shape[1] == group // 2
  for own, false in zip(np.asarray(labels).reshape(4, -1), rows, strict=True):
    assert own.sum() == (group + 1) // 2
    np.testing.assert_array_equal(np.flatnonzero(own == 0), np.sort(false))


def test_true_labels_fall_on_every_place_alike(key):
  labels = np.asarray(half_labels(key, 4 * 3000, 4)).reshape(-1, 4)
  _, p = scipy.stats.chisquare(labels.sum(axis=0))
  assert p > 1e-3
  assert len(np.unique(labels, axis=0)) == 6


def test_random_negatives_show_another_image_of_the_group(key):
  ids = np.random.default_rng(0).integers(0, 5, (64, 1)).astype(np.int32)
  for group in (4, 16, 64):
    index, ok = random_negatives(ids, key, group)
    drawn = chosen_ids(ids, index, group)
    assert np.all(drawn[np.asarray(ok)] != ids[np.asarray(ok)])
    has_other = ~same_in_groups(ids, group).all(axis=2).reshape(-1)
    np.testing.assert_array_equal(ok, has_other)
    assert np.all((np.asarray(index) >= 0) & (np.asarray(index) < group))


def test_random_negatives_are_uniform_over_what_is_allowed(key):
  ids = np.tile(np.array([[0], [0], [1], [2], [3]], np.int32), (3000, 1))
  index, _ = random_negatives(ids, key, 5)
  counts = np.bincount(np.asarray(index).reshape(-1, 5)[:, 0], minlength=5)
  assert np.all(counts[:2] == 0)
  _, p = scipy.stats.chisquare(counts[2:])
  assert p > 1e-3


def test_a_group_of_one_image_has_no_negative(key):
  ids = np.array([[3], [3], [3], [1], [2], [1]], np.int32)
  index, ok = random_negatives(ids, key, 3)
  np.testing.assert_array_equal(ok, [False] * 3 + [True] * 3)
  _, ok = hard_negatives(jnp.zeros((2, 3, 3)), same_in_groups(ids, 3), key)
  np.testing.assert_array_equal(ok, [False] * 3 + [True] * 3)
  _, ok = random_negatives(ids, key, 1)
  assert not np.any(ok)


@pytest.mark.parametrize("tau", [0.001, 0.07, 1.0])
def test_hard_negatives_are_never_the_own_or_the_same_image(tau, key):
  rng = np.random.default_rng(0)
  ids = rng.integers(0, 6, (64, 1)).astype(np.int32)
  same = np.asarray(same_in_groups(ids, 8))
  # The forbidden ones are by far the most similar.
  similarity = rng.uniform(-1, 1, same.shape) + 2 * same
  for i in range(20):
    index, ok = hard_negatives(
      jnp.asarray(similarity / tau, jnp.float32),
      same,
      jax.random.fold_in(key, i),
    )
    assert np.all(
      chosen_ids(ids, index, 8)[np.asarray(ok)] != ids[np.asarray(ok)]
    )
  assert np.all(ok)


def test_hard_negatives_follow_the_softmax_of_similarity(key):
  logits = np.array([0.0, 0.3, 1.5, 1.0, -1.0], np.float32)
  same = np.array([1, 0, 0, 0, 0], bool)
  shape = (6000, 5, 5)
  index, _ = hard_negatives(
    jnp.broadcast_to(logits[None, None], shape),
    jnp.broadcast_to(same[None, None], shape),
    key,
  )
  counts = np.bincount(np.asarray(index), minlength=5)
  assert counts[0] == 0
  share = np.exp(logits[1:]) / np.exp(logits[1:]).sum()
  _, p = scipy.stats.chisquare(counts[1:], share * counts.sum())
  assert p > 1e-3


def test_a_tiny_temperature_picks_the_most_similar(key):
  rng = np.random.default_rng(1)
  same = np.broadcast_to(np.eye(8, dtype=bool), (3, 8, 8))
  similarity = rng.permuted(
    np.broadcast_to(np.linspace(-1, 1, 8), same.shape), axis=2
  )
  index, ok = hard_negatives(
    jnp.asarray(similarity / 0.001, jnp.float32), same, key
  )
  wanted = np.where(same, -np.inf, similarity).argmax(axis=2).reshape(-1)
  np.testing.assert_array_equal(index, wanted)
  assert np.all(ok)


def test_hard_negatives_pass_no_gradient_to_similarities(key):
  same = np.eye(4, dtype=bool)[None]
  items = jnp.asarray(np.random.default_rng(2).standard_normal((4, 1, 3)))

  def loss(similarity):
    index, _ = hard_negatives(similarity, same, key)
    taken = matching.take_from_group(items, index, 4)
    return jnp.sum(taken) + jnp.sum(similarity)

  grad = jax.grad(loss)(jnp.ones((1, 4, 4)))
  np.testing.assert_array_equal(grad, np.ones((1, 4, 4)))


def test_draws_depend_on_the_key_only(key):
  ids = np.arange(32, dtype=np.int32)[:, None]
  first, _ = random_negatives(ids, key, 16)
  again, _ = random_negatives(ids, key, 16)
  other, _ = random_negatives(ids, jax.random.key(1), 16)
  np.testing.assert_array_equal(first, again)
  assert np.any(np.asarray(first) != np.asarray(other))


def test_taken_rows_come_from_the_own_group():
  items = np.arange(12, dtype=np.float32).reshape(6, 1, 2)
  index = np.array([2, 0, 1, 0, 0, 2], np.int32)
  found = matching.take_from_group(jnp.asarray(items), jnp.asarray(index), 3)
  np.testing.assert_array_equal(found, items[[2, 0, 1, 3, 3, 5]])


def test_pairs_that_do_not_count_reach_neither_loss_nor_accuracy():
  logits = np.array([[2.0, 0.5], [0.0, 9.0], [-1.0, 3.0]], np.float32)
  labels = np.array([0, 0, 1], np.int32)
  ok = np.array([True, False, True])
  for function in (matching.match_cross_entropy, matching.accuracy):
    np.testing.assert_allclose(
      function(logits, labels, ok), function(logits[ok], labels[ok]), rtol=1e-6
    )
    assert function(logits, labels, np.zeros(3, bool)) == 0.0
    np.testing.assert_array_equal(
      function(logits, labels), function(logits, labels, np.ones(3, bool))
    )


def test_negatives_of_both_sides_are_drawn_by_rows_and_by_columns(key):
  # Text 0 is like image 2, image 0 is like text 1.
  similarity = np.zeros((1, 3, 3), np.float32)
  similarity[0, 0, 2] = similarity[0, 1, 0] = 100.0
  same = np.eye(3, dtype=bool)[None]
  (image, image_ok), (text, text_ok) = matching.negatives_of_both(
    jnp.asarray(similarity), same, key
  )
  assert image[0] == 2 and text[0] == 1
  assert np.all(image_ok) and np.all(text_ok)


@pytest.mark.parametrize("tau", [1e-3, 1.0])
@pytest.mark.parametrize("equal", [True, False])
def test_no_side_draws_what_shows_the_same(tau, equal, key):
  rng = np.random.default_rng(0)
  ids = rng.integers(0, 4, (32, 1)).astype(np.int32)
  ids[:8] = 5  # a group of one image
  same = np.asarray(same_in_groups(ids, 8))
  similarity = np.zeros(same.shape) if equal else rng.uniform(-1, 1, same.shape)
  similarity = jnp.asarray((similarity + same) / tau, jnp.float32)
  draw = jax.jit(matching.negatives_of_both)
  for i in range(20):
    for index, ok in draw(similarity, same, jax.random.fold_in(key, i)):
      ok = np.asarray(ok)
      assert np.all(chosen_ids(ids, index, 8)[ok] != ids[ok])
      np.testing.assert_array_equal(ok, ~same.all(axis=2).reshape(-1))
      assert not ok[:8].any() and ok[8:].all()


def test_both_sides_pass_no_gradient_to_similarities(key):
  same = np.eye(4, dtype=bool)[None]

  def loss(similarity):
    negatives = matching.negatives_of_both(similarity, same, key)
    items = similarity.reshape(4, 4)
    return sum(
      jnp.sum(matching.take_from_group(items, index, 4) * 0.0)
      for index, _ in negatives
    )

  grad = jax.grad(loss)(jnp.ones((1, 4, 4)))
  np.testing.assert_array_equal(grad, np.zeros((1, 4, 4)))


def test_similarities_are_cosines_of_texts_with_the_images_of_their_group():
  rng = np.random.default_rng(0)
  text, image = rng.normal(size=(2, 6, 5)).astype(np.float32)
  found = matching.similarity_in_groups(
    jnp.asarray(text), jnp.asarray(image), 3
  )
  unit = [v / np.linalg.norm(v, axis=1, keepdims=True) for v in (text, image)]
  for group in range(2):
    rows = slice(3 * group, 3 * group + 3)
    np.testing.assert_allclose(
      found[group], unit[0][rows] @ unit[1][rows].T, atol=1e-6
    )


@pytest.mark.parametrize("index", [[], [2, 0], [2, 0, 1, 1, 0, 0, 2, 2]])
def test_any_number_of_items_is_taken_of_each_group(index):
  items = np.arange(12, dtype=np.float32).reshape(6, 2)
  found = matching.take_from_group(
    jnp.asarray(items), jnp.asarray(index, jnp.int32), 3
  )
  half = len(index) // 2
  rows = [i + 3 * (n >= half) for n, i in enumerate(index)]
  np.testing.assert_array_equal(found, items[rows])


def test_items_of_any_rank_are_taken():
  valid = np.array([[1, 1], [1, 0], [0, 0], [0, 1]], bool)
  found = matching.take_from_group(
    jnp.asarray(valid), jnp.array([1, 0, 0, 1]), 2
  )
  np.testing.assert_array_equal(found, valid[[1, 0, 2, 3]])
