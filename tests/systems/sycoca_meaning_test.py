"""What must not leak, what must not matter, and who gets a gradient."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glscl_jax import config as config_lib
from glscl_jax import draws, sharding
from glscl_jax.models import vision
from glscl_jax.models.sycoca import SyCoCa
from glscl_jax.objectives import attentive
from glscl_jax.systems import inputs, sycoca
from glscl_jax.train import optimizer
from glscl_jax.train import state as state_lib
from glscl_jax.train import step as step_lib
from tests import random_pairs

OBJECTIVES = config_lib.SYSTEM_OBJECTIVES["sycoca"]
CONFIG = random_pairs.sycoca()
STEM = random_pairs.sycoca(
  "tg_mim",
  image_size=64,
  vision={"patch_size": 16, "stem": (8, 16, 64), "stem_blocks": (1, 1, 1)},
)
BATCH = random_pairs.batch(CONFIG)
PARAMS = random_pairs.spread_params(CONFIG)
KEY = jax.random.key(5)
SIZE = CONFIG.data.batch_size
# Any two sets that are complements.
HIGH = np.stack(
  [np.random.default_rng(b).permutation(16)[:8] for b in range(SIZE)]
).astype(np.int32)


@jax.jit
def pull_back(params, batch, weights):
  """Gradients of the objectives by weight, which all share one program."""

  def total(params):
    metrics = sycoca.loss(params, batch, config=CONFIG, key=KEY).metrics
    return sum(weights[name] * metrics[name] for name in OBJECTIVES), metrics

  return jax.grad(total, has_aux=True)(params)


def run(batch, *names, params=PARAMS):
  """Gradients of some objectives, by default all, and losses as floats."""
  chosen = names or OBJECTIVES
  weights = {name: np.float32(name in chosen) for name in OBJECTIVES}
  gradients, metrics = pull_back(params, batch, weights)
  return gradients, {name: float(metrics[name]) for name in metrics}


@pytest.fixture(scope="module")
def normal():
  return run(BATCH)


@functools.cache
def read_function(config, what, fixed=True):
  """Compiled (params, batch, split) -> what an objective computes.

  `what`: takes a Context. Without `fixed` the split is the system's.
  """

  @jax.jit
  def read(params, batch, high_BJ, noise_BMD):
    def method(model):
      encoded = sycoca.encode(model, batch, config)
      split = sycoca.split_patches(model, batch, encoded, config, KEY, None)
      if fixed:
        split = attentive.Split(high_BJ=high_BJ, keep_BM=high_BJ)
      if encoded.image_BMD is not None:
        moved_BMD = encoded.image_BMD + noise_BMD
        encoded = dataclasses.replace(encoded, image_BMD=moved_BMD)
      return what(sycoca.Context(model, batch, encoded, split, config)), split

    return SyCoCa(config.model).apply({"params": params}, method=method)

  def with_numpy(params, batch, high_BJ=HIGH, noise_BMD=0.0):
    noise_BMD = np.broadcast_to(np.float32(noise_BMD), (len(high_BJ), 17, 64))
    return jax.tree.map(np.asarray, read(params, batch, high_BJ, noise_BMD))

  return with_numpy


# --- what must not leak -----------------------------------------------------


@pytest.mark.parametrize("place", [1, 4, 8])
def test_a_changed_token_changes_no_earlier_logits(place):
  read = read_function(CONFIG, sycoca.caption_logits)
  ids_BT = BATCH.text_ids_BT.copy()
  ids_BT[:, place] = 50
  changed = random_pairs.change(BATCH, text_ids_BT=ids_BT)
  (before, _), (after, _) = read(PARAMS, BATCH), read(PARAMS, changed)
  assert before.shape == (SIZE, 9, 64)
  np.testing.assert_array_equal(before[:, :place], after[:, :place])
  moved = np.any(np.abs(before[:, place:] - after[:, place:]) > 1e-3, axis=2)
  seen = BATCH.text_valid_BT[:, place] & (BATCH.text_ids_BT[:, place] != 50)
  assert np.all(moved[seen]) and np.any(seen)


def test_captions_do_not_see_the_patches_they_speak_least_of():
  read = read_function(CONFIG, sycoca.caption_logits, fixed=False)
  logits, split = read(PARAMS, BATCH)
  # The split is made before the states change.
  kept_BI = np.asarray(vision.named_patches(split.keep_BM, 16))
  assert np.all(kept_BI.sum(axis=1) == 8)
  for shown, same in ((~kept_BI, True), (kept_BI, False)):
    noise_BMD = np.pad(shown, ((0, 0), (1, 0)))[:, :, None] * np.ones(64)
    found, again = read(PARAMS, BATCH, HIGH, noise_BMD)
    np.testing.assert_array_equal(again.keep_BM, split.keep_BM)
    assert np.array_equal(found, logits) == same


def test_captions_do_not_see_the_class_of_the_image():
  read = read_function(CONFIG, sycoca.caption_logits)
  noise_BMD = np.zeros((SIZE, 17, 64))
  noise_BMD[:, 0] = 1
  np.testing.assert_array_equal(
    read(PARAMS, BATCH)[0], read(PARAMS, BATCH, HIGH, noise_BMD)[0]
  )


@pytest.mark.parametrize(
  "config", [random_pairs.sycoca("tg_mim"), STEM], ids=["patches", "stem"]
)
def test_pixels_of_hidden_patches_reach_nobody_but_the_target(config):
  params = random_pairs.spread_params(config)
  batch = random_pairs.batch(config)
  side = config.model.vision.patch_size
  read = read_function(config, sycoca.reconstruct)
  image_BYXC = batch.image_BYXC.copy()
  hidden_BI = np.asarray(vision.named_patches(HIGH, 16)).reshape(-1, 4, 4)
  image_BYXC[np.kron(hidden_BI, np.ones((1, side, side), bool)) > 0] ^= 0xFF
  blank = random_pairs.change(batch, image_BYXC=image_BYXC)
  (before, _), (after, _) = read(params, batch), read(params, blank)
  assert before.shape == (SIZE, 8, 64)
  np.testing.assert_array_equal(before, after)
  # Others are seen.
  seen, _ = read(params, blank, (HIGH + 1) % 16)
  unseen, _ = read(params, batch, (HIGH + 1) % 16)
  assert not np.allclose(seen, unseen, atol=1e-3)


def test_at_the_level_of_features_only_states_are_hidden():
  config = random_pairs.sycoca("tg_mim", masking={"mim_mask_level": "feature"})
  params = random_pairs.spread_params(config)
  read = read_function(config, sycoca.reconstruct)
  hidden_BI = np.asarray(vision.named_patches(HIGH, 16))
  for shown, same in ((hidden_BI, True), (~hidden_BI, False)):
    noise_BMD = np.pad(shown, ((0, 0), (1, 0)))[:, :, None] * np.ones(64)
    found, _ = read(params, BATCH, HIGH, noise_BMD)
    assert np.array_equal(found, read(params, BATCH)[0]) == same


def test_the_two_sets_are_complements():
  read = read_function(CONFIG, sycoca.caption_logits, fixed=False)
  _, split = read(PARAMS, BATCH)
  np.testing.assert_array_equal(split.high_BJ, split.keep_BM)
  assert split.high_BJ.shape == (SIZE, 8)
  # They differ between samples: the caption tells them.
  assert len({tuple(sorted(row)) for row in split.high_BJ.tolist()}) > 1


def test_pixels_are_completed_from_the_patches_a_caption_speaks_of():
  """`high` is hidden from TG-MIM, and all that IC reads; not the other way."""
  scores_BI = np.array([[0.1, 0.9, 0.5, -0.3]], np.float32)
  split = attentive.split(scores_BI, num_high=1, num_low=1)
  assert split.high_BJ.tolist() == [[1]]
  assert sorted(split.keep_BM.tolist()[0]) == [0, 1, 2]


def test_padding_gets_exactly_no_gradient(normal):
  text = normal[0]["text"]
  words_VD = np.asarray(text["word_embedding"])
  assert np.all(words_VD[random_pairs.PAD] == 0)
  used = np.unique(BATCH.text_ids_BT[BATCH.text_valid_BT])
  assert np.all(np.linalg.norm(words_VD[used], axis=1) > 0)
  short = random_pairs.batch(CONFIG, num_real=(3,) * SIZE)
  places_LD = np.asarray(run(short)[0]["text"]["position_embedding"])
  # Five tokens, and the class, which reads the last row.
  used = np.any(places_LD != 0, axis=1)
  assert np.flatnonzero(used).tolist() == [0, 1, 2, 3, 4, 23]


# --- what must not matter ---------------------------------------------------


def test_what_stands_in_the_padding_does_not_matter(normal):
  ids_BT = np.where(BATCH.text_valid_BT, BATCH.text_ids_BT, 33)
  gradients, losses = run(
    random_pairs.change(BATCH, text_ids_BT=ids_BT.astype(np.int32))
  )
  assert losses == normal[1]
  jax.tree.map(np.testing.assert_array_equal, gradients, normal[0])


def test_a_valid_token_with_the_id_of_padding_matters(normal):
  ids_BT = BATCH.text_ids_BT.copy()
  ids_BT[:, 2] = random_pairs.PAD
  _, losses = run(random_pairs.change(BATCH, text_ids_BT=ids_BT))
  for name in OBJECTIVES:
    assert losses[name] != normal[1][name], name


def test_longer_padding_does_not_matter(normal):
  text = dataclasses.replace(CONFIG.model.text, max_length=17)
  longer = dataclasses.replace(
    CONFIG, model=dataclasses.replace(CONFIG.model, text=text)
  )
  pad = ((0, 0), (0, 7))
  batch = random_pairs.change(
    BATCH,
    text_ids_BT=np.pad(BATCH.text_ids_BT, pad),
    text_valid_BT=np.pad(BATCH.text_valid_BT, pad),
  )
  output = random_pairs.loss_function(longer)(PARAMS, batch, KEY)
  for name in OBJECTIVES:
    assert float(output.metrics[name]) == pytest.approx(
      normal[1][name], rel=1e-5, abs=1e-5
    ), name


def test_the_order_of_the_batch_does_not_matter(normal):
  order = np.random.default_rng(0).permutation(SIZE)
  _, losses = run(jax.tree.map(lambda a: a[order], BATCH))
  for name in OBJECTIVES:
    assert losses[name] == pytest.approx(normal[1][name], rel=1e-5), name


def test_bfloat16_products_change_losses_by_less_than_two_percent():
  params = random_pairs.spread_params(CONFIG, spread=0.02)
  _, exact = run(BATCH, params=params)
  half = random_pairs.sycoca(compute_dtype="bfloat16")
  output = random_pairs.loss_function(half)(params, BATCH, KEY)
  assert float(output.loss) == pytest.approx(exact["loss"], rel=0.02)
  assert {m.dtype.name for m in output.metrics.values()} == {"float32"}


def test_captions_without_a_word_and_rows_of_padding_are_legal():
  batch = random_pairs.batch(CONFIG, num_real=(0, 0, 3, 8, 1, 2, 0, 5))
  valid_BT = batch.text_valid_BT.copy()
  valid_BT[1] = False
  gradients, losses = run(random_pairs.change(batch, text_valid_BT=valid_BT))
  assert all(np.isfinite(value) for value in losses.values())
  assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(gradients))


def test_equal_samples_give_finite_losses_and_gradients():
  batch = jax.tree.map(lambda a: np.repeat(a[:1], SIZE, axis=0), BATCH)
  gradients, losses = run(batch)
  assert losses["itc"] == 0.0
  assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradients))


# --- which patches ----------------------------------------------------------


def test_captions_without_a_word_split_at_random():
  read = read_function(CONFIG, sycoca.caption_logits, fixed=False)
  batch = random_pairs.batch(CONFIG, num_real=(0,) * SIZE)
  _, split = read(PARAMS, batch)
  noise_BI = draws.uniform(KEY, (SIZE, 16))
  expected = attentive.split(noise_BI, num_high=8, num_low=8)
  np.testing.assert_array_equal(split.high_BJ, expected.high_BJ)


def test_before_the_warm_up_ends_the_split_is_random():
  config = random_pairs.sycoca(masking={"mask_warmup_steps": 3})

  @jax.jit
  def split(params, step):
    def method(model):
      encoded = sycoca.encode(model, BATCH, config)
      return sycoca.split_patches(model, BATCH, encoded, config, KEY, step)

    return SyCoCa(config.model).apply({"params": params}, method=method)

  noise_BI = draws.uniform(KEY, (SIZE, 16))
  early = attentive.split(noise_BI, num_high=8, num_low=8)
  read = read_function(CONFIG, sycoca.caption_logits, fixed=False)
  _, late = read(PARAMS, BATCH)
  assert not np.array_equal(early.high_BJ, late.high_BJ)
  for step, expected in ((2, early), (3, late)):
    found = split(PARAMS, jnp.int32(step))
    np.testing.assert_array_equal(found.high_BJ, expected.high_BJ)


def test_the_warm_up_is_told_the_step_of_training(monkeypatch):
  original, steps = sycoca.split_patches, []

  def record(*arguments):
    steps.append(arguments[-1])
    return original(*arguments)

  key = jax.random.key(0)
  state = state_lib.abstract_create(CONFIG)
  monkeypatch.setattr(sycoca, "split_patches", record)
  jax.eval_shape(
    functools.partial(step_lib.train_step, config=CONFIG), state, BATCH, key
  )
  (step,) = steps
  assert (step.shape, step.dtype) == ((), jnp.int32)


# --- who gets a gradient ----------------------------------------------------

TOWERS = {
  f"vision/{name}"
  for name in (
    "patch_kernel",
    "class_embedding",
    "position_embedding",
    "ln_pre",
    "ln_post",
    "blocks",
  )
} | {
  f"text/{name}"
  for name in (
    "word_embedding",
    "position_embedding",
    "class_embedding",
    "blocks",
  )
}
EXTRA = {
  "itc": {"text_projection", "image_projection", "logit_scale", "text/norm"},
  "ic": {"caption_decoder", "caption_head"},
  "tg_mim": {
    "image_decoder",
    "image_positions",
    "pixel_head",
    "vision/mask_token",
  },
}


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
  return {
    name
    for name, norm in norms.items()
    if not norm > 0 and not name.endswith("key/bias")
  }


def part_of(name):
  """`vision/blocks`, `caption_decoder` or `pixel_head`."""
  pieces = name.split("/")
  return "/".join(pieces[: 2 if pieces[0] in ("vision", "text") else 1])


def names_of(config):
  """Of the parameters that a run has."""
  leaves = jax.tree_util.tree_leaves_with_path(
    random_pairs.abstract_params(config)
  )
  return {sharding.path_name(path) for path, _ in leaves}


def test_all_objectives_together_train_every_parameter(normal):
  norms = norms_of(normal[0])
  assert not still(norms)
  assert {part_of(name) for name in norms} == TOWERS.union(*EXTRA.values())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_objective_alone_trains_what_it_reads_and_has_nothing_else(
  objective,
):
  own = names_of(random_pairs.sycoca(objective))
  assert {part_of(name) for name in own} == TOWERS | EXTRA[objective]
  norms = norms_of(run(BATCH, objective)[0])
  # The class row of the text is appended; contrast alone reads it.
  unread = set() if objective == "itc" else {"text/class_embedding"}
  assert still({name: norms[name] for name in own}) == unread
  assert not any(norms[name] for name in norms.keys() - own)
  for rules in (
    sharding.PARAM_RULES,
    optimizer.LR_RULES,
    optimizer.DECAY_RULES,
    optimizer.MUON_RULES,
  ):
    for name in own:
      sharding.match_one(name, rules)


@pytest.mark.parametrize(
  ("start", "end"), [(9.0, np.log(100)), (-1.0, 0.0), (2.0, 2.0)]
)
def test_the_logit_scale_stays_in_the_range_of_its_divisor(start, end):
  config = random_pairs.sycoca(
    objectives={"itc_temperature_range": (0.01, 1.0)}
  )
  params = {"logit_scale": {"value": jnp.float32(start)}, "other": {}}
  found = step_lib.clamp_temperature(params, config)
  assert float(found["logit_scale"]["value"]) == pytest.approx(end, rel=1e-6)
  assert set(found) == set(params)


# --- evaluation -------------------------------------------------------------


def test_evaluation_reads_the_vectors_that_training_contrasts(normal):
  @jax.jit
  def compute(params, batch):
    x_BLD = sycoca.encode_text(
      params, batch.text_ids_BT, batch.text_valid_BT, config=CONFIG
    )
    y_BID = sycoca.encode_visual(
      params, inputs.see_images(batch), config=CONFIG
    )
    maps_BHTM = sycoca.cross_attention(
      params, x_BLD, batch.text_valid_BT, y_BID, config=CONFIG
    )
    text_BE = sycoca.text_vectors(params, x_BLD, config=CONFIG)
    image_BE = sycoca.image_vectors(params, y_BID, config=CONFIG)
    return text_BE, image_BE, maps_BHTM

  text_BE, image_BE, maps_BHTM = compute(PARAMS, BATCH)
  np.testing.assert_allclose(np.linalg.norm(text_BE, axis=1), 1.0, rtol=1e-5)
  np.testing.assert_allclose(np.linalg.norm(image_BE, axis=1), 1.0, rtol=1e-5)
  logits = np.asarray(text_BE @ image_BE.T, np.float64) / 0.07
  rows, columns = (
    -np.mean(np.diag(jax.nn.log_softmax(a, axis=1))) for a in (logits, logits.T)
  )
  assert normal[1]["itc"] == pytest.approx((rows + columns) / 2, rel=1e-4)
  # Patches share the attention; the class token, the first column, has none.
  assert maps_BHTM.shape == (SIZE, 1, 10, 17)
  np.testing.assert_allclose(np.sum(maps_BHTM, axis=-1), 1.0, rtol=1e-5)
  assert np.all(np.asarray(maps_BHTM)[..., 0] == 0)


def test_completed_patches_have_the_loss_of_training(normal):
  @jax.jit
  def complete(params, ids_BT, valid_BT):
    return sycoca.complete_patches(
      params, BATCH, ids_BT, valid_BT, config=CONFIG, key=KEY
    )

  texts = BATCH.text_ids_BT, BATCH.text_valid_BT
  own = complete(PARAMS, *texts)
  losses = normal[1]
  np.testing.assert_allclose(own.error_B.mean(), losses["tg_mim"], rtol=1e-5)
  other = complete(PARAMS, *(np.roll(a, 1, axis=0) for a in texts))
  np.testing.assert_array_equal(other.hidden_BJ, own.hidden_BJ)
  assert np.all(np.abs(other.error_B - own.error_B) > 1e-6)
