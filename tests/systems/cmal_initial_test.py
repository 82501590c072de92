"""How many parameters there are, where losses start, and what is called."""

from __future__ import annotations

import functools
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glscl_jax import config as config_lib
from glscl_jax.models import cmal as model
from glscl_jax.models import heads, regions, transformer
from glscl_jax.systems import cmal, registry
from glscl_jax.types import Visual
from tests import random_pairs, random_regions, recipes
from tests.systems import views_test

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
EVERY = config_lib.SYSTEM_OBJECTIVES["cmal"]

# --- parameters -------------------------------------------------------------


def formula(*, D, V, P, C, blocks, positions=512):
  """Live parameters of each part, in closed form; C classes, P of a feature."""
  norm, dense = 2 * D, D * D + D
  block = 4 * dense + 4 * D * D + 4 * D + 4 * D * D + D + 2 * norm
  words = V * D + positions * D + 2 * D + norm
  places = (P * D + D) + (7 * D + D) + 3 * norm
  head = dense + norm
  return {
    "both sides": words + places,
    "encoder": blocks * block,
    "mask feature": P,
    "words": head + V,
    "classes": head + D * (C + 1) + C + 1,
    "features": head + P,
    "temperature": 1,
    "match": dense + 2 * D + 2,
  }


READ = {
  "amc": {"mask feature", "words", "classes"},
  "wrc": {"temperature"},
  "itm": {"match"},
  "mlm": {"words"},
  "mrc": {"mask feature", "classes"},
  "mrfr": {"mask feature", "features"},
}
BASE = dict(D=768, V=28996, P=2048, C=1600, blocks=12)
TINY = dict(D=128, V=28996, P=64, C=1600, blocks=2)


def recipe(name):
  return config_lib.from_config_dict(recipes.load(str(CONFIGS / name)))


def count(config):
  return sum(
    leaf.size for leaf in jax.tree.leaves(random_pairs.abstract_params(config))
  )


def parameters_of(names, sizes):
  parts = formula(**sizes)
  read = {"both sides", "encoder"}.union(*(READ[name] for name in names))
  return sum(parts[part] for part in read)


@pytest.mark.parametrize(
  ("name", "sizes", "objectives", "expected"),
  [
    ("cmal_base.py", BASE, {"amc", "wrc", "itm"}, 112_342_664),
    ("cmal_base.py:uniter", BASE, {"itm", "mlm", "mrc"}, 112_342_663),
    ("cmal_tiny.py", TINY, {"amc", "wrc", "itm"}, 4_470_088),
  ],
)
def test_recipes_have_the_specified_number_of_parameters(
  name, sizes, objectives, expected
):
  config = recipe(name)
  assert set(config.objectives.active) == objectives
  assert count(config) == parameters_of(objectives, sizes) == expected


@pytest.mark.parametrize("name", EVERY)
def test_an_objective_alone_has_the_parameters_that_it_reads(name):
  sizes = dict(D=64, V=64, P=16, C=20, blocks=1, positions=24)
  assert count(random_regions.config(name)) == parameters_of((name,), sizes)


def test_blocks_of_one_side_come_on_top():
  plain, deeper = (
    random_regions.config(unimodal_layers=layers) for layers in ((0, 0), (2, 1))
  )
  block = 12 * 64 * 64 + 13 * 64
  # Each side has a norm more, before its blocks.
  assert count(deeper) - count(plain) == 3 * block + 2 * 2 * 64


def test_weights_and_rates_are_those_of_the_published_code():
  config = recipe("cmal_base.py")
  weights, rates = config.objectives, config.optimizer
  assert (weights.itm, weights.amc, weights.wrc) == (1, 3, 2)
  assert weights.task_mix == "sample" and config.masking.swap == "both"
  assert (rates.learning_rate, rates.clip_norm) == (5e-5, 5.0)
  assert (rates.beta1, rates.beta2, rates.weight_decay) == (0.9, 0.98, 0.01)
  assert rates.warmup_fraction * config.train.num_steps == 10_000
  assert recipe("cmal_base.py:uniter").masking.swap == "none"


def test_shapes_of_what_evaluation_asks_for():
  config = recipe("cmal_base.py")
  assert config.model.compute_dtype == "bfloat16"
  system = registry.find(config)
  # There is no contrastive space, and no patch to look at.
  assert system.image_vectors is system.text_vectors is None
  assert system.cross_attention is system.attention_part is None
  ids_BT = jax.ShapeDtypeStruct((3, 62), jnp.int32)
  valid_BT = jax.ShapeDtypeStruct((3, 62), bool)
  visual = Visual(
    region_BRP=jax.ShapeDtypeStruct((3, 36, 2048), jnp.float32),
    box_BR7=jax.ShapeDtypeStruct((3, 36, 7), jnp.float32),
    region_valid_BR=jax.ShapeDtypeStruct((3, 36), bool),
  )

  def everything(params, visual, ids_BT, valid_BT):
    x_BTD = system.encode_text(params, ids_BT, valid_BT, config=config)
    y_BRD = system.encode_visual(params, visual, config=config)
    states = x_BTD, valid_BT, y_BRD, visual.valid
    return x_BTD, y_BRD, system.match_scores(params, *states, config=config)

  x, y, scores = jax.eval_shape(
    everything, random_pairs.abstract_params(config), visual, ids_BT, valid_BT
  )
  assert (x.shape, y.shape) == ((3, 62, 768), (3, 36, 768))
  assert (scores.shape, scores.dtype) == ((3,), np.dtype("float32"))


# --- values -----------------------------------------------------------------


def test_losses_start_where_a_guess_would():
  config = random_regions.config(
    *EVERY,
    width=128,
    vocab_size=28996,
    region=config_lib.RegionConfig(
      number=6, feature_width=16, num_classes=1600
    ),
    # In 128 dimensions the cosines of random vectors are no small ones.
    itc_temperature=0.3,
  )
  batch = random_regions.batch(config)
  found = random_pairs.loss_function(config)(
    random_pairs.params(config), batch, jax.random.key(0)
  ).metrics
  sizes = np.sum(batch.text_valid_BT, 1) * np.sum(batch.region_valid_BR, 1)
  features = batch.region_BRP[batch.region_valid_BR]
  for name, expected, tolerance in (
    ("amc_words", math.log(28996), 0.15),
    ("amc_regions", math.log(1601), 0.1),
    ("mlm", math.log(28996), 0.15),
    ("mrc", math.log(1601), 0.1),
    ("itm", math.log(2), 0.05),
    ("wrc", np.mean(np.log(sizes)), 0.3),
    ("mrfr", np.mean(features**2), 0.3),
  ):
    assert float(found[name]) == pytest.approx(expected, abs=tolerance), name


# --- calls ------------------------------------------------------------------


def calls_of_a_step(config, monkeypatch):
  """Shapes of what one loss embeds, runs and reads, by method."""
  params, calls = random_pairs.abstract_params(config), {}
  for owner, name in (
    (model.WordEmbedding, "contents"),
    (regions.RegionEmbedding, "contents"),
    (transformer.Stack, "__call__"),
    (heads.TiedHead, "__call__"),
    (heads.VocabularyHead, "__call__"),
  ):
    views_test.count_calls(monkeypatch, owner, name, calls)
  jax.eval_shape(
    functools.partial(cmal.loss, config=config),
    params,
    random_regions.batch(config),
    key=jax.random.key(0),
  )
  return calls


def test_all_objectives_of_a_step_take_two_and_a_half_passes(monkeypatch):
  config = random_regions.config(batch_size=4)
  assert calls_of_a_step(config, monkeypatch) == {
    # Regions once; the text, and the text of AMC.
    "RegionEmbedding.contents": [(4, 6, 16)],
    "WordEmbedding.contents": [(4, 10), (4, 10)],
    # AMC, own pairs of WRC and ITM, and two false ones: 10 tokens, 6 regions.
    "Stack.__call__": [(10, 16, 64)],
    # Four anchors, four tokens besides of their words, one masked; any region.
    "TiedHead.__call__": [(4, 9, 64)],
    "VocabularyHead.__call__": [(4, 6, 64)],
  }


@pytest.mark.parametrize(
  ("objectives", "options", "rows"),
  [
    (("amc",), {}, 4),
    (("wrc",), {}, 4),
    (("itm",), {}, 4),
    (("wrc", "itm"), {}, 6),
    (("amc", "itm"), {}, 8),
    (("mrc", "mrfr"), {}, 4),
    (("itm", "mlm", "mrc"), {"masking": {"swap": "none"}}, 12),
  ],
  ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_objectives_run_only_the_passes_they_read(
  objectives, options, rows, monkeypatch
):
  config = random_regions.config(*objectives, batch_size=4, **options)
  calls = calls_of_a_step(config, monkeypatch)
  assert calls["Stack.__call__"] == [(rows, 16, 64)]
  assert calls["RegionEmbedding.contents"] == [(4, 6, 16)]


def test_a_sampled_objective_takes_one_pass(monkeypatch):
  config = random_regions.config(
    batch_size=4, objectives={"task_mix": "sample"}
  )
  calls = calls_of_a_step(config, monkeypatch)
  # Each branch is traced: none has more rows than the batch.
  assert set(calls["Stack.__call__"]) == {(4, 16, 64)}
