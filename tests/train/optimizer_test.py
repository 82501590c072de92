import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from glscl_jax.config import OptimizerConfig
from glscl_jax.train import optimizer
from tests import random_pairs

# One parameter of each kind: (multiplier, decays, decays with decay_norms).
KINDS = {
  "vision/patch_kernel": (1, True, True),
  "vision/class_embedding": (1, False, True),
  "vision/mask_token/value": (1, False, True),
  "vision/position_embedding": (1, True, True),
  "vision/ln_pre/scale": (1, False, True),
  "vision/ln_pre/bias": (1, False, False),
  "vision/blocks/layers/norm1/scale": (1, False, True),
  "vision/blocks/layers/mlp/fc1/kernel": (1, True, True),
  "text/word_embedding": (1, True, True),
  "text/type_embedding": (1, True, True),
  "text/norm/scale": (1, False, False),
  "text/blocks/layers/norm2/scale": (1, False, False),
  "text/blocks/layers/attention/out/bias": (1, False, False),
  "fusion/text_transform/kernel": (5, True, True),
  "fusion/image_pooler/bias": (5, False, False),
  "fusion/stack/layers/image/norm3/scale": (5, False, False),
  "fusion/last/text/cross_attention/key/kernel": (5, True, True),
  "fusion/type_embedding/value": (1, True, True),
  "image_projection/norm/scale": (1, False, True),
  "text_projection/fc2/kernel": (1, True, True),
  "mlm_head/norm/scale": (5, False, False),
  "mlm_head/fc2/kernel": (5, True, True),
  "match_head/fc/bias": (5, False, False),
  "temperature/value": (1, False, True),
  "vision/patch_bias": (1, False, False),
  "text_cross/stack/layers/self_attention/query/kernel": (5, True, True),
  "image_cross/last/norm3/scale": (5, False, False),
  "decoder/last/mlp/fc1/bias": (5, False, False),
  "image_projection/kernel": (5, True, True),
  "text_projection/bias": (5, False, False),
  "pixel_head/fc/kernel": (5, True, True),
  "text/class_embedding": (1, False, False),
  "logit_scale/value": (1, False, False),
  "caption_decoder/last/cross_mlp/fc1/kernel": (5, True, True),
  "caption_decoder/stack/layers/context_norm/scale": (5, False, False),
  "image_decoder/last/self_norm/scale": (5, False, False),
  "image_positions/value": (5, True, True),
  "caption_head/norm/scale": (5, False, False),
  "caption_head/fc/kernel": (5, True, True),
  "region/mask_feature/value": (1, True, True),
  "region/box_norm/scale": (1, False, False),
  "region/feature/kernel": (1, True, True),
  "encoder/layers/attention/key/kernel": (1, True, True),
  "encoder/layers/norm2/scale": (1, False, False),
  "pooler/kernel": (5, True, True),
  "word_head/norm/scale": (5, False, False),
  "word_head/bias": (5, False, False),
  "region_head/fc2/kernel": (5, True, True),
}


@pytest.mark.parametrize("name", KINDS)
def test_learning_rate_and_decay_of_each_kind_of_parameter(name):
  multiplier, decays, by_accident = KINDS[name]
  config = OptimizerConfig()
  assert optimizer.lr_multiplier(name, config) == multiplier
  assert optimizer.decays(name, config) == decays
  published = OptimizerConfig(decay_norms=True)
  assert optimizer.decays(name, published) == by_accident


@pytest.mark.parametrize(
  ("step", "expected"),
  [(0, 0.0), (5, 0.5), (10, 1.0), (55, 0.5), (99, 1 / 90), (100, 0.0)],
)
def test_linear_schedule(step, expected):
  config = OptimizerConfig(learning_rate=2.0, warmup_fraction=0.1)
  schedule = optimizer.make_schedule(config, 100)
  assert float(schedule(step)) == pytest.approx(2.0 * expected, abs=1e-6)


@pytest.mark.parametrize(
  ("step", "expected"), [(0, 0.0), (10, 1.0), (55, 0.5), (100, 0.0)]
)
def test_cosine_schedule(step, expected):
  config = OptimizerConfig(
    learning_rate=2.0, warmup_fraction=0.1, schedule="cosine"
  )
  schedule = optimizer.make_schedule(config, 100)
  assert float(schedule(step)) == pytest.approx(2.0 * expected, abs=1e-6)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize(
  ("step", "expected"), [(0, 0.0), (10, 1.0), (55, 0.55), (100, 0.1)]
)
def test_the_decay_ends_at_a_share_of_the_peak(schedule, step, expected):
  config = OptimizerConfig(
    learning_rate=2.0,
    warmup_fraction=0.1,
    schedule=schedule,
    final_fraction=0.1,
  )
  found = optimizer.make_schedule(config, 100)(step)
  assert float(found) == pytest.approx(2.0 * expected, abs=1e-6)


def test_without_warm_up_the_first_step_has_the_full_rate():
  config = OptimizerConfig(learning_rate=2.0, warmup_fraction=0.0)
  assert float(optimizer.make_schedule(config, 100)(0)) == 2.0


def draw(seed, scale=1.0):
  rng = np.random.default_rng(seed)
  shapes = {
    "text": {"word_embedding": (5, 3)},
    "mlm_head": {"fc1": {"kernel": (3, 4), "bias": (4,)}},
    "vision": {"ln_pre": {"scale": (3,)}},
  }
  return jax.tree.map(
    lambda shape: jnp.asarray(scale * rng.normal(size=shape), jnp.float32),
    shapes,
    is_leaf=lambda x: isinstance(x, tuple),
  )


def run(config, *, steps=4, num_steps=20):
  """Parameters after some steps on random gradients."""
  transform = optimizer.make_optimizer(config, num_steps)
  params = draw(0)
  state = transform.init(params)
  for step in range(steps):
    updates, state = transform.update(draw(step + 1), state, params)
    params = optax.apply_updates(params, updates)
  return params, state


def assert_close(a, b, rtol=1e-5):
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=1e-7), a, b
  )


def test_standard_adamw_equals_optax():
  config = OptimizerConfig(
    learning_rate=0.1,
    weight_decay=0.3,
    fusion_multiplier=1.0,
    head_multiplier=1.0,
  )
  found, _ = run(config)
  decayed = {
    "text": {"word_embedding": True},
    "mlm_head": {"fc1": {"kernel": True, "bias": False}},
    "vision": {"ln_pre": {"scale": False}},
  }
  transform = optax.adamw(
    optimizer.make_schedule(config, 20),
    b1=config.beta1,
    b2=config.beta2,
    eps=config.eps,
    weight_decay=0.3,
    mask=decayed,
  )
  params = draw(0)
  state = transform.init(params)
  for step in range(4):
    updates, state = transform.update(draw(step + 1), state, params)
    params = optax.apply_updates(params, updates)
  assert_close(found, params)


def by_hand(config, *, steps, num_steps):
  """The published order of AdamW, one array after the other."""
  b1, b2 = config.beta1, config.beta2
  schedule = optimizer.make_schedule(config, num_steps)

  def follow(path, param):
    name = "/".join(entry.key for entry in path)
    m = v = np.zeros_like(param, np.float64)
    p = np.asarray(param, np.float64)
    for step in range(steps):
      gradients = jax.tree_util.tree_leaves_with_path(draw(step + 1))
      g = np.asarray(dict(gradients)[path], np.float64)
      t = step + 1
      m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
      rate = float(schedule(step)) * (5 if name.startswith("mlm") else 1)
      scale = rate * math.sqrt(1 - b2**t) / (1 - b1**t)
      p = p - scale * m / (np.sqrt(v) + config.eps)
      if name.endswith(("kernel", "embedding")):
        p = p - rate * config.weight_decay * p
    return p

  return jax.tree_util.tree_map_with_path(follow, draw(0))


def test_hf_variant_follows_its_formula():
  # A large eps: only there does the place of the bias correction show.
  config = OptimizerConfig(
    learning_rate=0.1, weight_decay=0.3, eps=0.1, variant="hf"
  )
  expected = by_hand(config, steps=4, num_steps=20)
  assert_close(run(config)[0], expected)
  standard, _ = run(dataclasses.replace(config, variant="standard"))
  assert not np.allclose(
    standard["text"]["word_embedding"], expected["text"]["word_embedding"]
  )


def test_heads_move_by_their_multiplier():
  config = OptimizerConfig(
    learning_rate=0.1, weight_decay=0.0, head_multiplier=3.0
  )
  moved, _ = run(config)
  single, _ = run(dataclasses.replace(config, head_multiplier=1.0))
  start = draw(0)["mlm_head"]["fc1"]["bias"]
  np.testing.assert_allclose(
    moved["mlm_head"]["fc1"]["bias"] - start,
    3 * (single["mlm_head"]["fc1"]["bias"] - start),
    rtol=1e-4,
  )
  np.testing.assert_array_equal(
    moved["text"]["word_embedding"], single["text"]["word_embedding"]
  )


@pytest.mark.parametrize("factor", [10.0, 0.1], ids=["clipped", "small"])
def test_gradients_are_clipped_by_their_global_norm(factor):
  gradients = draw(1)
  norm = float(optax.tree.norm(gradients))
  config = OptimizerConfig(clip_norm=norm / factor)
  transform = optimizer.make_optimizer(config, 20)
  _, state = transform.update(gradients, transform.init(draw(0)), draw(0))
  moments = random_pairs.moments(state)
  expected = jax.tree.map(
    lambda g: (1 - config.beta1) * g / max(factor, 1.0), gradients
  )
  assert_close(moments.mu, expected)


def test_without_clipping_gradients_of_any_size_pass():
  config = OptimizerConfig()
  transform = optimizer.make_optimizer(config, 20)
  gradients = draw(1, scale=1e6)
  _, state = transform.update(gradients, transform.init(draw(0)), draw(0))
  moments = random_pairs.moments(state)
  assert_close(
    moments.mu, jax.tree.map(lambda g: (1 - config.beta1) * g, gradients)
  )


def muon_updates(config):
  """The first update of a table, a bias and two stacked matrices."""
  rng = np.random.default_rng(0)
  shapes = {
    "text": {"word_embedding": (6, 8)},
    "fusion": {"stack": {"layers": {"mlp": {"fc1": {"kernel": (2, 8, 32)}}}}},
    "mlm_head": {"fc1": {"bias": (8,)}, "fc2": {"kernel": (8, 6)}},
  }
  params, gradients = (
    jax.tree.map(
      lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32),
      shapes,
      is_leaf=lambda x: isinstance(x, tuple),
    )
    for _ in range(2)
  )
  transform = optimizer.make_optimizer(config, 20)
  updates, _ = transform.update(gradients, transform.init(params), params)
  return updates


def test_muon_moves_each_layer_along_an_orthogonal_matrix():
  config = OptimizerConfig(
    learning_rate=0.1,
    warmup_fraction=0.0,
    weight_decay=0.0,
    variant="muon",
    fusion_multiplier=1.0,
  )
  updates = muon_updates(config)
  kernel_NDF = updates["fusion"]["stack"]["layers"]["mlp"]["fc1"]["kernel"]
  for update_DF in np.asarray(kernel_NDF):
    # Five Newton-Schulz steps bring singular values near one, not to it.
    values = np.linalg.svd(update_DF, compute_uv=False)
    assert values.max() < 2 * values.min()
    rms = np.sqrt(np.mean(np.square(update_DF)))
    assert rms == pytest.approx(0.1 * config.muon_rms, rel=0.3)


def test_muon_leaves_tables_and_vectors_to_adam():
  config = OptimizerConfig(
    learning_rate=0.1, warmup_fraction=0.0, weight_decay=0.3
  )
  standard = muon_updates(config)
  muon = muon_updates(dataclasses.replace(config, variant="muon"))
  for part in ("text", "mlm_head"):
    jax.tree.map(np.testing.assert_array_equal, muon[part], standard[part])
