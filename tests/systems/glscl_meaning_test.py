"""What must not leak, what must not matter, and who gets a gradient."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glscl_jax import config as config_lib
from glscl_jax import sharding
from glscl_jax.models.towers import Towers
from glscl_jax.objectives import completion
from glscl_jax.systems import glscl, inputs
from glscl_jax.train import optimizer
from tests import random_pairs

OBJECTIVES = config_lib.SYSTEM_OBJECTIVES["glscl"]
ENCODERS = {
  "patches": random_pairs.config(),
  "patches, mean": random_pairs.config(
    vision={"class_state": "mean"}, text={"class_state": "mean"}
  ),
  "stem and words": random_pairs.config(**random_pairs.SMALL_DATA),
}
CONFIG = ENCODERS["patches"]
BATCH = random_pairs.batch(CONFIG)
PARAMS = random_pairs.spread_params(CONFIG)
KEY = jax.random.key(5)
ROWS = np.arange(CONFIG.data.batch_size)
# ITM draws its pairs by position in the batch.
WITHOUT_ITM = [name for name in OBJECTIVES if name != "itm"]


def gradients_and_losses(batch, params=PARAMS, config=CONFIG):
  gradients, metrics = random_pairs.gradient_function(config)(
    params, batch, KEY
  )
  return gradients, {name: float(metrics[name]) for name in metrics}


@pytest.fixture(scope="module")
def normal():
  return gradients_and_losses(BATCH)


@functools.cache
def encoded(encoder):
  """Batch, parameters, gradients and losses with these encoders."""
  config = ENCODERS[encoder]
  batch = random_pairs.batch(config)
  params = random_pairs.spread_params(config)
  return batch, params, *gradients_and_losses(batch, params, config)


@functools.cache
def image_states(encoder, changed_patch=None):
  """Encoder states of each version of the images, one patch redrawn."""
  config = ENCODERS[encoder]
  batch = random_pairs.batch(config)
  image_BYXC = batch.image_BYXC.copy()
  side = config.model.vision.patch_size
  if changed_patch is not None:
    for b, patch in enumerate(changed_patch):
      y, x = side * (patch // 4), side * (patch % 4)
      image_BYXC[b, y : y + side, x : x + side] ^= 0xFF
  batch = random_pairs.change(batch, image_BYXC=image_BYXC)
  params = random_pairs.spread_params(config)
  return jax.tree.map(np.asarray, _encode_images(config)(params, batch))


@functools.cache
def _encode_images(config):
  return jax.jit(
    lambda params, batch: Towers(config.model).apply(
      {"params": params},
      method=lambda model: glscl.encode_images(
        model, batch, ("full", "drop", "token"), config
      ),
    )
  )


# --- what must not leak -----------------------------------------------------


@pytest.mark.parametrize("encoder", ENCODERS)
def test_dropped_patches_reach_nothing_of_the_dropped_version(encoder):
  keep_idx_BI = random_pairs.batch(ENCODERS[encoder]).keep_idx_BI
  dropped = tuple(
    int(np.setdiff1d(np.arange(16), keep)[0]) for keep in keep_idx_BI
  )
  before, after = image_states(encoder), image_states(encoder, dropped)
  np.testing.assert_array_equal(before["drop"], after["drop"])
  assert not np.allclose(before["full"], after["full"], atol=1e-3)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_hidden_patches_reach_nothing_of_the_token_version(encoder):
  tok_idx_BI = random_pairs.batch(ENCODERS[encoder]).tok_idx_BI
  hidden = tuple(int(index) for index in tok_idx_BI[:, -1])
  before, after = image_states(encoder), image_states(encoder, hidden)
  np.testing.assert_array_equal(before["token"], after["token"])
  assert not np.allclose(before["full"], after["full"], atol=1e-3)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_kept_patches_reach_the_dropped_version(encoder):
  keep_idx_BI = random_pairs.batch(ENCODERS[encoder]).keep_idx_BI
  kept = tuple(int(index) for index in keep_idx_BI[:, 0])
  changed = image_states(encoder)["drop"] != image_states(encoder, kept)["drop"]
  assert np.all(np.any(changed, axis=(1, 2)))


def test_the_original_words_reach_mlm_only_as_labels():
  config = random_pairs.config(objectives=random_pairs.only("mlm"))
  run = random_pairs.gradient_function(config)
  params = random_pairs.spread_params(config)
  text_ids_BT = BATCH.text_ids_BT.copy()
  labels_BJ = BATCH.mlm_labels_BJ.copy()
  text_ids_BT[ROWS, BATCH.mlm_pos_BJ[:, 0]] = 50
  labels_BJ[:, 0] = 50
  before = run(params, BATCH, KEY)
  hidden = run(params, random_pairs.change(BATCH, text_ids_BT=text_ids_BT), KEY)
  jax.tree.map(np.testing.assert_array_equal, before, hidden)
  told = run(params, random_pairs.change(BATCH, mlm_labels_BJ=labels_BJ), KEY)
  assert not np.isclose(before[1]["mlm"], told[1]["mlm"])


def test_completion_targets_are_constants(normal, monkeypatch):
  for name in ("global_completion", "local_completion"):
    original = getattr(completion, name)

    def constant(masked, complete, *rest, original=original, **options):
      return original(masked, jax.lax.stop_gradient(complete), *rest, **options)

    monkeypatch.setattr(completion, name, constant)

  def scalar(params, batch, key):
    return glscl.loss(params, batch, config=CONFIG, key=key).loss

  constants = jax.jit(jax.grad(scalar))(PARAMS, BATCH, KEY)
  # Two programs round differently; targets that learn move it by hundredths.
  assert random_pairs.difference(constants, normal[0]) < 5e-5


@pytest.mark.parametrize("encoder", ENCODERS)
def test_padding_gets_exactly_no_gradient(encoder):
  batch, _, gradients, _ = encoded(encoder)
  gradients = gradients["text"]
  assert np.all(np.asarray(gradients["word_embedding"])[random_pairs.PAD] == 0)
  assert np.all(np.asarray(gradients["position_embedding"])[1] == 0)
  # Without blocks nobody reads the first token.
  first = 0 if ENCODERS[encoder].model.text.depth else 1
  valid_BT = batch.text_valid_BT[:, first:]
  used = np.unique(batch.text_ids_BT[:, first:][valid_BT])
  norms = np.linalg.norm(gradients["word_embedding"], axis=1)
  assert np.all(norms[used] > 0)


# --- what must not matter ---------------------------------------------------


def test_the_order_of_kept_patches_does_not_matter(normal):
  turned = random_pairs.change(
    BATCH, keep_idx_BI=np.ascontiguousarray(BATCH.keep_idx_BI[:, ::-1])
  )
  gradients, losses = gradients_and_losses(turned)
  assert losses == pytest.approx(normal[1], rel=1e-5, abs=1e-5)
  assert random_pairs.difference(gradients, normal[0]) < 1e-3


def test_the_order_of_the_batch_does_not_matter(normal):
  order = np.random.default_rng(0).permutation(len(ROWS))
  _, losses = gradients_and_losses(jax.tree.map(lambda a: a[order], BATCH))
  for name in WITHOUT_ITM:
    assert losses[name] == pytest.approx(normal[1][name], rel=1e-5), name


@pytest.mark.parametrize("encoder", ENCODERS)
def test_longer_padding_does_not_matter(encoder):
  batch, params, _, losses = encoded(encoder)
  model = ENCODERS[encoder].model
  text = dataclasses.replace(model.text, max_length=17)
  longer = dataclasses.replace(
    ENCODERS[encoder], model=dataclasses.replace(model, text=text)
  )
  pad = ((0, 0), (0, 7))
  columns = {
    name: np.pad(getattr(batch, name), pad, constant_values=value)
    for name, value in {
      "text_ids_BT": random_pairs.PAD,
      "mlm_ids_BT": random_pairs.PAD,
      "scl_ids_BT": random_pairs.PAD,
      "text_valid_BT": False,
    }.items()
  }
  output = random_pairs.loss_function(longer)(
    params, random_pairs.change(batch, **columns), KEY
  )
  for name in OBJECTIVES:
    assert float(output.metrics[name]) == pytest.approx(
      losses[name], rel=1e-5, abs=1e-5
    ), name


def test_slots_without_a_mask_do_not_matter(normal):
  # Slots that are not ok may point anywhere and carry any label.
  assert not np.all(BATCH.scl_ok_BJ)
  batch = random_pairs.change(
    BATCH, scl_pos_BJ=np.where(BATCH.scl_ok_BJ, BATCH.scl_pos_BJ, 9)
  )
  gradients, losses = gradients_and_losses(batch)
  assert losses == pytest.approx(normal[1], rel=1e-6)
  assert random_pairs.difference(gradients, normal[0]) < 1e-5


def test_bfloat16_products_change_losses_by_less_than_two_percent():
  # As narrow as fresh ones: wide ones make noise of the rounding.
  params = random_pairs.spread_params(CONFIG, spread=0.02)
  _, exact = gradients_and_losses(BATCH, params)
  half = random_pairs.config(compute_dtype="bfloat16")
  output = random_pairs.loss_function(half)(params, BATCH, KEY)
  assert float(output.loss) == pytest.approx(exact["loss"], rel=0.02)
  assert float(output.loss) != exact["loss"]
  assert {m.dtype.name for m in output.metrics.values()} == {"float32"}


# --- degenerate batches -----------------------------------------------------


def test_with_nothing_masked_the_text_losses_are_zero_and_all_is_finite():
  batch = random_pairs.change(
    BATCH,
    mlm_ok_BJ=np.zeros_like(BATCH.mlm_ok_BJ),
    scl_ok_BJ=np.zeros_like(BATCH.scl_ok_BJ),
  )
  gradients, losses = gradients_and_losses(batch)
  assert losses["mlm"] == losses["mltc_text"] == 0.0
  assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(gradients))
  assert np.all(np.asarray(gradients["mlm_head"]["fc2"]["kernel"]) == 0)


def test_captions_without_a_word_are_legal():
  batch = random_pairs.batch(CONFIG, num_real=(0, 0, 3, 8, 1, 2, 0, 5))
  assert not batch.mlm_ok_BJ[0].any()
  gradients, losses = gradients_and_losses(batch)
  assert all(np.isfinite(value) for value in losses.values())
  assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(gradients))


def test_a_batch_of_one_image_is_legal():
  batch = random_pairs.change(
    BATCH, identity_BM=np.zeros_like(BATCH.identity_BM)
  )
  gradients, losses = gradients_and_losses(batch)
  # Nobody is left in the denominators, and no false image can be shown.
  assert losses["itc"] == losses["mgsc_image"] == losses["mgsc_text"] == 0.0
  assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(gradients))


# --- who gets a gradient ----------------------------------------------------

BOTH = {"fusion/last/text", "fusion/last/image", "fusion/type_embedding"}
TEXT = BOTH - {"fusion/last/image"}
IMAGE = BOTH - {"fusion/last/text"}
EXTRA = {
  "mlm": TEXT | {"mlm_head"},
  "itm": BOTH | {"fusion/text_pooler", "fusion/image_pooler", "match_head"},
  "itc": {"text_projection", "image_projection", "temperature"},
  "mgsc_image": IMAGE,
  "mgsc_text": TEXT,
  "mltc_image": IMAGE | {"vision/mask_token"},
  "mltc_text": TEXT,
}
EVERYWHERE = {
  "vision/patch_kernel",
  "vision/class_embedding",
  "vision/position_embedding",
  "vision/ln_pre",
  "vision/ln_post",
  "vision/blocks",
  "text/word_embedding",
  "text/position_embedding",
  "text/type_embedding",
  "text/norm",
  "text/blocks",
  "fusion/text_transform",
  "fusion/image_transform",
}


def part_of(name):
  """`fusion/last/text`, `vision/blocks` or `mlm_head`."""
  depth = {"vision": 2, "text": 2, "fusion": 2}
  pieces = name.split("/")
  if pieces[:2] == ["fusion", "last"]:
    return "/".join(pieces[:3])
  return "/".join(
    pieces[: depth[pieces[0]]] if pieces[0] in depth else pieces[:1]
  )


def norms_of(gradients):
  """The length of each parameter's gradient, by name."""
  return {
    sharding.path_name(path): float(np.linalg.norm(leaf))
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients)
  }


def still(norms):
  """Parameters that do not move.

  A key bias moves all logits of a row alike: its gradient is zero on paper.
  """
  return [
    name
    for name, norm in norms.items()
    if not norm > 0 and not name.endswith("key/bias")
  ]


@pytest.mark.parametrize("encoder", ENCODERS)
def test_all_objectives_together_train_every_parameter(encoder):
  _, _, gradients, _ = encoded(encoder)
  norms = norms_of(gradients)
  assert not still(norms)
  rows = np.linalg.norm(gradients["vision"]["position_embedding"], axis=1)
  assert np.all(rows > 0)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_objective_alone_trains_what_it_reads_and_has_nothing_else(
  objective,
):
  config = random_pairs.config(objectives=random_pairs.only(objective))
  params = random_pairs.spread_params(config)
  gradients, metrics = random_pairs.gradient_function(config)(
    params, BATCH, KEY
  )
  norms = norms_of(gradients)
  assert {part_of(name) for name in norms} == EVERYWHERE | EXTRA[objective]
  assert not still(norms)
  assert set(metrics) & set(OBJECTIVES) == {objective}
  for rules in (
    sharding.PARAM_RULES,
    optimizer.LR_RULES,
    optimizer.DECAY_RULES,
  ):
    for name in norms:
      sharding.match_one(name, rules)


# --- dropout ----------------------------------------------------------------


def test_dropout_follows_the_key_and_is_off_in_evaluation():
  config = random_pairs.config(dropout=0.5, objectives=random_pairs.only("mlm"))
  params = random_pairs.spread_params(config)
  run = random_pairs.loss_function(config)
  first = float(run(params, BATCH, KEY).loss)
  assert first == float(run(params, BATCH, KEY).loss)
  assert first != float(run(params, BATCH, jax.random.key(6)).loss)

  def encode(config):
    return jax.jit(functools.partial(glscl.encode_text, config=config))(
      params, BATCH.text_ids_BT, BATCH.text_valid_BT
    )

  without = dataclasses.replace(
    config, model=random_pairs.config(dropout=0.0).model
  )
  np.testing.assert_array_equal(encode(config), encode(without))


def test_evaluation_encodes_what_training_contrasts():
  # ITC of the step, from the vectors that retrieval ranks by.
  @jax.jit
  def vectors(params, batch):
    x_BTD = glscl.encode_text(
      params, batch.text_ids_BT, batch.text_valid_BT, config=CONFIG
    )
    y_BID = glscl.encode_visual(params, inputs.see_images(batch), config=CONFIG)
    return (
      glscl.text_vectors(params, x_BTD, config=CONFIG),
      glscl.image_vectors(params, y_BID, config=CONFIG),
    )

  text_BE, image_BE = vectors(PARAMS, BATCH)
  np.testing.assert_allclose(jnp.linalg.norm(text_BE, axis=1), 1.0, rtol=1e-5)
  logits = np.asarray(image_BE, np.float64) @ np.asarray(text_BE).T / 0.07

  def cross_entropy(logits):
    return np.mean(np.log(np.exp(logits).sum(axis=1)) - np.diag(logits))

  expected = 0.5 * (cross_entropy(logits) + cross_entropy(logits.T))
  _, losses = gradients_and_losses(BATCH)
  assert losses["itc"] == pytest.approx(expected, rel=1e-4)
