import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glscl_jax.models import vision
from tests import random_pairs

CONFIG = random_pairs.config(depth=2)
NUM_PATCHES, WIDTH = 16, 64


@pytest.fixture(scope="module")
def encoder():
  module = vision.VisionEncoder(CONFIG.model)

  def everything(module, image_BYXC):
    x_BID = module.embed(image_BYXC)
    return module.encode(module.hide(x_BID, jnp.zeros((1, 1), jnp.int32)))

  image_BYXC = jnp.zeros((1, 32, 32, 3))
  init = jax.jit(lambda k: module.init(k, image_BYXC, method=everything))
  return module.bind(init(jax.random.key(0)))


@pytest.fixture(scope="module")
def x_BID(encoder):
  rng = np.random.default_rng(0)
  return encoder.embed(rng.normal(size=(2, 32, 32, 3)).astype(np.float32))


def test_patches_are_row_major_and_values_are_row_column_channel():
  image_BYXC = np.arange(2 * 6 * 6 * 3).reshape(2, 6, 6, 3)
  patches_BIP = vision.patchify(image_BYXC, 2)
  assert patches_BIP.shape == (2, 9, 12)
  # Patch 5 is row 1, column 2 of the grid of 3 x 3.
  np.testing.assert_array_equal(
    patches_BIP[1, 5], image_BYXC[1, 2:4, 4:6].reshape(-1)
  )


def test_patchify_can_be_undone():
  # Every value differs: rows, columns and channels cannot be mixed up.
  image_BYXC = np.arange(2 * 12 * 12 * 3).reshape(2, 12, 12, 3)
  patches_BIP = vision.patchify(image_BYXC, 4)
  np.testing.assert_array_equal(vision.unpatchify(patches_BIP, 4), image_BYXC)
  np.testing.assert_array_equal(
    vision.patchify(vision.unpatchify(patches_BIP, 4), 4), patches_BIP
  )


def test_one_patch_lands_at_its_place():
  patches_BIP = np.zeros((1, 9, 12))
  patches_BIP[0, 5] = np.arange(12) + 1
  image_YXC = vision.unpatchify(patches_BIP, 2)[0]
  np.testing.assert_array_equal(
    image_YXC[2:4, 4:6], np.arange(12).reshape(2, 2, 3) + 1
  )
  assert np.count_nonzero(image_YXC) == 12


def test_each_patch_is_embedded_alone(encoder):
  image_BYXC = np.zeros((1, 32, 32, 3), np.float32)
  image_BYXC[0, 8:16, 24:32] = 1.0  # row 1, column 3 of 4 x 4
  lit_I = np.any(np.asarray(encoder.embed(image_BYXC))[0] != 0, axis=-1)
  np.testing.assert_array_equal(np.flatnonzero(lit_I), [7])


def test_complete_adds_the_class_token_and_positions(encoder, x_BID):
  x_BLD = encoder.complete(x_BID)
  assert x_BLD.shape == (2, 1 + NUM_PATCHES, WIDTH)
  params = encoder.variables["params"]
  position_LD = params["position_embedding"]
  np.testing.assert_allclose(
    x_BLD[1, 0], params["class_embedding"] + position_LD[0], rtol=1e-6
  )
  np.testing.assert_allclose(
    x_BLD[1, 1:], x_BID[1] + position_LD[1:], rtol=1e-6
  )


def test_drop_keeps_patches_with_their_own_positions(encoder, x_BID):
  keep_idx_BJ = np.array([[3, 15, 0], [7, 2, 9]], np.int32)
  complete_BLD = np.asarray(encoder.complete(x_BID))
  dropped_BLD = np.asarray(encoder.drop(x_BID, keep_idx_BJ))
  assert dropped_BLD.shape == (2, 4, WIDTH)
  for b in range(2):
    np.testing.assert_array_equal(dropped_BLD[b, 0], complete_BLD[b, 0])
    np.testing.assert_array_equal(
      dropped_BLD[b, 1:], complete_BLD[b, 1 + keep_idx_BJ[b]]
    )


def test_hide_replaces_patches_before_positions_are_added(encoder, x_BID):
  tok_idx_BJ = np.array([[3, 15], [0, 9]], np.int32)
  hidden_BLD = np.asarray(encoder.hide(x_BID, tok_idx_BJ))
  complete_BLD = np.asarray(encoder.complete(x_BID))
  params = encoder.variables["params"]
  token_D = params["mask_token"]["value"]
  for b in range(2):
    rows = 1 + tok_idx_BJ[b]
    np.testing.assert_allclose(
      hidden_BLD[b, rows],
      token_D[None] + params["position_embedding"][rows],
      rtol=1e-6,
    )
    others = np.setdiff1d(np.arange(1 + NUM_PATCHES), rows)
    np.testing.assert_array_equal(
      hidden_BLD[b, others], complete_BLD[b, others]
    )


def test_all_tokens_pass_the_last_norm(encoder, x_BID):
  y_BLD = np.asarray(encoder.encode(encoder.complete(x_BID)))
  np.testing.assert_allclose(y_BLD.mean(axis=-1), 0.0, atol=1e-5)
  np.testing.assert_allclose(y_BLD.std(axis=-1), 1.0, atol=1e-2)


def test_the_call_is_a_complete_encoding(encoder):
  rng = np.random.default_rng(0)
  image_BYXC = rng.normal(size=(2, 32, 32, 3)).astype(np.float32)
  np.testing.assert_array_equal(
    encoder(image_BYXC),
    encoder.encode(encoder.complete(encoder.embed(image_BYXC))),
  )


def test_initial_spreads_are_those_of_clip(encoder):
  params = encoder.variables["params"]
  assert np.std(params["position_embedding"]) == pytest.approx(
    WIDTH**-0.5, rel=0.1
  )
  assert np.std(params["mask_token"]["value"]) == pytest.approx(1.0, rel=0.3)


def test_without_blocks_states_are_normed_patches_and_their_mean(key):
  config = random_pairs.config(vision={"depth": 0, "class_state": "mean"})
  module = vision.VisionEncoder(config.model)
  image_BYXC = jax.random.normal(key, (2, 32, 32, 3))
  variables = jax.jit(module.init)(key, image_BYXC)
  params = variables["params"]
  assert set(params) == {"patch_kernel", "position_embedding", "ln_post"}
  assert params["position_embedding"].shape == (NUM_PATCHES, WIDTH)
  module = module.bind(variables)
  x_BID = module.embed(image_BYXC)
  y_BLD = np.asarray(module.encode(module.complete(x_BID)))
  placed_BID = np.asarray(x_BID + params["position_embedding"][None])
  centred_BID = placed_BID - placed_BID.mean(axis=-1, keepdims=True)
  normed_BID = centred_BID / centred_BID.std(axis=-1, keepdims=True)
  np.testing.assert_allclose(y_BLD[:, 1:], normed_BID, rtol=1e-3, atol=1e-3)
  np.testing.assert_allclose(
    y_BLD[:, 0], y_BLD[:, 1:].mean(axis=1), rtol=1e-5, atol=1e-6
  )
  # A shorter sequence of kept patches has the same states.
  keep_idx_BJ = np.array([[3, 15, 0], [7, 2, 9]], np.int32)
  kept_BLD = np.asarray(module.encode(module.drop(x_BID, keep_idx_BJ)))
  for b in range(2):
    np.testing.assert_allclose(
      kept_BLD[b, 1:], y_BLD[b, 1 + keep_idx_BJ[b]], rtol=1e-5, atol=1e-6
    )


def test_the_class_state_can_be_the_mean_of_the_other_states(encoder, x_BID):
  config = random_pairs.config(depth=2, vision={"class_state": "mean"})
  mean = vision.VisionEncoder(config.model).bind(encoder.variables)
  tokens_BLD = encoder.complete(x_BID)
  states_BLD = np.asarray(encoder.encode(tokens_BLD))
  mean_BLD = np.asarray(mean.encode(tokens_BLD))
  np.testing.assert_array_equal(mean_BLD[:, 1:], states_BLD[:, 1:])
  np.testing.assert_allclose(
    mean_BLD[:, 0], states_BLD[:, 1:].mean(axis=1), rtol=1e-5, atol=1e-6
  )


def test_the_vit_of_imagenet_has_a_patch_bias_and_no_norm_before_the_blocks(
  key,
):
  config = random_pairs.maskvlm(depth=2)
  module = vision.VisionEncoder(config.model)
  image_BYXC = jax.random.normal(key, (2, 32, 32, 3))
  params = jax.jit(module.init)(key, image_BYXC)["params"]
  assert "ln_pre" not in params and "ln_post" in params
  assert not np.any(np.asarray(params["patch_bias"]))
  moved = params | {"patch_bias": jnp.full((WIDTH,), 0.5)}
  for name, tree in {"before": params, "after": moved}.items():
    x_BID = module.bind({"params": tree}).embed(image_BYXC)
    flat_BIP = vision.patchify(image_BYXC, 8)
    expected = flat_BIP @ np.asarray(params["patch_kernel"])
    shift = 0.5 if name == "after" else 0.0
    np.testing.assert_allclose(x_BID, expected + shift, atol=1e-5)


def test_truncated_initial_values_stay_within_two_deviations(key):
  config = random_pairs.maskvlm(depth=2)
  module = vision.VisionEncoder(config.model)
  params = jax.jit(module.init)(key, jnp.zeros((1, 32, 32, 3)))["params"]
  block = params["blocks"]["layers"]
  for values in (
    params["patch_kernel"],
    params["position_embedding"],
    block["attention"]["query"]["kernel"],
    block["attention"]["out"]["kernel"],
    block["mlp"]["fc1"]["kernel"],
  ):
    assert np.abs(values).max() <= 0.04
    # Cut at two deviations, .88 of the deviation is left.
    assert np.std(values) == pytest.approx(0.0176, rel=0.1)


def test_coca_starts_smaller_where_the_stack_is_deeper(key):
  config = random_pairs.config(
    depth=2, vision={"init": "coca", "activation": "gelu"}
  )
  module = vision.VisionEncoder(config.model)
  params = jax.jit(module.init)(key, jnp.zeros((1, 32, 32, 3)))["params"]
  block = params["blocks"]["layers"]
  for values, std in (
    (params["patch_kernel"], (3 * 192) ** -0.5),
    (params["position_embedding"], 64**-0.5),
    (block["attention"]["query"]["kernel"], 64**-0.5),
    (block["attention"]["out"]["kernel"], 64**-0.5 * 4**-0.5),
    (block["mlp"]["fc1"]["kernel"], 128**-0.5),
    (block["mlp"]["fc2"]["kernel"], 64**-0.5 * 4**-0.5),
  ):
    assert np.std(values) == pytest.approx(std, rel=0.1)
