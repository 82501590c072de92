"""The FLOPs of a step are those of the products it runs."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest

from glscl_jax.models import flops
from glscl_jax.objectives import contrastive
from glscl_jax.systems import sycoca, sycoca_flops
from tests import random_pairs
from tests.systems import glscl_flops_test

STEM = {
  "image_size": 64,
  "vision": {"patch_size": 16, "stem": (8, 16, 64), "stem_blocks": (1, 1, 1)},
}


def count(config):
  """Products of one traced loss."""
  loss = functools.partial(sycoca.loss, config=config)
  jaxpr = jax.make_jaxpr(lambda p, b, k: loss(p, b, key=k).loss)(
    random_pairs.abstract_params(config),
    random_pairs.batch(config),
    jax.random.key(0),
  )
  return glscl_flops_test.count_products(jaxpr.jaxpr)


@pytest.mark.parametrize(
  ("names", "options"),
  [
    ((), {}),
    ((), {"restrict_last_layer": False, "depth": 3}),
    ((), {"masking": {"mim_mask_level": "feature", "r_low": 0.25}}),
    ((), {"masking": {"ic_mask": False, "r_high": 0.75}} | STEM),
    (("itc", "ic"), {"joint_projection": "mlp", "depth": 2}),
    (("itc",), {}),
    (("ic",), {"masking": {"ic_mask": False}}),
    (("tg_mim",), {"fusion": {"mim_text": False}, "depth": 2}),
    (("tg_mim",), STEM),
  ],
  ids=[
    "all",
    "all rows",
    "one image pass",
    "stem",
    "attentive captions",
    "clip",
    "captions of all patches",
    "pixels from pixels",
    "stem alone",
  ],
)
def test_the_count_is_that_of_the_products_the_system_runs(
  names, options, monkeypatch
):
  # The count leaves out similarities of ITC.
  monkeypatch.setattr(
    contrastive, "info_nce", lambda query, *_, **__: jnp.sum(query)
  )
  monkeypatch.setattr(contrastive, "accuracy", lambda *_, **__: jnp.zeros(()))
  config = random_pairs.sycoca(*names, batch_size=2, **options)
  assert count(config) == 2 * sycoca_flops.forward(config).total


def test_scores_have_no_backward_pass():
  both = random_pairs.sycoca()
  found = sycoca_flops.forward(both)
  # 16 patches and 10 tokens into 32 values, and their similarities.
  assert found.targets == 26 * flops.linear(1, 64, 32) + flops.linear(
    16, 32, 10
  )
  assert found.step == 3 * found.total - 2 * found.targets
  plain = random_pairs.sycoca(masking={"split": "random"})
  assert sycoca_flops.forward(plain).total == found.total - found.targets
