import jax
import numpy as np
import pytest

from glscl_jax.models import text
from tests import random_pairs

VALID = np.array([[True, True, True, False], [True, True, True, True]])


@pytest.fixture(scope="module")
def encoder():
  module = text.TextEncoder(random_pairs.config(depth=2).model)
  ids_BT = np.array([[0, 9, 2, 1], [0, 7, 8, 2]], np.int32)
  params = jax.jit(module.init)(jax.random.key(0), ids_BT, VALID)
  params = jax.tree.map(lambda x: x * 5 if x.ndim > 1 else x, params)
  return module, params, ids_BT


def test_positions_count_valid_tokens_from_two_and_pads_are_one():
  np.testing.assert_array_equal(
    text.position_ids(VALID), [[2, 3, 4, 1], [2, 3, 4, 5]]
  )


def test_positions_do_not_look_at_ids(encoder):
  # A token whose id is that of the pad still counts as a token.
  module, params, ids_BT = encoder
  run = jax.jit(module.apply)
  pad_inside_BT = ids_BT.copy()
  pad_inside_BT[1, 1] = random_pairs.PAD
  changed = run(params, pad_inside_BT, VALID)
  assert not np.allclose(changed[1], run(params, ids_BT, VALID)[1])


def test_what_stands_in_the_padding_changes_no_real_state(encoder):
  module, params, ids_BT = encoder
  other_BT = np.where(VALID, ids_BT, 33).astype(np.int32)
  run = jax.jit(module.apply)
  states = [np.asarray(run(params, ids, VALID)) for ids in (ids_BT, other_BT)]
  np.testing.assert_array_equal(states[0][VALID], states[1][VALID])
  assert not np.array_equal(states[0][~VALID], states[1][~VALID])


def test_longer_padding_changes_no_real_state(encoder):
  module, params, ids_BT = encoder
  run = jax.jit(module.apply)
  short = np.asarray(run(params, ids_BT, VALID))
  pad = ((0, 0), (0, 3))
  long_ids_BT = np.pad(ids_BT, pad, constant_values=1)
  long = np.asarray(run(params, long_ids_BT, np.pad(VALID, pad)))
  np.testing.assert_allclose(long[:, :4][VALID], short[VALID], atol=1e-5)


def test_word_order_matters(encoder):
  module, params, ids_BT = encoder
  run = jax.jit(module.apply)
  swapped_BT = ids_BT[:, [0, 2, 1, 3]]
  states = (
    run(params, ids_BT, VALID)[1, 0],
    run(params, swapped_BT, VALID)[1, 0],
  )
  assert not np.allclose(*states, atol=1e-3)


def test_the_class_state_can_be_the_mean_of_the_other_valid_states(encoder):
  token, params, ids_BT = encoder
  config = random_pairs.config(depth=2, text={"class_state": "mean"})
  module = text.TextEncoder(config.model)
  states_BTD = np.asarray(jax.jit(token.apply)(params, ids_BT, VALID))
  mean_BTD = np.asarray(jax.jit(module.apply)(params, ids_BT, VALID))
  np.testing.assert_array_equal(mean_BTD[:, 1:], states_BTD[:, 1:])
  for b, count in enumerate(VALID.sum(axis=1)):
    np.testing.assert_allclose(
      mean_BTD[b, 0], states_BTD[b, 1:count].mean(axis=0), rtol=1e-5, atol=1e-6
    )


def test_without_blocks_states_are_the_embeddings_and_their_mean(key):
  bag = {"depth": 0, "class_state": "mean"}
  module = text.TextEncoder(random_pairs.config(text=bag).model)
  ids_BT = np.array([[0, 9, 2, 1]], np.int32)
  params = jax.jit(module.init)(key, ids_BT, VALID[:1])
  assert "blocks" not in params["params"]
  states_TD = jax.jit(module.apply)(params, ids_BT, VALID[:1])[0]
  np.testing.assert_allclose(
    states_TD[0], np.mean(states_TD[1:3], axis=0), atol=1e-6
  )
  # Each state depends on its own word only.
  other_TD = jax.jit(module.apply)(
    params, np.array([[0, 8, 2, 1]], np.int32), VALID[:1]
  )[0]
  np.testing.assert_array_equal(other_TD[2], states_TD[2])
  assert not np.array_equal(other_TD[1], states_TD[1])


def test_without_a_norm_a_bag_of_words_is_a_sum_of_table_rows(key):
  model = random_pairs.config(
    text={
      "depth": 0,
      "embedding_norm": False,
      "class_state": "mean",
    }
  ).model
  encoder = text.TextEncoder(model)
  params = jax.jit(encoder.init)(key, np.zeros((1, 4), np.int32), VALID[1:])[
    "params"
  ]
  assert set(params) == {
    "word_embedding",
    "position_embedding",
    "type_embedding",
  }
  ids_BT = np.array([[0, 5, 2, 1]], np.int32)
  valid_BT = np.array([[True, True, True, False]])
  states_BTD = encoder.apply({"params": params}, ids_BT, valid_BT)
  rows = {name: np.asarray(table) for name, table in params.items()}
  words_TD = (
    rows["word_embedding"][ids_BT[0]]
    + rows["position_embedding"][[2, 3, 4, 1]]
    + rows["type_embedding"]
  )
  # The mean of the other valid states stands first.
  words_TD[0] = words_TD[1:3].mean(axis=0)
  np.testing.assert_allclose(states_BTD[0], words_TD, atol=1e-6)


def test_positions_can_start_smaller_than_words(key):
  model = random_pairs.config(text={"place_std": 0.001}).model
  params = jax.jit(text.TextEncoder(model).init)(
    key, np.zeros((1, 4), np.int32), VALID[1:]
  )["params"]
  assert 0.015 < params["word_embedding"].std() < 0.025
  assert 0.0007 < params["position_embedding"].std() < 0.0013
  assert 0.0007 < params["type_embedding"].std() < 0.0013


# --- the causal tower of CoCa ------------------------------------------------

# A text of three tokens and one of four, which fills its row.
IDS = np.array([[0, 9, 2, 1], [0, 7, 8, 2]], np.int32)


@pytest.fixture(scope="module")
def causal():
  """A compiled function of ids and validity, on random weights."""
  module = text.CausalTextEncoder(random_pairs.config(depth=2).model)
  shapes = jax.eval_shape(module.init, jax.random.key(0), IDS, VALID)
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda leaf: 0.2 * rng.standard_normal(leaf.shape).astype(np.float32),
    shapes,
  )
  run = jax.jit(module.apply)
  return lambda ids, valid: np.asarray(run(params, ids, valid))


@pytest.mark.parametrize("place", range(4))
def test_a_causal_state_sees_its_token_and_those_before(causal, place):
  ids_BT = IDS.copy()
  ids_BT[1, place] = 33
  before, after = causal(IDS, VALID)[1], causal(ids_BT, VALID)[1]
  np.testing.assert_array_equal(after[:place], before[:place])
  # The class row, appended as the last one, sees all.
  for row in range(place, 5):
    assert not np.allclose(after[row], before[row], atol=1e-3), row


def test_padding_is_seen_by_no_token_and_not_by_the_class(causal):
  states = causal(IDS, VALID)
  other = causal(np.where(VALID, IDS, 33).astype(np.int32), VALID)
  kept = np.pad(VALID, ((0, 0), (0, 1)), constant_values=True)
  np.testing.assert_array_equal(other[kept], states[kept])
  assert not np.array_equal(other[~kept], states[~kept])
  # The id of the padding is a token like any other where it is valid.
  ids_BT = IDS.copy()
  ids_BT[1, 1] = random_pairs.PAD
  assert not np.allclose(causal(ids_BT, VALID)[1], states[1], atol=1e-3)


def test_longer_padding_changes_no_causal_state(causal):
  pad = ((0, 0), (0, 3))
  short, long = causal(IDS, VALID), causal(np.pad(IDS, pad), np.pad(VALID, pad))
  np.testing.assert_allclose(long[:, :4][VALID], short[:, :4][VALID], atol=1e-5)
  np.testing.assert_allclose(long[:, -1], short[:, -1], atol=1e-5)


def test_the_causal_tower_starts_with_the_spreads_of_coca(key):
  model = random_pairs.config(depth=2, text={"place_std": 0.01}).model
  params = jax.jit(text.CausalTextEncoder(model).init)(key, IDS, VALID)
  params = params["params"]
  block = params["blocks"]["layers"]
  for values, std in (
    (params["word_embedding"], 0.02),
    (params["position_embedding"], 0.01),
    (block["attention"]["query"]["kernel"], 64**-0.5),
    (block["attention"]["out"]["kernel"], 64**-0.5 * 4**-0.5),
    (block["mlp"]["fc1"]["kernel"], 128**-0.5),
    (block["mlp"]["fc2"]["kernel"], 64**-0.5 * 4**-0.5),
  ):
    assert np.std(values) == pytest.approx(std, rel=0.1)
  # LN_final is made where contrast asks for it.
  assert "norm" not in params
