"""WRC, and the contrast of anchors over the batch, against slow versions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from glscl_jax.objectives import anchors

B, T, R, D, A = 3, 6, 5, 8, 4
TAU = 0.07


def example(*, words=(6, 4, 3), regions=(5, 2, 4), pairs=(3, 1, 2), seed=0):
  """States, validity and pairs; pairs of a sample are distinct cells."""
  rng = np.random.default_rng(seed)
  text = rng.standard_normal((B, T, D)).astype(np.float32)
  region = rng.standard_normal((B, R, D)).astype(np.float32)
  pos, place = np.zeros((2, B, A), np.int32)
  for b in range(B):
    cells = rng.permutation(max(1, words[b] * regions[b]))[: pairs[b]]
    pos[b, : len(cells)] = cells // max(1, regions[b])
    place[b, : len(cells)] = cells % max(1, regions[b])
  text_valid = np.arange(T)[None] < np.array(words)[:, None]
  region_valid = np.arange(R)[None] < np.array(regions)[:, None]
  ok = np.arange(A)[None] < np.array(pairs)[:, None]
  return (text, region, text_valid, region_valid), (pos, place, ok)


def unit(x):
  return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-8)


def slow(states, pairs):
  """Loss and accuracy, pair by pair."""
  text, region, text_valid, region_valid = states
  losses, hits = [], []
  for b in range(B):
    if not (text_valid[b].any() and region_valid[b].any()):
      continue
    rows, columns = text[b][text_valid[b]], region[b][region_valid[b]]
    logits = unit(rows.astype(float)) @ unit(columns.astype(float)).T / TAU
    found = list(
      zip(*(a[b][pairs[2][b]].tolist() for a in pairs[:2]), strict=True)
    )
    total = scipy.special.logsumexp(logits)
    if found:
      losses.append(np.mean([total - logits[cell] for cell in found]))
    hits += [(t, int(np.argmax(logits[t]))) in found for t, _ in found]
  mean = lambda x: np.mean(x) if x else 0.0  # noqa: E731
  return mean(losses), mean(hits)


@jax.jit
def compute(states, pairs):
  cosine = anchors.cells(*states)
  return (
    anchors.word_region_contrast(cosine, TAU, *pairs),
    anchors.accuracy(cosine, *pairs),
  )


@pytest.mark.parametrize(
  "sizes",
  [
    {},
    {"pairs": (4, 0, 1)},
    {"pairs": (0, 0, 0)},
    {"words": (6, 0, 3), "pairs": (3, 0, 1)},
    {"regions": (1, 1, 1), "words": (1, 1, 1), "pairs": (1, 1, 1)},
  ],
  ids=["pairs", "a sample without", "none", "a row of padding", "one cell"],
)
def test_each_sample_has_one_softmax_over_its_valid_cells(sizes):
  states, pairs = example(**sizes)
  loss, accuracy = slow(states, pairs)
  found = compute(states, pairs)
  assert float(found[0]) == pytest.approx(loss, rel=1e-5, abs=1e-6)
  assert float(found[1]) == pytest.approx(accuracy)


def test_the_loss_starts_at_the_logarithm_of_the_number_of_valid_cells():
  (text, region, *valid), pairs = example(pairs=(3, 3, 3), regions=(5, 5, 5))
  equal = np.ones_like(text), np.ones_like(region), *valid
  expected = np.mean(np.log([6 * 5, 4 * 5, 3 * 5]))
  assert float(compute(equal, pairs)[0]) == pytest.approx(expected, rel=1e-5)


def test_padding_of_any_content_and_length_does_not_matter():
  states, pairs = example()
  text, region, text_valid, region_valid = states
  loud = (
    np.where(text_valid[:, :, None], text, 100.0),
    np.where(region_valid[:, :, None], region, -100.0),
  )
  longer = (
    *(np.pad(a, ((0, 0), (0, 3), (0, 0)), constant_values=9.0) for a in loud),
    *(np.pad(a, ((0, 0), (0, 3))) for a in (text_valid, region_valid)),
  )
  for found, expected in zip(
    compute(longer, pairs), compute(states, pairs), strict=True
  ):
    assert float(found) == pytest.approx(float(expected), rel=1e-6)


def test_a_pair_with_padding_does_not_count():
  states, (pos, place, ok) = example(pairs=(3, 1, 2))
  expected = compute(states, (pos, place, ok))
  pos, place, ok = pos.copy(), place.copy(), ok.copy()
  pos[1, 3], place[1, 3], ok[1, 3] = 5, 4, True  # sample 1: 4 words, 2 regions
  for found, value in zip(
    compute(states, (pos, place, ok)), expected, strict=True
  ):
    assert float(found) == pytest.approx(float(value), rel=1e-6)


def test_the_number_of_pairs_does_not_scale_the_loss():
  states, (pos, place, ok) = example(pairs=(1, 1, 1))
  twice = tuple(np.repeat(a[:, :1], A, axis=1) for a in (pos, place, ok))
  assert float(compute(states, twice)[0]) == pytest.approx(
    float(compute(states, (pos, place, ok))[0]), rel=1e-6
  )


def test_a_word_that_names_two_regions_may_choose_either():
  states, _ = example()
  cosine = np.asarray(anchors.cells(*states))
  order = np.argsort(-cosine[0, 2])[:3]  # the three most similar regions
  for regions, hits in ((order[:2], 1.0), (order[1:], 0.0)):
    pos = np.full((B, A), 2, np.int32)
    place = np.zeros((B, A), np.int32)
    place[0, :2] = regions
    ok = np.zeros((B, A), bool)
    ok[0, :2] = True
    assert float(anchors.accuracy(cosine, pos, place, ok)) == hits


@pytest.mark.parametrize(
  "sizes",
  [
    {"pairs": (0, 0, 0)},
    {"words": (0, 0, 0), "regions": (0, 0, 0), "pairs": (0, 0, 0)},
    {},
  ],
  ids=["no pair", "padding alone", "zero states"],
)
def test_degenerate_input_has_finite_gradients(sizes):
  (text, region, *valid), pairs = example(**sizes)
  if not sizes:
    text, region = np.zeros_like(text), np.zeros_like(region)

  def loss(text, region):
    cosine = anchors.cells(text, region, *valid)
    return anchors.word_region_contrast(cosine, TAU, *pairs)

  gradients = jax.grad(loss, argnums=(0, 1))(text, region)
  assert all(np.all(np.isfinite(g)) for g in gradients)
  if sizes:
    assert all(np.all(np.asarray(g) == 0) for g in gradients)


# --- the contrast of anchors ------------------------------------------------


def pair_example(classes, ok):
  rng = np.random.default_rng(1)
  word, region = rng.standard_normal((2, 2, 3, D)).astype(np.float32)
  return word, region, np.array(ok), np.array(classes, np.int32)


def slow_pairs(word, region, ok, classes):
  """Mean of both directions over all anchors; equal classes are left out."""
  queries, keys = (unit(x[ok].astype(float)) for x in (word, region))
  kinds = classes[ok]
  if not len(kinds):
    return 0.0
  total = 0.0
  for logits in (queries @ keys.T / TAU, keys @ queries.T / TAU):
    for i in range(len(kinds)):
      kept = [j for j in range(len(kinds)) if j == i or kinds[j] != kinds[i]]
      total += scipy.special.logsumexp(logits[i, kept]) - logits[i, i]
  return total / (2 * len(kinds))


@pytest.mark.parametrize(
  ("classes", "ok"),
  [
    ([[1, 2, 3], [4, 5, 6]], [[True, True, True], [True, True, False]]),
    ([[1, 1, 3], [1, 3, 6]], [[True, True, True], [True, True, True]]),
    ([[1, 1, 1], [1, 1, 1]], [[True, True, True], [True, True, True]]),
    ([[0, 0, 0], [0, 0, 0]], [[False] * 3, [False] * 3]),
  ],
  ids=["distinct", "some alike", "all alike", "none"],
)
def test_anchors_are_told_from_those_of_other_classes(classes, ok):
  items = pair_example(classes, ok)
  found = anchors.pair_contrast(*items, TAU, group=2)
  assert float(found) == pytest.approx(slow_pairs(*items), rel=1e-5, abs=1e-6)


def test_anchors_are_contrasted_within_their_group():
  items = pair_example([[1, 2, 3], [4, 5, 6]], [[True] * 3] * 2)
  alone = [slow_pairs(*(a[b : b + 1] for a in items)) for b in range(2)]
  found = anchors.pair_contrast(*items, TAU, group=1)
  assert float(found) == pytest.approx(np.mean(alone), rel=1e-5)


def test_both_sides_of_an_anchor_get_a_gradient():
  word, region, ok, classes = pair_example(
    [[1, 2, 3], [4, 5, 6]], [[True] * 3] * 2
  )
  gradients = jax.grad(
    lambda w, r: anchors.pair_contrast(w, r, ok, classes, TAU, group=2),
    argnums=(0, 1),
  )(jnp.asarray(word), jnp.asarray(region))
  assert all(np.all(np.linalg.norm(g, axis=2) > 0) for g in gradients)
