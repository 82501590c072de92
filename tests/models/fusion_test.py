import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glscl_jax.models import fusion
from tests import random_pairs

CONFIG = random_pairs.config(depth=2, scan=False).model


@pytest.fixture(scope="module")
def model():
  module = fusion.Fusion(CONFIG)

  def everything(module, x_BTD, valid_BT, y_BID):
    streams = module.body(
      module.transform_text(x_BTD), valid_BT, module.transform_image(y_BID)
    )
    x_BTD, y_BID = module.head(streams, valid_BT)
    return module.pool(x_BTD[:, 0], y_BID[:, 0])

  init = jax.jit(lambda *a: module.init(*a, method=everything))
  params = init(jax.random.key(0), *inputs())
  return module.bind(
    jax.tree.map(lambda x: x * 10 if x.ndim > 1 else x, params)
  )


@pytest.fixture(scope="module")
def head(model):
  return jax.jit(model.head)


def inputs():
  rng = np.random.default_rng(0)
  x_BTD = rng.normal(size=(2, 4, 64)).astype(np.float32)
  y_BID = rng.normal(size=(2, 3, 64)).astype(np.float32)
  valid_BT = np.array([[True, True, True, False], [True] * 4])
  return x_BTD, valid_BT, y_BID


def test_both_streams_read_the_old_values_of_the_other(model, head):
  x_BTD, valid_BT, y_BID = inputs()
  text, image = head((x_BTD, y_BID), valid_BT)
  expected = jax.jit(
    lambda: (
      model.last.text(x_BTD, y_BID, valid_BT, None),
      model.last.image(y_BID, x_BTD, None, valid_BT),
    )
  )()
  np.testing.assert_allclose(text, expected[0], atol=1e-5)
  np.testing.assert_allclose(image, expected[1], atol=1e-5)


def test_streams_have_their_own_type_and_weights(model):
  x_BTD, valid_BT, y_BID = inputs()
  type_2D = model.type_embedding()
  text, image = jax.jit(model.body)(x_BTD, valid_BT, y_BID)
  streams = (
    x_BTD + type_2D[0][None, None],
    y_BID + type_2D[1][None, None],
  )
  expected = jax.jit(lambda *a: model.stack(*a))(streams, valid_BT)
  np.testing.assert_allclose(text, expected[0], atol=1e-5)
  np.testing.assert_allclose(image, expected[1], atol=1e-5)
  last = model.variables["params"]["last"]
  assert not np.array_equal(
    last["text"]["mlp"]["fc1"]["kernel"], last["image"]["mlp"]["fc1"]["kernel"]
  )


def test_padded_words_reach_neither_stream(head):
  x_BTD, valid_BT, y_BID = inputs()
  other_BTD = np.where(valid_BT[:, :, None], x_BTD, 5.0).astype(np.float32)
  text, image = (
    [np.asarray(s) for s in pair]
    for pair in zip(
      *(head((x, y_BID), valid_BT) for x in (x_BTD, other_BTD)),
      strict=True,
    )
  )
  np.testing.assert_array_equal(text[0][valid_BT], text[1][valid_BT])
  np.testing.assert_array_equal(image[0], image[1])


def test_each_stream_reads_the_other(head):
  x_BTD, valid_BT, y_BID = inputs()
  text, image = head((x_BTD, y_BID), valid_BT)
  assert not np.allclose(
    text, head((x_BTD, y_BID[::-1]), valid_BT)[0], atol=1e-3
  )
  assert not np.allclose(
    image, head((x_BTD[::-1], y_BID), valid_BT[::-1])[1], atol=1e-3
  )


def test_rows_asked_for_are_the_rows_of_the_whole(head):
  x_BTD, valid_BT, y_BID = inputs()
  text, image = head((x_BTD, y_BID), valid_BT)
  some_text, no_image = head(
    (x_BTD, y_BID),
    valid_BT,
    jnp.array([[2, 0], [1, 3]]),
    jnp.zeros((2, 0), jnp.int32),
  )
  np.testing.assert_allclose(
    some_text[1], np.asarray(text)[1, [1, 3]], atol=1e-5
  )
  assert no_image.shape == (2, 0, 64)
  _, some_image = head(
    (x_BTD, y_BID),
    valid_BT,
    jnp.zeros((2, 0), jnp.int32),
    jnp.array([[2], [0]]),
  )
  np.testing.assert_allclose(
    some_image[0, 0], np.asarray(image)[0, 2], atol=1e-5
  )


def test_the_pooled_pair_is_text_then_image(model):
  x_BTD, _, y_BID = inputs()
  pooled_BD = model.pool(x_BTD[:, 0], y_BID[:, 0])
  assert pooled_BD.shape == (2, 128)
  np.testing.assert_allclose(
    pooled_BD[:, 64:], jnp.tanh(model.image_pooler(y_BID[:, 0])), rtol=1e-6
  )
  np.testing.assert_allclose(
    pooled_BD[:, :64], jnp.tanh(model.text_pooler(x_BTD[:, 0])), rtol=1e-6
  )


def test_attention_maps_are_text_by_image(model):
  x_BTD, valid_BT, y_BID = inputs()
  p_BHTI = jax.jit(model.attention)((x_BTD, y_BID), valid_BT)
  assert p_BHTI.shape == (2, 1, 4, 3)
  np.testing.assert_allclose(p_BHTI.sum(axis=-1), 1.0, rtol=1e-6)
