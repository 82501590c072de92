"""Where losses start, how many parameters there are, what is called."""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glscl_jax import config as config_lib
from glscl_jax.models import cross_stack, heads, text, vision
from glscl_jax.systems import maskvlm, registry
from glscl_jax.types import Visual
from tests import random_pairs, recipes
from tests.systems import views_test

BATCH, WORDS = 16, 1000
CONFIGS = pathlib.Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module")
def metrics():
  """Losses of fresh parameters on distinct random samples."""
  config = random_pairs.maskvlm(
    batch_size=BATCH, vocab_size=WORDS, max_length=20
  )
  # Pixels of deviation 1 and mean 0, as the pixel loss expects them.
  noise = np.random.default_rng(0).standard_normal((BATCH, 32, 32, 3))
  batch = random_pairs.change(
    random_pairs.batch(config), image_BYXC=noise.astype(np.float32)
  )
  output = random_pairs.loss_function(config)(
    random_pairs.params(config), batch, jax.random.key(1)
  )
  return {name: float(value) for name, value in output.metrics.items()}


@pytest.mark.parametrize(
  ("name", "expected", "tolerance"),
  [
    ("itc", math.log(BATCH), 0.3),
    ("mlm", math.log(WORDS), 0.15),
    ("itm", math.log(2), 0.05),
    # Of a zero output: the mean of a normal variable's absolute value. The
    # output of fresh parameters has a deviation of .16.
    ("mim", math.sqrt(2 / math.pi), 0.03),
  ],
)
def test_losses_start_where_a_guess_would(name, expected, tolerance, metrics):
  assert metrics[name] == pytest.approx(expected, abs=tolerance)


def test_the_loss_is_the_sum_of_the_objectives(metrics):
  total = sum(metrics[name] for name in ("mlm", "mim", "itc", "itm"))
  assert metrics["loss"] == pytest.approx(total, rel=1e-5)


# --- parameters -------------------------------------------------------------


def formula(
  *, D, E, V, N, blocks, image_depth, text_depth, decoder_depth, positions=514
):
  """Live parameters, in closed form; patches of 16 pixels, P = 768 values."""
  P, norm, dense = 768, 2 * D, D * D + D
  mlp = 4 * D * D + 4 * D + 4 * D * D + D
  block = 4 * dense + mlp + 2 * norm
  cross_block = 8 * dense + mlp + 3 * norm
  image = P * D + D + D + (1 + N) * D + D + blocks * block + norm
  words = V * D + positions * D + D + norm + blocks * block
  stacks = (image_depth + text_depth + decoder_depth) * cross_block
  vocabulary = dense + norm + D * V + V
  pixels = D * P + P
  contrast = 2 * (D * E + E) + 1
  match = 2 * D + 2
  return image + words + stacks + vocabulary + pixels + contrast + match


def recipe(name):
  return config_lib.from_config_dict(recipes.load(str(CONFIGS / f"{name}.py")))


def count(config):
  return sum(
    leaf.size for leaf in jax.tree.leaves(random_pairs.abstract_params(config))
  )


def test_the_base_recipe_has_the_specified_number_of_parameters():
  expected = formula(
    D=768,
    E=256,
    V=50265,
    N=196,
    blocks=12,
    image_depth=3,
    text_depth=3,
    decoder_depth=3,
  )
  assert count(recipe("maskvlm_base")) == expected == 335_152_220


def test_the_tiny_recipe_has_the_specified_number_of_parameters():
  expected = formula(
    D=128,
    E=64,
    V=50265,
    N=16,
    blocks=2,
    image_depth=1,
    text_depth=1,
    decoder_depth=1,
  )
  assert count(recipe("maskvlm_tiny")) == expected == 14_804_828


def test_both_side_by_side_double_the_matrix_of_matching():
  product = random_pairs.maskvlm()
  concat = dataclasses.replace(
    product, model=dataclasses.replace(product.model, match_features="concat")
  )
  assert count(concat) - count(product) == 2 * 64
  output = random_pairs.loss_function(concat)(
    random_pairs.spread_params(concat),
    random_pairs.batch(concat),
    jax.random.key(0),
  )
  assert np.isfinite(float(output.metrics["itm"]))


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_shapes_of_what_evaluation_asks_for(compute_dtype):
  config = recipe("maskvlm_base")
  config = dataclasses.replace(
    config,
    model=dataclasses.replace(config.model, compute_dtype=compute_dtype),
  )
  system = registry.find(config)
  ids_BT = jax.ShapeDtypeStruct((3, 50), jnp.int32)
  valid_BT = jax.ShapeDtypeStruct((3, 50), bool)
  image_BYXC = jax.ShapeDtypeStruct((3, 224, 224, 3), jnp.uint8)

  def everything(params, image_BYXC, ids_BT, valid_BT):
    x_BTD = system.encode_text(params, ids_BT, valid_BT, config=config)
    y_BID = system.encode_visual(
      params, Visual(image_BYXC=image_BYXC), config=config
    )
    states = x_BTD, valid_BT, y_BID
    return (
      x_BTD,
      y_BID,
      system.text_vectors(params, x_BTD, config=config),
      system.image_vectors(params, y_BID, config=config),
      system.match_scores(params, *states, config=config),
      system.cross_attention(params, *states, config=config),
    )

  x, y, words, image, scores, maps = jax.eval_shape(
    everything,
    random_pairs.abstract_params(config),
    image_BYXC,
    ids_BT,
    valid_BT,
  )
  assert (x.shape, y.shape) == ((3, 50, 768), (3, 197, 768))
  assert words.shape == image.shape == (3, 256)
  assert scores.shape == (3,)
  assert maps.shape == (3, 12, 50, 197)
  assert {a.dtype for a in (words, image, scores, maps)} == {
    np.dtype("float32")
  }


# --- calls ------------------------------------------------------------------


def calls_of_a_step(config, monkeypatch):
  """Shapes of what is encoded, fused and read in one loss, by method."""
  params, calls = random_pairs.abstract_params(config), {}
  for owner, name in (
    (vision.VisionEncoder, "embed"),
    (vision.VisionEncoder, "encode"),
    (text.TextEncoder, "__call__"),
    (cross_stack.CrossStack, "body"),
    (heads.VocabularyHead, "__call__"),
    (heads.LinearHead, "__call__"),
  ):
    views_test.count_calls(monkeypatch, owner, name, calls)
  jax.eval_shape(
    functools.partial(maskvlm.loss, config=config),
    params,
    random_pairs.batch(config),
    key=jax.random.key(0),
  )
  return calls


def test_each_encoder_and_each_stack_is_called_once(monkeypatch):
  config = random_pairs.maskvlm(batch_size=4)
  assert calls_of_a_step(config, monkeypatch) == {
    # One patch embedding for both versions of the image.
    "VisionEncoder.embed": [(4, 32, 32, 3)],
    # I and I masked; T and T masked.
    "VisionEncoder.encode": [(8, 17, 64)],
    "TextEncoder.__call__": [
      (
        8,
        10,
      )
    ],
    # g_text and g_image: the masked side and three kinds of pairs each. The
    # decoder: all patches, without the class row.
    "CrossStack.body": [(16, 10, 64), (16, 17, 64), (4, 16, 64)],
    # Masked positions only: words, pixels; 3 pairs a sample.
    "VocabularyHead.__call__": [(4, 2, 64)],
    "LinearHead.__call__": [(12, 64), (4, 12, 64)],
  }


@pytest.mark.parametrize(
  ("objective", "encoded", "fused"),
  [
    ("mlm", (4, 4), [(4, 10, 64)]),
    ("mim", (4, 4), [(4, 17, 64), (4, 16, 64)]),
    ("itc", (4, 4), []),
    ("itm", (4, 4), [(12, 10, 64), (12, 17, 64)]),
  ],
)
def test_an_objective_alone_runs_its_own_passes(
  objective, encoded, fused, monkeypatch
):
  config = random_pairs.maskvlm(objective, batch_size=4)
  calls = calls_of_a_step(config, monkeypatch)
  assert [shape[0] for shape in calls["VisionEncoder.encode"]] == [encoded[0]]
  assert [shape[0] for shape in calls["TextEncoder.__call__"]] == [encoded[1]]
  assert calls.get("CrossStack.body", []) == fused
