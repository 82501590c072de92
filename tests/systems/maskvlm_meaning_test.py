"""What must not leak, what must not matter, and who gets a gradient."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glscl_jax import config as config_lib
from glscl_jax import sharding
from glscl_jax.models import vision
from glscl_jax.models.maskvlm import MaskVLM
from glscl_jax.objectives import masked_lm
from glscl_jax.systems import inputs, maskvlm
from glscl_jax.train import optimizer
from tests import random_pairs

OBJECTIVES = config_lib.SYSTEM_OBJECTIVES["maskvlm"]
ENCODERS = {
  "patches": random_pairs.maskvlm(),
  "stem and words": random_pairs.config(
    **random_pairs.SMALL_DATA
    | {"system": "maskvlm", "match_features": "product"},
    objectives=random_pairs.only(*OBJECTIVES) | {"itm_negatives": "hard"},
  ),
}
CONFIG = ENCODERS["patches"]
BATCH = random_pairs.batch(CONFIG)
PARAMS = random_pairs.spread_params(CONFIG)
KEY = jax.random.key(5)
ROWS = np.arange(CONFIG.data.batch_size)


def run(batch, *, params=PARAMS, config=CONFIG):
  """Gradients, and losses as floats."""
  gradients, metrics = random_pairs.gradient_function(config)(
    params, batch, KEY
  )
  return gradients, {name: float(metrics[name]) for name in metrics}


@pytest.fixture(scope="module")
def normal():
  return run(BATCH)


@functools.cache
def states(encoder, changed=False):
  """What one loss encodes; `changed` inverts the pixels of a hidden patch."""
  config = ENCODERS[encoder]
  batch = random_pairs.batch(config)
  if changed:
    side = config.model.vision.patch_size
    image_BYXC = batch.image_BYXC.copy()
    for b, patch in enumerate(batch.block_idx_BI[:, -1]):
      y, x = side * (patch // 4), side * (patch % 4)
      image_BYXC[b, y : y + side, x : x + side] ^= 0xFF
    batch = random_pairs.change(batch, image_BYXC=image_BYXC)

  @jax.jit
  def encode(params):
    def method(model):
      return maskvlm.encode(model, batch, config).images

    return MaskVLM(config.model).apply({"params": params}, method=method)

  params = random_pairs.spread_params(config)
  return jax.tree.map(np.asarray, encode(params))


# --- what must not leak -----------------------------------------------------


@pytest.mark.parametrize("encoder", ENCODERS)
def test_hidden_patches_reach_nothing_of_the_masked_version(encoder):
  before, after = states(encoder), states(encoder, changed=True)
  np.testing.assert_array_equal(before["block"], after["block"])
  assert not np.allclose(before["full"], after["full"], atol=1e-3)


def test_hidden_pixels_reach_mim_only_as_targets():
  config = random_pairs.maskvlm("mim")
  params = random_pairs.spread_params(config)
  batch = random_pairs.batch(config)
  image_BYXC = batch.image_BYXC.copy()
  hidden_BI = np.asarray(vision.named_patches(batch.block_idx_BI, 16))
  pixels_BYX = np.kron(hidden_BI.reshape(-1, 4, 4), np.ones((1, 8, 8), bool))
  image_BYXC[pixels_BYX] = 0

  @jax.jit
  def predict(params, batch):
    def method(model):
      encoded = maskvlm.encode(model, batch, config)
      images = maskvlm.fuse_images(model, batch, encoded, None)
      return maskvlm.decode(model, batch, encoded, images)

    return MaskVLM(config.model).apply({"params": params}, method=method)

  blank = random_pairs.change(batch, image_BYXC=image_BYXC)
  np.testing.assert_array_equal(predict(params, batch), predict(params, blank))
  losses = [run(b, params=params, config=config)[1] for b in (batch, blank)]
  assert losses[0]["mim"] != losses[1]["mim"]


def test_the_original_words_reach_mlm_only_as_labels():
  config = random_pairs.maskvlm("mlm")
  params = random_pairs.spread_params(config)
  batch = random_pairs.batch(config)
  text_ids_BT = batch.text_ids_BT.copy()
  labels_BJ = batch.mlm_labels_BJ.copy()
  text_ids_BT[ROWS, batch.mlm_pos_BJ[:, 0]] = 50
  labels_BJ[:, 0] = 50
  go = functools.partial(run, params=params, config=config)
  before = go(batch)
  hidden = go(random_pairs.change(batch, text_ids_BT=text_ids_BT))
  jax.tree.map(np.testing.assert_array_equal, before, hidden)
  told = go(random_pairs.change(batch, mlm_labels_BJ=labels_BJ))
  assert not np.isclose(before[1]["mlm"], told[1]["mlm"])


def test_one_modality_is_masked_at_a_time(normal):
  # Masked words are read by MLM alone, hidden patches by MIM alone.
  mlm_ids_BT = np.where(BATCH.text_valid_BT, 40, BATCH.mlm_ids_BT)
  _, losses = run(random_pairs.change(BATCH, mlm_ids_BT=mlm_ids_BT))
  changed = {name for name in OBJECTIVES if losses[name] != normal[1][name]}
  assert changed == {"mlm"}
  other_BI = np.roll(np.arange(16), 5)[None, :12].repeat(len(ROWS), axis=0)
  _, losses = run(
    random_pairs.change(BATCH, block_idx_BI=other_BI.astype(np.int32))
  )
  changed = {name for name in OBJECTIVES if losses[name] != normal[1][name]}
  assert changed == {"mim"}


def test_stacks_and_decoder_see_all_words_also_masked_ones(monkeypatch):
  """Validity is the text's, and the decoder's context is unmasked."""
  config = random_pairs.maskvlm(batch_size=2)
  batch = random_pairs.batch(config)
  params = random_pairs.spread_params(config)
  seen = []
  original = maskvlm.CrossStack.body

  def record(self, x, context, valid, context_valid):
    seen.append((x, context, valid, context_valid))
    return original(self, x, context, valid, context_valid)

  monkeypatch.setattr(maskvlm.CrossStack, "body", record)

  @jax.jit
  def look(params, batch):
    def method(model):
      encoded = maskvlm.encode(model, batch, config)
      judged = maskvlm.judge(model, batch, encoded, config, KEY)
      maskvlm.fuse_texts(model, batch, encoded, judged)
      images = maskvlm.fuse_images(model, batch, encoded, judged)
      maskvlm.decode(model, batch, encoded, images)
      return encoded.texts, tuple(seen)

    return MaskVLM(config.model).apply({"params": params}, method=method)

  texts, (text, image, decoder) = look(params, batch)
  masks = {tuple(row) for row in np.asarray(batch.text_valid_BT)}
  assert text[3] is None and image[2] is None and decoder[2] is None
  for valid in (text[2], image[3], decoder[3]):
    assert {tuple(row) for row in np.asarray(valid)} == masks
  # The decoder asks the unmasked text.
  np.testing.assert_array_equal(decoder[1], texts["full"])
  assert not np.array_equal(texts["full"], texts["mlm"])


def test_targets_are_on_the_scale_of_the_input():
  found_BIP = inputs.pixel_targets(BATCH.image_BYXC, CONFIG)
  mean, std = np.array(CONFIG.data.mean), np.array(CONFIG.data.std)
  scaled_BYXC = (BATCH.image_BYXC / 255 - mean) / std
  np.testing.assert_allclose(
    vision.unpatchify(found_BIP, 8), scaled_BYXC, atol=1e-5
  )
  assert found_BIP.dtype == jnp.float32
  half = random_pairs.maskvlm(compute_dtype="bfloat16")
  np.testing.assert_array_equal(
    inputs.pixel_targets(BATCH.image_BYXC, half), found_BIP
  )


@pytest.mark.parametrize("encoder", ENCODERS)
def test_padding_gets_exactly_no_gradient(encoder):
  config = ENCODERS[encoder]
  batch = random_pairs.batch(config)
  gradients, _ = run(
    batch, params=random_pairs.spread_params(config), config=config
  )
  text = gradients["text"]
  assert np.all(np.asarray(text["word_embedding"])[random_pairs.PAD] == 0)
  assert np.all(np.asarray(text["position_embedding"])[1] == 0)
  first = 0 if config.model.text.depth else 1
  valid_BT = batch.text_valid_BT[:, first:]
  used = np.unique(batch.text_ids_BT[:, first:][valid_BT])
  norms = np.linalg.norm(text["word_embedding"], axis=1)
  assert np.all(norms[used] > 0)


# --- negatives --------------------------------------------------------------


def judged_pairs(kind, identity_B, key):
  """(text, image, label, counts) of each pair; states hold sample numbers."""
  config = random_pairs.maskvlm(
    objectives={"itm_negatives": kind, "neg_group": 4}
  )
  size = len(identity_B)
  number_B = jnp.arange(size, dtype=jnp.float32)
  rng = np.random.default_rng(0)
  joint = tuple(
    jnp.asarray(v, jnp.float32) for v in rng.normal(size=(2, size, 4))
  )
  batch = random_pairs.change(
    random_pairs.batch(config), identity_BM=identity_B[:, None]
  )
  valid_BT = np.arange(size)[:, None] == np.arange(10)[None]
  batch = random_pairs.change(batch, text_valid_BT=valid_BT)
  states = jnp.broadcast_to(number_B[:, None, None], (size, 10, 1))
  encoded = maskvlm.Encoded({"full": states[:, :1]}, {"full": states}, joint)

  class Model:
    def temperature(self):
      return jnp.float32(1e-3)

  judged = maskvlm.judge(Model(), batch, encoded, config, key)
  columns = []
  for name in maskvlm.ITM_PAIRS:
    x, valid, y = judged.pairs[name]
    # Validity travels with its text.
    np.testing.assert_array_equal(np.argmax(valid, axis=1), x[:, 0, 0])
    columns.append((np.asarray(x[:, 0, 0], int), np.asarray(y[:, 0, 0], int)))
  texts, images = (
    np.stack(c, axis=1).reshape(-1) for c in zip(*columns, strict=True)
  )
  return texts, images, np.asarray(judged.labels_A), np.asarray(judged.ok_A)


# Two groups of four; the second shows one image only.
IDS = np.array([0, 1, 2, 1, 3, 3, 3, 3], np.int32)


@pytest.mark.parametrize("kind", ["in_batch", "hard"])
def test_pairs_are_own_false_image_and_false_text(kind, key):
  for i in range(5):
    texts, images, labels, ok = judged_pairs(
      kind, IDS, jax.random.fold_in(key, i)
    )
    own = np.repeat(np.arange(8), 3)
    np.testing.assert_array_equal(labels, np.tile([1, 0, 0], 8))
    np.testing.assert_array_equal(texts[0::3], np.arange(8))
    np.testing.assert_array_equal(images[0::3], np.arange(8))
    # One side of a false pair is the own one, never both from another row.
    np.testing.assert_array_equal(texts[1::3], np.arange(8))
    np.testing.assert_array_equal(images[2::3], np.arange(8))
    false = ok & (labels == 0)
    assert np.all(IDS[texts[false]] != IDS[images[false]])
    np.testing.assert_array_equal(texts // 4, own // 4)
    np.testing.assert_array_equal(images // 4, own // 4)
    np.testing.assert_array_equal(ok, (labels == 1) | (own < 4))


def test_equal_states_give_finite_losses_and_gradients():
  # All samples alike: every similarity is the same, none is a negative.
  batch = jax.tree.map(lambda a: np.repeat(a[:1], len(a), axis=0), BATCH)
  gradients, losses = run(batch)
  assert losses["itc"] == 0.0
  assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradients))


# --- what must not matter ---------------------------------------------------


def test_the_order_of_the_batch_does_not_matter(normal):
  order = np.random.default_rng(0).permutation(len(ROWS))
  _, losses = run(jax.tree.map(lambda a: a[order], BATCH))
  # ITM draws its pairs by position in the batch.
  for name in ("mlm", "mim", "itc"):
    assert losses[name] == pytest.approx(normal[1][name], rel=1e-5), name


@pytest.mark.parametrize("encoder", ENCODERS)
def test_longer_padding_does_not_matter(encoder):
  config = ENCODERS[encoder]
  params, batch = random_pairs.spread_params(config), random_pairs.batch(config)
  _, losses = run(batch, params=params, config=config)
  text = dataclasses.replace(config.model.text, max_length=17)
  longer = dataclasses.replace(
    config, model=dataclasses.replace(config.model, text=text)
  )
  pad = ((0, 0), (0, 7))
  columns = {
    name: np.pad(getattr(batch, name), pad, constant_values=value)
    for name, value in {
      "text_ids_BT": random_pairs.PAD,
      "mlm_ids_BT": random_pairs.PAD,
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
  assert not np.all(BATCH.mlm_ok_BJ)
  batch = random_pairs.change(
    BATCH, mlm_pos_BJ=np.where(BATCH.mlm_ok_BJ, BATCH.mlm_pos_BJ, 9)
  )
  gradients, losses = run(batch)
  assert losses == pytest.approx(normal[1], rel=1e-6)
  assert random_pairs.difference(gradients, normal[0]) < 1e-5


def test_whole_and_unrolled_layers_give_the_same_losses():
  usual = random_pairs.maskvlm(depth=2)
  other = random_pairs.maskvlm(depth=2, restrict_last_layer=False, scan=False)
  params = random_pairs.spread_params(usual)
  expected, found = (
    random_pairs.loss_function(config)(params, BATCH, KEY).metrics
    for config in (usual, other)
  )
  for name, value in expected.items():
    np.testing.assert_allclose(found[name], value, rtol=2e-5, err_msg=name)


def test_bfloat16_products_change_losses_by_less_than_two_percent():
  params = random_pairs.spread_params(CONFIG, spread=0.02)
  _, exact = run(BATCH, params=params)
  half = random_pairs.maskvlm(compute_dtype="bfloat16")
  output = random_pairs.loss_function(half)(params, BATCH, KEY)
  assert float(output.loss) == pytest.approx(exact["loss"], rel=0.02)
  assert {m.dtype.name for m in output.metrics.values()} == {"float32"}


def test_captions_without_a_word_are_legal():
  batch = random_pairs.batch(CONFIG, num_real=(0, 0, 3, 8, 1, 2, 0, 5))
  gradients, losses = run(batch)
  assert all(np.isfinite(value) for value in losses.values())
  assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(gradients))


# --- who gets a gradient ----------------------------------------------------

EXTRA = {
  "mlm": {"text_cross", "mlm_head"},
  "mim": {"image_cross", "decoder", "pixel_head", "vision/mask_token"},
  "itc": {"text_projection", "image_projection", "temperature"},
  "itm": {"text_cross", "image_cross", "match_head"},
}
EVERYWHERE = {
  f"vision/{name}"
  for name in (
    "patch_kernel",
    "patch_bias",
    "class_embedding",
    "position_embedding",
    "ln_post",
    "blocks",
  )
} | {
  f"text/{name}"
  for name in (
    "word_embedding",
    "position_embedding",
    "type_embedding",
    "norm",
    "blocks",
  )
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
  return [
    name
    for name, norm in norms.items()
    if not norm > 0 and not name.endswith("key/bias")
  ]


def part_of(name):
  """`vision/blocks`, `text_cross` or `mlm_head`."""
  pieces = name.split("/")
  return "/".join(pieces[: 2 if pieces[0] in ("vision", "text") else 1])


@pytest.mark.parametrize("encoder", ENCODERS)
def test_all_objectives_together_train_every_parameter(encoder):
  config = ENCODERS[encoder]
  gradients, _ = run(
    random_pairs.batch(config),
    params=random_pairs.spread_params(config),
    config=config,
  )
  assert not still(norms_of(gradients))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_objective_alone_trains_what_it_reads_and_has_nothing_else(
  objective,
):
  config = random_pairs.maskvlm(objective)
  gradients, losses = run(
    random_pairs.batch(config),
    params=random_pairs.spread_params(config),
    config=config,
  )
  norms = norms_of(gradients)
  assert {part_of(name) for name in norms} == EVERYWHERE | EXTRA[objective]
  assert not still(norms)
  assert set(losses) & set(config_lib.OBJECTIVES) == {objective}
  for rules in (
    sharding.PARAM_RULES,
    optimizer.LR_RULES,
    optimizer.DECAY_RULES,
    optimizer.MUON_RULES,
  ):
    for name in norms:
      sharding.match_one(name, rules)


# --- evaluation -------------------------------------------------------------


def test_evaluation_scores_what_training_judges():
  # The own pairs of ITM, from the scores that retrieval ranks by.
  config = random_pairs.maskvlm("itm", "itc", batch_size=4)
  params, batch = random_pairs.spread_params(config), random_pairs.batch(config)

  @jax.jit
  def compute(params, batch):
    x_BTD = maskvlm.encode_text(
      params, batch.text_ids_BT, batch.text_valid_BT, config=config
    )
    y_BID = maskvlm.encode_visual(
      params, inputs.see_images(batch), config=config
    )
    return (
      maskvlm.text_vectors(params, x_BTD, config=config),
      maskvlm.image_vectors(params, y_BID, config=config),
      maskvlm.match_scores(
        params, x_BTD, batch.text_valid_BT, y_BID, config=config
      ),
      maskvlm.cross_attention(
        params, x_BTD, batch.text_valid_BT, y_BID, config=config
      ),
    )

  text_BE, image_BE, scores_B, maps_BHTM = compute(params, batch)
  np.testing.assert_allclose(np.linalg.norm(text_BE, axis=1), 1.0, rtol=1e-5)
  np.testing.assert_allclose(np.linalg.norm(image_BE, axis=1), 1.0, rtol=1e-5)
  np.testing.assert_allclose(np.sum(maps_BHTM, axis=-1), 1.0, rtol=1e-5)
  # A batch of equal identities has no false pair: ITM is of the own ones.
  alone = random_pairs.change(
    batch, identity_BM=np.zeros_like(batch.identity_BM)
  )
  loss = random_pairs.loss_function(config)(params, alone, KEY).metrics["itm"]
  expected = np.mean(np.log1p(np.exp(-np.asarray(scores_B))))
  assert float(loss) == pytest.approx(expected, rel=1e-4)


def test_dropout_follows_the_key_and_is_off_in_evaluation():
  config = random_pairs.maskvlm("mim", dropout=0.5)
  params = random_pairs.spread_params(config)
  batch = random_pairs.batch(config)
  go = random_pairs.loss_function(config)
  first = float(go(params, batch, KEY).loss)
  assert first == float(go(params, batch, KEY).loss)
  assert first != float(go(params, batch, jax.random.key(6)).loss)


def test_completed_patches_have_the_loss_of_training(normal):
  @jax.jit
  def complete(params, ids_BT, valid_BT):
    return maskvlm.complete_patches(
      params, BATCH, ids_BT, valid_BT, config=CONFIG, key=KEY
    )

  texts = BATCH.text_ids_BT, BATCH.text_valid_BT
  own = complete(PARAMS, *texts)
  losses = normal[1]
  np.testing.assert_allclose(own.error_B.mean(), losses["mim"], rtol=1e-5)
  other = complete(PARAMS, *(np.roll(a, 1, axis=0) for a in texts))
  np.testing.assert_array_equal(other.hidden_BJ, own.hidden_BJ)
  assert np.all(np.abs(other.error_B - own.error_B) > 1e-6)


def test_logits_of_masked_words_are_those_of_training(normal):
  read = jax.jit(functools.partial(maskvlm.word_logits, config=CONFIG))
  found = masked_lm.masked_cross_entropy(
    read(PARAMS, BATCH), BATCH.mlm_labels_BJ, BATCH.mlm_ok_BJ
  )
  assert float(found) == pytest.approx(normal[1]["mlm"], rel=1e-5)
