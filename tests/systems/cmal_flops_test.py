"""The FLOPs of a step are those of the products it runs."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest

from glscl_jax import config as config_lib
from glscl_jax.models import flops
from glscl_jax.objectives import anchors
from glscl_jax.systems import cmal, cmal_flops
from tests import random_pairs, random_regions
from tests.systems import glscl_flops_test

EVERY = config_lib.SYSTEM_OBJECTIVES["cmal"]
WEIGHTS = {"amc": 3.0, "wrc": 2.0, "itm": 1.0}


def count(config):
  """Products of one traced loss."""
  loss = functools.partial(cmal.loss, config=config)
  jaxpr = jax.make_jaxpr(lambda p, b, k: loss(p, b, key=k).loss)(
    random_pairs.abstract_params(config),
    random_regions.batch(config),
    jax.random.key(0),
  )
  return glscl_flops_test.count_products(jaxpr.jaxpr)


@pytest.mark.parametrize(
  ("names", "options"),
  [
    ((), {}),
    (EVERY, {"depth": 2}),
    (EVERY, {"masking": {"swap": "none"}}),
    (EVERY, {"masking": {"swap": "image"}, "unimodal_layers": (2, 1)}),
    *(((name,), {}) for name in EVERY),
  ],
  ids=["all", "every", "no swap", "one side", *EVERY],
)
def test_the_count_is_that_of_the_products_the_system_runs(names, options):
  config = random_regions.config(*names, batch_size=4, **options)
  expected = 4 * cmal_flops.forward(config).total
  # What stands for hidden regions is made once a step, not once a sample.
  if {"amc", "mrc", "mrfr"} & set(config.objectives.active):
    expected += flops.linear(1, 16, 64)
  assert count(config) == expected


def test_the_count_leaves_out_the_contrast_of_anchors(monkeypatch):
  config = random_regions.config("amc", objectives={"amc_pair": 1.0})
  monkeypatch.setattr(anchors, "pair_contrast", lambda *_, **__: jnp.zeros(()))
  expected = 8 * cmal_flops.forward(config).total + flops.linear(1, 16, 64)
  assert count(config) == expected


def test_a_drawn_step_costs_the_mean_by_weight():
  config = random_regions.config(objectives=WEIGHTS | {"task_mix": "sample"})
  alone = {
    name: cmal_flops.forward(random_regions.config(name)).total
    for name in WEIGHTS
  }
  expected = sum(WEIGHTS[name] * alone[name] for name in WEIGHTS) / 6
  assert cmal_flops.forward(config).total == pytest.approx(expected)


def test_all_objectives_cost_two_and_a_half_passes():
  config = random_regions.config()
  one = cmal_flops.forward(random_regions.config("wrc")).fusion
  assert cmal_flops.forward(config).fusion == 2.5 * one
