import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glscl_jax import config as config_lib
from glscl_jax.models.towers import Towers
from glscl_jax.systems import glscl
from glscl_jax.types import Visual
from tests import random_pairs

BASE = config_lib.Config()


@pytest.fixture(scope="module")
def base():
  return jax.eval_shape(functools.partial(glscl.init, BASE), jax.random.key(0))


def count(tree):
  return sum(leaf.size for leaf in jax.tree.leaves(tree))


def test_base_has_the_published_number_of_parameters(base):
  assert count(base) == 359_871_580


def test_parameters_are_float32(base):
  assert {leaf.dtype.name for leaf in jax.tree.leaves(base)} == {"float32"}


def test_base_layers_are_stacked_by_depth(base):
  depths = {
    "vision": base["vision"]["blocks"]["layers"],
    "text": base["text"]["blocks"]["layers"],
    "fusion": base["fusion"]["stack"]["layers"],
  }
  found = {
    name: {leaf.shape[0] for leaf in jax.tree.leaves(tree)}
    for name, tree in depths.items()
  }
  assert found == {"vision": {11}, "text": {12}, "fusion": {5}}


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_shapes_of_what_evaluation_asks_for(base, compute_dtype):
  config = dataclasses.replace(
    BASE, model=config_lib.ModelConfig(compute_dtype=compute_dtype)
  )
  ids_BT = jax.ShapeDtypeStruct((3, 50), jnp.int32)
  valid_BT = jax.ShapeDtypeStruct((3, 50), bool)
  image_BYXC = jax.ShapeDtypeStruct((3, 288, 288, 3), jnp.uint8)

  def everything(params, image_BYXC, ids_BT, valid_BT):
    x_BTD = glscl.encode_text(params, ids_BT, valid_BT, config=config)
    y_BID = glscl.encode_visual(
      params, Visual(image_BYXC=image_BYXC), config=config
    )
    states = x_BTD, valid_BT, y_BID
    return (
      x_BTD,
      y_BID,
      glscl.text_vectors(params, x_BTD, config=config),
      glscl.image_vectors(params, y_BID, config=config),
      glscl.match_scores(params, *states, config=config),
      glscl.cross_attention(params, *states, config=config),
    )

  x, y, text, image, scores, maps = jax.eval_shape(
    everything, base, image_BYXC, ids_BT, valid_BT
  )
  assert (x.shape, y.shape) == ((3, 50, 768), (3, 325, 768))
  assert text.shape == image.shape == (3, 512)
  assert scores.shape == (3,)
  assert maps.shape == (3, 12, 50, 325)
  assert {a.dtype for a in (text, image, scores, maps)} == {np.dtype("float32")}


@pytest.mark.parametrize("method", ["project_text", "project_image"])
def test_without_a_projection_contrast_reads_the_transformed_states(method):
  model = random_pairs.config(**random_pairs.SMALL_DATA).model
  x_BD = np.arange(8, dtype=np.float16).reshape(2, 4)
  # No parameters: a projection would ask for its own.
  found_BE = Towers(model).apply({}, jnp.asarray(x_BD), method=method)
  np.testing.assert_array_equal(found_BE, x_BD)
  assert found_BE.dtype == np.float32
