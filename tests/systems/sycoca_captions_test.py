"""Captions token by token: what is kept gives what the whole text gives."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glscl_jax.models.sycoca import SyCoCa
from glscl_jax.models.transformer import CocaBlock
from glscl_jax.systems import inputs, registry, sycoca
from glscl_jax.tasks import captioning, decoding
from tests import random_pairs
from tests.tasks import decoding_test


def make(**options):
  config = random_pairs.sycoca(
    "itc", "ic", batch_size=3, masking={"ic_mask": False}, **options
  )
  return config, random_pairs.spread_params(config)


def whole(config, params, batch):
  """Logits of each next token and image states, by the pass of training."""

  def method(model):
    encoded = sycoca.encode(model, batch, config)
    context = sycoca.Context(model, batch, encoded, None, config)
    return sycoca.caption_logits(context), encoded.image_BMD

  run = jax.jit(
    lambda params: SyCoCa(config.model).apply({"params": params}, method=method)
  )
  return jax.tree.map(np.asarray, run(params))


@functools.cache
def beginner(config):
  run = functools.partial(sycoca.begin_captions, config=config, length=9)
  return jax.jit(run)


@functools.cache
def extender(config):
  return jax.jit(functools.partial(sycoca.extend_captions, config=config))


@pytest.mark.parametrize(
  "options",
  [{"depth": 3}, {"depth": 1, "scan": False}],
  ids=["scanned", "one block, unrolled"],
)
def test_token_by_token_logits_are_those_of_the_whole_text(options):
  config, params = make(**options)
  batch = random_pairs.batch(config)
  expected, y_BID = whole(config, params, batch)
  ids_BT = batch.text_ids_BT
  logits, past = beginner(config)(params, ids_BT[:, 0], y_BID)
  found, extend = [logits], extender(config)
  for place in range(1, 9):
    logits, past = extend(params, ids_BT[:, place], past)
    found.append(logits)
  there = batch.text_valid_BT[:, :-1]
  assert there.sum() > 12
  np.testing.assert_allclose(
    np.stack(found, axis=1)[there], expected[there], atol=1e-5
  )


def test_captions_of_one_image_go_their_own_ways():
  """Two a picture, side by side; then both are those of the second one."""
  config, params = make(depth=3)
  y_BID = np.random.default_rng(1).standard_normal((3, 17, 64), np.float32)
  extend = extender(config)
  starts = np.zeros(3, np.int32)

  def alone(image, words):
    logits, past = beginner(config)(params, starts, y_BID)
    for word in words:
      logits, past = extend(params, np.full(3, word, np.int32), past)
    return logits[image]

  _, past = beginner(config)(params, starts, y_BID)
  past = past.take(jnp.array([0, 0, 1, 1, 2, 2]))
  _, past = extend(params, np.array([10, 11, 12, 13, 14, 15], np.int32), past)
  past = past.take(jnp.array([1, 1, 2, 3, 5, 4]))
  found, _ = extend(params, np.full(6, 20, np.int32), past)
  for row, first in enumerate([11, 11, 12, 13, 15, 14]):
    np.testing.assert_allclose(
      found[row], alone(row // 2, [first, 20]), atol=1e-5
    )


def test_captions_are_those_of_a_slow_search_without_a_cache():
  config, params = make(depth=1, scan=False)
  params["caption_head"]["fc"]["kernel"][:, random_pairs.END] *= 3
  batch = random_pairs.batch(config)
  never = (random_pairs.START, random_pairs.PAD, 63)
  options = decoding.Options(beam=3, max_tokens=6, min_tokens=2)
  run = functools.partial(
    captioning.caption,
    config=config,
    marks=captioning.Marks(
      start=random_pairs.START, end=random_pairs.END, never=never
    ),
    options=options,
  )
  found = jax.jit(run)(params, inputs.see_images(batch))

  @jax.jit
  def logits_of(params, batch):
    def method(model):
      encoded = sycoca.encode(model, batch, config)
      context = sycoca.Context(model, batch, encoded, None, config)
      return sycoca.caption_logits(context)

    return SyCoCa(config.model).apply({"params": params}, method=method)

  for image in range(3):

    def next_logits(words, image=image):
      said = [random_pairs.START, *words]
      ids_BT = np.full((3, 10), random_pairs.PAD, np.int32)
      ids_BT[:, : len(said)] = said
      valid_BT = np.tile(np.arange(10) < len(said), (3, 1))
      one = random_pairs.change(
        batch, text_ids_BT=ids_BT, text_valid_BT=valid_BT
      )
      return np.asarray(logits_of(params, one)[image, len(words)])

    words, score = decoding_test.slow_search(next_logits, options, never)
    assert found.ids_BL[image, : found.length_B[image]].tolist() == words
    assert float(found.score_B[image]) == pytest.approx(score, rel=1e-4)


def test_keys_of_the_image_are_made_once(monkeypatch):
  config = random_pairs.sycoca("itc", "ic", batch_size=4, depth=3)
  params = random_pairs.abstract_params(config)
  norms = []
  original = CocaBlock._extend

  def record(self, x, context, past):
    norms.append(past.context is None)
    return original(self, x, context, past)

  monkeypatch.setattr(CocaBlock, "_extend", record)
  ids_A = jax.ShapeDtypeStruct((4,), jnp.int32)
  y_BID = jax.ShapeDtypeStruct((4, 17, 64), jnp.float32)
  _, past = jax.eval_shape(
    functools.partial(sycoca.begin_captions, config=config, length=5),
    params,
    ids_A,
    y_BID,
  )
  assert all(norms) and norms
  norms.clear()
  logits, longer = jax.eval_shape(
    functools.partial(sycoca.extend_captions, config=config),
    params,
    ids_A,
    past,
  )
  assert not any(norms) and norms
  assert logits.shape == (4, 64)
  assert jax.tree.map(jnp.shape, longer) == jax.tree.map(jnp.shape, past)
  assert past.decoder.body.context.k_BHMK.shape == (2, 4, 1, 16, 64)


def test_captions_run_in_half_precision_under_strict_promotion():
  config = random_pairs.sycoca(
    "itc", "ic", batch_size=2, depth=2, compute_dtype="bfloat16"
  )
  system = registry.find(config)

  def run(params, ids_B, y_BID):
    logits, past = system.begin_captions(
      params, ids_B, y_BID, length=4, config=config
    )
    return logits, system.extend_captions(params, ids_B, past, config=config)

  with jax.numpy_dtype_promotion("strict"):
    first, (second, _) = jax.eval_shape(
      run,
      random_pairs.abstract_params(config),
      jax.ShapeDtypeStruct((2,), jnp.int32),
      jax.ShapeDtypeStruct((2, 17, 64), jnp.float32),
    )
  assert first.dtype == second.dtype == jnp.float32
