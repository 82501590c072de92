"""How many parameters there are, and what is called."""

from __future__ import annotations

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glscl_jax import config as config_lib
from glscl_jax.models import cross_stack, heads, text, vision
from glscl_jax.systems import registry, sycoca
from glscl_jax.types import Visual
from tests import random_pairs, recipes
from tests.systems import views_test

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"

# --- parameters -------------------------------------------------------------


def formula(*, D, E, V, N, P, T, blocks, captions, pixels):
  """Live parameters of ITC, of IC and of TG-MIM, in closed form.

  `captions`, `pixels`: depths of the decoders; P values of a patch, T tokens.
  """
  norm, dense = 2 * D, D * D + D
  mlp = 4 * D * D + 4 * D + 4 * D * D + D
  block = 4 * dense + mlp + 2 * norm
  image = P * D + D + (1 + N) * D + 2 * norm + blocks * block
  words = V * D + (T + 1) * D + D + blocks * block
  contrast = 2 * D * E + 1 + norm  # with LN_final
  caption_block = 8 * dense + 2 * mlp + 5 * norm
  pixel_block = 8 * dense + mlp + 4 * norm
  return {
    "itc": image + words + contrast,
    "ic": captions * caption_block + norm + D * V,
    "tg_mim": D + N * D + pixels * pixel_block + norm + P * D + P,
  }


SIZES = {
  "base": dict(
    D=768, E=512, V=49408, N=256, P=972, T=76, blocks=12, captions=12, pixels=4
  ),
  "tiny": dict(
    D=128, E=64, V=49408, N=16, P=768, T=12, blocks=2, captions=2, pixels=1
  ),
}


def recipe(name):
  return config_lib.from_config_dict(recipes.load(str(CONFIGS / name)))


def count(config):
  return sum(
    leaf.size for leaf in jax.tree.leaves(random_pairs.abstract_params(config))
  )


@pytest.mark.parametrize(
  ("name", "size", "objectives", "expected"),
  [
    ("sycoca_base.py", "base", ("itc", "ic", "tg_mim"), 456_683_725),
    ("sycoca_base.py:coca", "base", ("itc", "ic"), 417_924_097),
    ("sycoca_base.py:clip", "base", ("itc",), 209_849_857),
    ("sycoca_tiny.py", "tiny", ("itc", "ic", "tg_mim"), 14_721_281),
  ],
)
def test_recipes_have_the_specified_number_of_parameters(
  name, size, objectives, expected
):
  config = recipe(name)
  assert config.objectives.active == objectives
  parts = formula(**SIZES[size])
  assert count(config) == sum(parts[n] for n in objectives) == expected


def test_weights_and_ratios_are_those_of_the_paper():
  config = recipe("sycoca_base.py")
  weights = config.objectives
  assert (weights.itc, weights.ic, weights.tg_mim) == (1, 2, 1)
  assert (config.masking.r_high, config.masking.r_low) == (0.5, 0.5)
  assert config.optimizer.warmup_fraction * config.train.num_steps == (
    pytest.approx(2000)
  )


def test_without_text_the_image_decoder_has_no_cross_attention():
  config = random_pairs.sycoca(depth=2)
  plain = random_pairs.sycoca(depth=2, fusion={"mim_text": False})
  # Four maps and two norms a block.
  assert count(config) - count(plain) == 2 * (4 * (64 * 64 + 64) + 4 * 64)


def test_shapes_of_what_evaluation_asks_for():
  config = recipe("sycoca_base.py")
  assert config.model.compute_dtype == "bfloat16"
  system = registry.find(config)
  assert system.match_scores is None
  ids_BT = jax.ShapeDtypeStruct((3, 76), jnp.int32)
  valid_BT = jax.ShapeDtypeStruct((3, 76), bool)
  image_BYXC = jax.ShapeDtypeStruct((3, 288, 288, 3), jnp.uint8)

  def everything(params, image_BYXC, ids_BT, valid_BT):
    x_BLD = system.encode_text(params, ids_BT, valid_BT, config=config)
    y_BID = system.encode_visual(
      params, Visual(image_BYXC=image_BYXC), config=config
    )
    return (
      x_BLD,
      y_BID,
      system.text_vectors(params, x_BLD, config=config),
      system.image_vectors(params, y_BID, config=config),
      system.cross_attention(params, x_BLD, valid_BT, y_BID, config=config),
    )

  x, y, words, image, maps = jax.eval_shape(
    everything,
    random_pairs.abstract_params(config),
    image_BYXC,
    ids_BT,
    valid_BT,
  )
  assert (x.shape, y.shape) == ((3, 77, 768), (3, 257, 768))
  assert words.shape == image.shape == (3, 512)
  assert maps.shape == (3, 12, 76, 257)
  assert {a.dtype for a in (words, image, maps)} == {np.dtype("float32")}


# --- calls ------------------------------------------------------------------


def calls_of_a_step(config, monkeypatch):
  """Shapes of what is encoded, fused and read in one loss, by method."""
  params, calls = random_pairs.abstract_params(config), {}
  for owner, name in (
    (vision.VisionEncoder, "embed"),
    (vision.VisionEncoder, "encode"),
    (text.CausalTextEncoder, "__call__"),
    (cross_stack.CrossStack, "body"),
    (heads.NormHead, "__call__"),
  ):
    views_test.count_calls(monkeypatch, owner, name, calls)
  jax.eval_shape(
    functools.partial(sycoca.loss, config=config),
    params,
    random_pairs.batch(config),
    key=jax.random.key(0),
  )
  return calls


def test_the_image_is_encoded_twice_and_the_text_once(monkeypatch):
  config = random_pairs.sycoca(batch_size=4, masking={"r_high": 0.25})
  assert calls_of_a_step(config, monkeypatch) == {
    # One patch embedding; first I, then I with 4 patches hidden.
    "VisionEncoder.embed": [(4, 32, 32, 3)],
    "VisionEncoder.encode": [(4, 17, 64), (4, 17, 64)],
    "CausalTextEncoder.__call__": [(4, 10)],
    # Captions: all tokens but the last. Pixels: all patches.
    "CrossStack.body": [(4, 9, 64), (4, 16, 64)],
    # Next tokens; hidden patches only.
    "NormHead.__call__": [(4, 9, 64), (4, 4, 64)],
  }


@pytest.mark.parametrize(
  ("masking", "keys"),
  [({"r_low": 0.25}, 12), ({"ic_mask": False}, 16)],
  ids=["three quarters", "all"],
)
def test_captions_read_the_kept_patches_only(masking, keys, monkeypatch):
  config = random_pairs.sycoca(batch_size=4, masking=masking)
  seen = []
  original = cross_stack.CrossStack.body

  def record(self, x, context, *valid):
    seen.append(context.shape)
    return original(self, x, context, *valid)

  monkeypatch.setattr(cross_stack.CrossStack, "body", record)
  calls_of_a_step(config, monkeypatch)
  # The image decoder asks all tokens.
  assert seen[-2:] == [(4, keys, 64), (4, 10, 64)]


@pytest.mark.parametrize(
  ("objectives", "options", "images", "texts", "decoders"),
  [
    (("itc",), {}, 1, 1, 0),
    (("itc", "ic"), {}, 1, 1, 1),
    (("tg_mim",), {"fusion": {"mim_text": False}}, 1, 0, 1),
    (
      ("itc", "ic", "tg_mim"),
      {"masking": {"mim_mask_level": "feature"}},
      1,
      1,
      2,
    ),
    (("itc", "tg_mim"), {}, 2, 1, 1),
  ],
  ids=[
    "clip",
    "attentive captions",
    "pixels from pixels",
    "all with features",
    "no captions",
  ],
)
def test_objectives_run_only_the_passes_they_read(
  objectives, options, images, texts, decoders, monkeypatch
):
  config = random_pairs.sycoca(*objectives, batch_size=4, **options)
  calls = calls_of_a_step(config, monkeypatch)
  assert len(calls["VisionEncoder.embed"]) == 1
  assert len(calls["VisionEncoder.encode"]) == images
  assert len(calls.get("CausalTextEncoder.__call__", [])) == texts
  assert len(calls.get("CrossStack.body", [])) == decoders
