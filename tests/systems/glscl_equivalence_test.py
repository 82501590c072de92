"""Settings that change how a step is computed, but not what comes out."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glscl_jax import config as config_lib
from glscl_jax.systems import glscl
from glscl_jax.types import Batch
from tests import random_pairs

B, T, R, VOCAB = 4, 8, 32, 50


def make_config(model=None, fusion=None, **objectives) -> config_lib.Config:
  """One head wide, two layers deep, no dropout."""
  return config_lib.Config(
    model=config_lib.ModelConfig(
      vision=config_lib.VisionConfig(
        image_size=R, patch_size=8, width=64, depth=2
      ),
      text=config_lib.TextConfig(
        vocab_size=VOCAB, max_length=T, width=64, depth=2, dropout=0.0
      ),
      fusion=config_lib.FusionConfig(
        **({"width": 64, "depth": 2, "dropout": 0.0} | (fusion or {}))
      ),
      joint_width=32,
      init_std=0.2,
      compute_dtype="float32",
      **({"remat": "none"} | (model or {})),
    ),
    data=config_lib.DataConfig(batch_size=B),
    objectives=config_lib.ObjectiveConfig(
      **({"neg_group": B, "mltc_text_group": B} | objectives)
    ),
  )


def make_batch() -> Batch:
  rng = np.random.default_rng(0)
  lengths = np.array([8, 5, 3, 7])
  valid = np.arange(T)[None] < lengths[:, None]
  ids = np.where(valid, rng.integers(4, VOCAB, (B, T)), 1).astype(np.int32)
  pos = np.array([[1, 3], [2, 0], [1, 0], [4, 6]], np.int32)
  ok = np.array([[1, 1], [1, 0], [1, 0], [1, 1]], bool)
  hidden = ids.copy()
  for row in range(B):
    hidden[row, pos[row][ok[row]]] = VOCAB - 1
  patches = np.stack([rng.permutation(16) for _ in range(B)]).astype(np.int32)
  return Batch(
    image_BYXC=rng.integers(0, 256, (B, R, R, 3)).astype(np.uint8),
    identity_BM=np.array([[0], [1], [2], [1]], np.int32),
    text_ids_BT=ids,
    text_valid_BT=valid,
    mlm_ids_BT=hidden,
    mlm_pos_BJ=pos,
    mlm_labels_BJ=np.where(ok, np.take_along_axis(ids, pos, axis=1), 0),
    mlm_ok_BJ=ok,
    scl_ids_BT=hidden,
    scl_pos_BJ=pos,
    scl_ok_BJ=ok,
    keep_idx_BI=patches[:, :3],
    tok_idx_BI=patches[:, :4],
  )


FEW = dict(itm=0.0, itc=0.0, mgsc_text=0.0, mltc_image=0.0, mltc_text=0.0)


def losses(config, params) -> dict[str, np.ndarray]:
  @jax.jit
  def run(params, batch):
    return glscl.loss(
      params, batch, config=config, key=jax.random.key(1)
    ).metrics

  return jax.tree.map(np.asarray, run(params, make_batch()))


def test_unshared_texts_and_whole_last_layers_give_the_same_losses():
  # Without MLM and ITM: fewer passes to compile, every kind of row is read.
  config = make_config(mlm=0.0, itm=0.0)
  wasteful = make_config(
    fusion={"restrict_last_layer": False},
    share_text_dropout=False,
    mlm=0.0,
    itm=0.0,
  )
  shared, apart = (glscl.make_plan(c.objectives) for c in (config, wasteful))
  assert len(apart.text_versions) == len(shared.text_versions) + 2
  params = random_pairs.spread_params(config)
  usual, found = losses(config, params), losses(wasteful, params)
  assert set(found) == set(usual) and len(found) > 5
  for name, value in usual.items():
    np.testing.assert_allclose(found[name], value, rtol=2e-5, err_msg=name)


@pytest.mark.parametrize("objective", ["mlm", "mgsc_image"])
def test_a_stream_nobody_reads_has_no_last_layer_restricted_or_not(objective):
  weights = {name: 0.0 for name in config_lib.OBJECTIVES} | {objective: 1.0}
  usual, whole = (
    jax.eval_shape(
      functools.partial(
        glscl.init,
        make_config(
          fusion={"restrict_last_layer": restricted, "depth": 1}, **weights
        ),
      ),
      jax.random.key(0),
    )
    for restricted in (True, False)
  )
  assert len(usual["fusion"]["last"]) == 1
  assert jax.tree.map(jnp.shape, whole) == jax.tree.map(jnp.shape, usual)


@pytest.fixture(scope="module")
def few():
  """Parameters of MLM and MGSC image."""
  return random_pairs.spread_params(make_config(**FEW))


def test_clean_completion_targets_cost_one_more_pass(few):
  masked = make_config(**FEW)
  clean = make_config(completion_targets="clean", **FEW)
  plans = [set(glscl.make_plan(c.objectives).passes) for c in (masked, clean)]
  assert plans[1] - plans[0] == {glscl.Pass("full", "full")}
  usual, found = losses(masked, few), losses(clean, few)
  np.testing.assert_allclose(found["mlm"], usual["mlm"], rtol=2e-5)
  assert np.isfinite(found["mgsc_image"])
  assert abs(found["mgsc_image"] - usual["mgsc_image"]) > 1e-3


def loss_and_grads(config, params):
  @jax.jit
  def run(params, batch):
    def loss(params):
      key = jax.random.key(1)
      return glscl.loss(params, batch, config=config, key=key).loss

    return jax.value_and_grad(loss)(params)

  return run(params, make_batch())


@pytest.fixture(scope="module")
def scanned():
  """Parameters, loss and gradients of MLM alone: it reads every stack."""
  config = make_config(mgsc_image=0.0, **FEW)
  params = random_pairs.spread_params(config)
  return params, *loss_and_grads(config, params)


@pytest.mark.parametrize(
  "changes",
  [
    {"model": {"remat": "full"}},
    {"model": {"remat": "dots"}},
    {"model": {"scan": False}},
  ],
  ids=["remat full", "remat dots", "unrolled"],
)
def test_loss_and_gradients_do_not_depend_on_how_they_are_computed(
  scanned, changes
):
  params, usual_loss, usual_grads = scanned
  loss, grads = loss_and_grads(
    make_config(**changes, mgsc_image=0.0, **FEW), params
  )
  np.testing.assert_allclose(loss, usual_loss, rtol=1e-5)
  largest = max(float(jnp.max(jnp.abs(g))) for g in jax.tree.leaves(grads))
  assert largest > 0
  for found, wanted in zip(
    jax.tree.leaves(grads), jax.tree.leaves(usual_grads), strict=True
  ):
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5 * largest)
