"""Published checkpoints: names, layouts, strictness, position tables."""

from __future__ import annotations

import functools
import json
import pathlib

import cv2
import jax
import numpy as np
import pytest

from glscl_jax import config as config_lib
from glscl_jax.models import pretrained
from glscl_jax.systems import glscl

PUBLISHED = pathlib.Path(__file__).parents[1] / "golden" / "pretrain"
VOCAB = 31  # instead of 50265
WIDTH = 128


def wanted(**objectives):
  """The structure and shapes of the published tiny model."""
  config = config_lib.Config(
    model=config_lib.ModelConfig(
      vision=config_lib.VisionConfig(image_size=64, width=WIDTH, depth=2),
      text=config_lib.TextConfig(
        vocab_size=VOCAB, max_length=12, width=WIDTH, depth=2
      ),
      fusion=config_lib.FusionConfig(width=WIDTH, depth=2),
    ),
    objectives=config_lib.ObjectiveConfig(**objectives),
  )
  return jax.eval_shape(
    functools.partial(glscl.init, config), jax.random.key(0)
  )


@pytest.fixture(scope="module")
def like():
  return wanted()


@pytest.fixture(scope="module")
def arrays():
  """Random arrays under every name of a published checkpoint."""
  shapes = json.loads((PUBLISHED / "expected.json").read_text())["shapes"]
  rng = np.random.default_rng(0)
  return {
    name: np.asarray(
      rng.standard_normal([VOCAB if n == 50265 else n for n in shape]),
      np.float32,
    )
    for name, shape in shapes.items()
  }


def without(arrays, *names):
  return {name: value for name, value in arrays.items() if name not in names}


def test_every_published_array_comes_back_unchanged(arrays, like):
  params = pretrained.from_scl(arrays, like)
  assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, like)
  back = pretrained.to_scl(params)
  for name, array in back.items():
    np.testing.assert_array_equal(array, arrays[name], err_msg=name)
  unread = {name.split(".")[1].split("_")[0] for name in set(arrays) - {*back}}
  assert unread == {"decoder", "mask", "pooler"}


def test_linear_weights_are_transposed_and_layers_keep_their_order(
  arrays, like
):
  params = pretrained.from_scl(arrays, like)
  for i in range(2):
    np.testing.assert_array_equal(
      params["text"]["blocks"]["layers"]["mlp"]["fc1"]["kernel"][i],
      arrays[f"text_transformer.encoder.layer.{i}.intermediate.dense.weight"].T,
    )
  cross = "crossattention.self.query.weight"
  fusion = params["fusion"]
  for stream in ("text", "image"):
    np.testing.assert_array_equal(
      fusion["stack"]["layers"][stream]["cross_attention"]["query"]["kernel"],
      arrays[f"cross_modal_{stream}_layers.0.{cross}"].T[None],
    )
    np.testing.assert_array_equal(
      fusion["last"][stream]["cross_attention"]["query"]["kernel"],
      arrays[f"cross_modal_{stream}_layers.1.{cross}"].T,
    )


def test_fused_projections_split_into_query_key_value(arrays, like):
  params = pretrained.from_scl(arrays, like)
  attention = params["vision"]["blocks"]["layers"]["attention"]
  block = "vision_transformer.visual.transformer.resblocks.1.attn"
  for third, name in enumerate(("query", "key", "value")):
    rows = slice(third * WIDTH, (third + 1) * WIDTH)
    np.testing.assert_array_equal(
      attention[name]["kernel"][1],
      arrays[f"{block}.in_proj_weight"][rows].T,
    )
    np.testing.assert_array_equal(
      attention[name]["bias"][1], arrays[f"{block}.in_proj_bias"][rows]
    )


def test_patch_kernel_does_what_the_convolution_does(arrays, like):
  kernel = pretrained.from_scl(arrays, like)["vision"]["patch_kernel"]
  conv = arrays["vision_transformer.visual.conv1.weight"]
  patch = np.random.default_rng(1).standard_normal((16, 16, 3))
  wanted = np.einsum("dcyx,yxc->d", conv, patch)
  np.testing.assert_allclose(patch.reshape(-1) @ kernel, wanted, rtol=1e-6)


def test_a_missing_name_fails_and_is_named(arrays, like):
  with pytest.raises(
    pretrained.WeightsError, match="missing: itm_score.fc.weight"
  ):
    pretrained.from_scl(without(arrays, "itm_score.fc.weight"), like)


def test_an_extra_name_fails_and_is_named(arrays, like):
  extra = arrays | {"vqa_classifier.0.weight": np.zeros((2, 2))}
  with pytest.raises(
    pretrained.WeightsError, match="unexpected: vqa_classifier.0.weight"
  ):
    pretrained.from_scl(extra, like)


def test_one_block_too_many_fails(arrays, like):
  block = "vision_transformer.visual.transformer.resblocks.2.ln_1.bias"
  with pytest.raises(pretrained.WeightsError, match=f"unexpected: {block}"):
    pretrained.from_scl(arrays | {block: np.zeros(WIDTH)}, like)


def test_every_wrong_shape_is_named(arrays, like):
  block = "vision_transformer.visual.transformer.resblocks.0.attn"
  wrong = arrays | {
    "mlm_score.decoder.weight": np.zeros((VOCAB + 1, WIDTH)),
    f"{block}.in_proj_bias": np.zeros(WIDTH),
    "cl_temp": np.zeros(1),
    pretrained.POSITIONS: np.zeros((18, WIDTH)),
  }
  with pytest.raises(pretrained.WeightsError) as error:
    pretrained.from_scl(wrong, like)
  lines = str(error.value).splitlines()
  assert len(lines) == 5
  for name in wrong:
    named = any(f"shape: {name} " in line for line in lines)
    assert named == (wrong[name] is not arrays.get(name))


def test_names_on_the_ignore_list_may_be_there_or_not(arrays, like):
  reduced = without(arrays, "text_transformer.pooler.dense.bias")
  more = arrays | {
    "text_transformer.embeddings.position_ids": np.arange(514)[None],
    "val_itm_accuracy.total": np.zeros(()),
  }
  for variant in (reduced, more):
    assert pretrained.from_scl(variant, like).keys() == like.keys()


def test_scl_checkpoints_need_no_patch_token(arrays):
  like = wanted(mltc_image=0.0, mltc_text=0.0)
  name = "vision_transformer.visual.visual_mask_token"
  params = pretrained.from_scl(without(arrays, name), like)
  assert "mask_token" not in params["vision"]
  with pytest.raises(pretrained.WeightsError, match=f"unexpected: {name}"):
    pretrained.from_scl(arrays, like)


def test_a_parameter_without_a_published_name_is_an_error():
  with pytest.raises(pretrained.WeightsError, match="text/extra"):
    pretrained.to_scl({"text": {"extra": np.zeros(3)}})


def test_a_position_table_of_another_grid_is_resized_on_import(arrays, like):
  table = np.random.default_rng(2).standard_normal((1 + 36, WIDTH))
  params = pretrained.from_scl(arrays | {pretrained.POSITIONS: table}, like)
  position = params["vision"]["position_embedding"]
  assert position.shape == (17, WIDTH)
  assert position.dtype == np.float32
  np.testing.assert_array_equal(position[0], table[0].astype(np.float32))


@pytest.mark.parametrize(("old", "new"), [(14, 18), (14, 24), (18, 24), (6, 4)])
def test_position_resize_equals_bicubic_interpolation(old, new):
  # OpenCV's cubic is the same: a = -0.75, borders repeated, no antialiasing.
  table = np.random.default_rng(3).standard_normal((1 + old * old, 5))
  resized = pretrained.resize_positions(table, new)
  grid = table[1:].reshape(old, old, 5)
  wanted = cv2.resize(grid, (new, new), interpolation=cv2.INTER_CUBIC)
  np.testing.assert_array_equal(resized[0], table[0])
  np.testing.assert_allclose(
    resized[1:].reshape(new, new, 5), wanted, atol=1e-5
  )


@pytest.mark.parametrize("grid", [1, 4, 14])
def test_position_resize_to_the_same_grid_is_exact(grid):
  table = np.random.default_rng(4).standard_normal((1 + grid**2, 3))
  np.testing.assert_array_equal(pretrained.resize_positions(table, grid), table)
  np.testing.assert_array_equal(
    pretrained.resize_matrix(grid, grid), np.eye(grid)
  )
