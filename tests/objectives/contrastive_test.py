"""InfoNCE against a slow version written from its equation."""

from __future__ import annotations

import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from glscl_jax.objectives import contrastive
from tests.objectives import plain_contrast

# One compiled program a setting is cheaper than operation by operation.
info_nce = jax.jit(
  contrastive.info_nce,
  static_argnames=("same_image", "group", "reduce", "block"),
)
# Rows 0 and 1, 2 and 4 share the first id; 0 and 5, 2 and 3 the second.
IDS = np.array([[4, 0], [4, 1], [7, 2], [2, 2], [7, 3], [5, 0]], np.int32)


def slow_info_nce(query, key, tau, *, valid, identity, sample, same, group):
  """Plain loops over pairs, float64, sum of both directions."""
  query, key = (
    v / np.maximum(np.linalg.norm(v, axis=1, keepdims=True), 1e-8)
    for v in (np.asarray(query, float), np.asarray(key, float))
  )
  losses = []
  for start in range(0, len(query), group):
    rows = [i for i in range(start, start + group) if valid[i]]
    total = 0.0
    for a, b in ((query, key), (key, query)):
      for i in rows:

        def twin(j, i=i):
          agree = any(a == b for a, b in zip(*identity[[i, j]], strict=True))
          return agree and sample[i] != sample[j]

        ignored = [j for j in rows if same == "ignore" and twin(j)]
        columns = [j for j in rows if j not in ignored]
        logits = {j: a[i] @ b[j] / tau for j in columns}
        top = max(logits.values())
        log_sum = top + np.log(sum(np.exp(v - top) for v in logits.values()))
        targets = [
          j for j in columns if j == i or (same == "positive" and twin(j))
        ]
        total += np.mean([log_sum - logits[j] for j in targets]) / len(rows)
    losses.append(total)
  return np.mean(losses)


def pairs(rows=6, width=8, seed=0):
  rng = np.random.default_rng(seed)
  query = rng.standard_normal((rows, width)).astype(np.float32)
  return query, (query + rng.standard_normal(query.shape)).astype(np.float32)


@pytest.mark.parametrize("same", ["none", "ignore", "positive"])
@pytest.mark.parametrize("group", [None, 3, 2])
@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("tau", [1.0, 0.03])
def test_info_nce_equals_the_loop_over_pairs(same, group, holes, tau):
  query, key = pairs()
  valid = np.array([1, 1, 1, 0, 1, 0] if holes else [1] * 6, bool)
  sample = np.array([0, 0, 1, 2, 3, 4], np.int32)  # rows 0 and 1: tokens of one
  found = info_nce(
    query,
    key,
    tau,
    valid_A=jnp.asarray(valid),
    identity_AM=jnp.asarray(IDS),
    sample_A=jnp.asarray(sample),
    same_image=same,
    group=group,
  )
  wanted = slow_info_nce(
    query,
    key,
    tau,
    valid=valid,
    identity=IDS,
    sample=sample,
    same=same,
    group=group or 6,
  )
  np.testing.assert_allclose(found, wanted, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("same", ["none", "ignore", "positive"])
@pytest.mark.parametrize(("group", "block"), [(None, 4), (None, 1), (3, 2)])
def test_blocks_change_no_value(same, group, block):
  # Blocks of 4 are two of 3; a group of 3 is a block of 2 and one half empty.
  query, key = pairs()
  valid = np.array([1, 1, 1, 0, 1, 0], bool)
  sample = np.array([0, 0, 1, 2, 3, 4], np.int32)
  found = info_nce(
    query,
    key,
    0.1,
    valid_A=valid,
    identity_AM=IDS,
    sample_A=sample,
    same_image=same,
    group=group,
    block=block,
  )
  wanted = slow_info_nce(
    query,
    key,
    0.1,
    valid=valid,
    identity=IDS,
    sample=sample,
    same=same,
    group=group or 6,
  )
  np.testing.assert_allclose(found, wanted, rtol=1e-6)


def exact(values_and_gradients, *point):
  """What a function gives in float64."""
  with jax.enable_x64(True):
    wide = [np.asarray(v, np.float64) for v in point]
    return jax.jit(values_and_gradients)(*wide)


@pytest.mark.parametrize("same", ["none", "ignore", "positive"])
@pytest.mark.parametrize(
  ("rows", "group", "block"), [(37, None, None), (37, None, 8), (39, 13, 5)]
)
def test_gradients_equal_those_of_the_plain_formula(same, rows, group, block):
  rng = np.random.default_rng(3)
  options = dict(
    valid_A=rng.random(rows) > 0.2,
    identity_AM=rng.integers(0, rows // 2, (rows, 2), np.int32),
    sample_A=np.arange(rows, dtype=np.int32) // 2,
    same_image=same,
    group=group,
  )

  def both(function, **more):
    return jax.value_and_grad(
      lambda *point: function(*point, **options, **more), (0, 1, 2)
    )

  point = *pairs(rows, 16), np.float32(0.1)
  found = jax.jit(both(contrastive.info_nce, block=block))(*point)
  wanted = exact(both(plain_contrast.info_nce), *point)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    assert b.dtype == np.float64
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * np.abs(b).max())


def sizes(jaxpr):
  """Elements of every array that a program makes, inner programs included."""
  for equation in jaxpr.eqns:
    yield from (v.aval.size for v in equation.outvars)
    for inner in jax.extend.core.jaxprs_in_params(equation.params):
      yield from sizes(inner)


@pytest.mark.parametrize("group", [None, 32])
def test_no_array_is_larger_than_a_block_or_the_rows(group):
  rows, width, block = 64, 4, 16
  x = np.ones((rows, width), np.float32)

  def largest(block):
    def both(query, key):
      ids = jnp.zeros((rows, 2), int)
      loss = functools.partial(
        contrastive.info_nce, identity_AM=ids, group=group, block=block
      )
      return (
        jax.value_and_grad(loss, (0, 1, 2))(query, key, 0.1),
        contrastive.accuracy(query, key, ids, block=block),
      )

    return max(sizes(jax.make_jaxpr(both)(x, x).jaxpr))

  assert largest(block) == max(rows * width, block**2)
  assert largest(None) == rows * rows  # the test sees a whole matrix


@pytest.mark.parametrize("same", ["none", "ignore", "positive"])
def test_nothing_valid_gives_zero_and_no_gradient(same):
  query, key = pairs()

  def loss(query, key):
    return info_nce(
      query,
      key,
      0.03,
      valid_A=np.zeros(6, bool),
      identity_AM=IDS,
      same_image=same,
    )

  value, grads = jax.jit(jax.value_and_grad(loss, (0, 1)))(query, key)
  assert value == 0
  assert all(np.all(np.asarray(grad) == 0) for grad in grads)


def test_no_rows_give_zero():
  nothing = np.zeros((0, 4), np.float32)
  assert contrastive.info_nce(nothing, nothing, 0.1, block=2) == 0


@pytest.mark.parametrize("same", ["none", "ignore", "positive"])
def test_one_sample_has_nothing_to_confuse(same):
  query, key = pairs(rows=1)
  value, grad = jax.value_and_grad(
    lambda q: info_nce(q, key, 0.03, same_image=same)
  )(query)
  assert value == 0
  assert np.all(np.asarray(grad) == 0)


def test_one_image_only_leaves_nothing_to_ignore_but_the_pair():
  query, key = pairs()
  ids = np.zeros((6, 1), np.int32)
  value = info_nce(query, key, 0.1, identity_AM=ids)
  np.testing.assert_allclose(value, 0, atol=1e-6)


def test_equal_scores_cost_the_logarithm_of_their_number():
  ones = np.ones((8, 4), np.float32)
  value = info_nce(ones, ones, 0.03, reduce="mean")
  np.testing.assert_allclose(value, np.log(8), rtol=1e-6)


@pytest.mark.parametrize("tau", [0.001, 0.03, 1.0])
def test_values_and_gradients_stay_finite_at_any_temperature(tau):
  query, key = pairs()
  value, grads = jax.value_and_grad(info_nce, (0, 1, 2))(query, key, tau)
  assert np.isfinite(value)
  assert all(np.all(np.isfinite(grad)) for grad in grads)


def test_a_zero_vector_has_a_finite_gradient():
  query, key = pairs()
  query[2] = 0
  value, grad = jax.value_and_grad(info_nce)(query, key, 0.03)
  assert np.isfinite(value)
  assert np.all(np.isfinite(grad))


def test_gradients_equal_finite_differences():
  query, key = pairs()
  rng = np.random.default_rng(2)

  def slow(query, key, tau):
    return slow_info_nce(
      query,
      key,
      tau,
      valid=np.ones(6, bool),
      identity=IDS,
      sample=np.arange(6),
      same="ignore",
      group=6,
    )

  def loss(query, key, tau):
    return info_nce(query, key, tau, identity_AM=IDS)

  point = (query, key, np.float32(0.2))
  grads = jax.jit(jax.grad(loss, (0, 1, 2)))(*point)
  for index, grad in enumerate(grads):
    step = 1e-5 * rng.standard_normal(np.shape(grad))
    ends = [
      slow(
        *(
          np.asarray(v, float) + s * (step if i == index else 0)
          for i, v in enumerate(point)
        )
      )
      for s in (-0.5, 0.5)
    ]
    np.testing.assert_allclose(
      np.sum(np.asarray(grad) * step), ends[1] - ends[0], rtol=1e-3
    )


def test_normalize_gives_unit_length_and_keeps_tiny_vectors_tiny():
  x = np.array([[3.0, 4.0], [0.0, 0.0], [1e-12, 0.0]], np.float32)
  found = contrastive.normalize(x)
  wanted = [[0.6, 0.8], [0, 0], [1e-4, 0]]
  np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_normalize_computes_in_float32():
  x = jnp.full((1, 4096), 0.01, jnp.bfloat16)
  found = contrastive.normalize(x)
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(jnp.linalg.norm(found), 1, rtol=1e-5)


def test_scale_gradient_changes_gradients_only():
  x = jnp.asarray(pairs()[0])

  def loss(x, scale):
    return jnp.sum(jnp.sin(contrastive.scale_gradient(x, scale)))

  value, grad = jax.value_and_grad(loss)(x, 1.0)
  for scale in (0.125, 0.0):
    scaled_value, scaled = jax.value_and_grad(loss)(x, scale)
    np.testing.assert_allclose(scaled_value, value, rtol=1e-6)
    np.testing.assert_allclose(scaled, scale * grad, rtol=1e-5)


def test_itc_is_symmetric_in_image_and_text():
  image, text = pairs()
  settings = dict(identity_BM=IDS, same_image="ignore")
  found = contrastive.image_text_contrast(image, text, 0.07, **settings)
  mirrored = contrastive.image_text_contrast(text, image, 0.07, **settings)
  wanted = slow_info_nce(
    image,
    text,
    0.07,
    valid=np.ones(6, bool),
    identity=IDS,
    sample=np.arange(6),
    same="ignore",
    group=6,
  )
  np.testing.assert_allclose(found, wanted / 2, rtol=1e-5)
  np.testing.assert_allclose(mirrored, found, rtol=1e-6)


def test_accuracy_counts_queries_that_find_their_key():
  key = np.eye(4, dtype=np.float32)
  query = key[[0, 1, 3, 2]] * 5
  ids = np.arange(4)[:, None]
  assert contrastive.accuracy(query, key, ids) == 0.5


def test_accuracy_counts_keys_that_show_the_same():
  key = np.eye(4, dtype=np.float32)
  query = key[[1, 0, 3, 2]]
  ids = np.array([[0, 5], [0, 6], [1, 7], [2, 8]])
  assert contrastive.accuracy(query, key, ids) == 0.5


@pytest.mark.parametrize("block", [None, 5, 1])
def test_accuracy_equals_the_loop_over_queries(block):
  query, key = pairs(17, 4)
  key[11] = key[3]  # equally similar: the first of them counts
  query[:3] = key[3]
  ids = np.random.default_rng(4).integers(0, 5, (17, 2), np.int32)
  ids[:3], ids[3], ids[11] = [5, 5], [5, 0], [6, 0]
  units = query / np.linalg.norm(query, axis=1, keepdims=True)
  others = key / np.linalg.norm(key, axis=1, keepdims=True)
  best = np.argmax(np.round(units @ others.T, 5), axis=1)
  assert list(best[:3]) == [3, 3, 3]
  hits = [np.any(ids[i] == ids[j]) for i, j in enumerate(best)]
  found = contrastive.accuracy(query, key, ids, block=block)
  np.testing.assert_allclose(found, np.mean(hits), rtol=1e-6)


def test_rows_show_the_same_if_they_agree_in_any_column():
  found = contrastive.show_the_same(jnp.array([[0, 1], [0, 2], [1, 2]]))
  np.testing.assert_array_equal(
    found, [[True, True, False], [True, True, True], [False, True, True]]
  )
