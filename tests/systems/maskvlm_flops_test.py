"""The FLOPs of a step are those of the products it runs."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import pytest

from glscl_jax.objectives import contrastive, matching
from glscl_jax.systems import maskvlm, maskvlm_flops
from tests import random_pairs
from tests.systems import glscl_flops_test


def count(config):
  """Products of one traced loss."""
  loss = functools.partial(maskvlm.loss, config=config)
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
    ((), {"match_features": "concat", "joint_projection": "mlp"}),
    (("mlm",), {}),
    (("mim",), {"depth": 2}),
    (("itc",), {}),
    (("itm",), {}),
  ],
  ids=["all", "all rows", "other heads", "mlm", "mim", "itc", "itm"],
)
def test_the_count_is_that_of_the_products_the_system_runs(
  names, options, monkeypatch
):
  # The count leaves out similarities.
  monkeypatch.setattr(
    contrastive, "info_nce", lambda query, *_, **__: jnp.sum(query)
  )
  monkeypatch.setattr(contrastive, "accuracy", lambda *_, **__: jnp.zeros(()))
  monkeypatch.setattr(
    matching,
    "similarity_in_groups",
    lambda text, image, group: jnp.zeros((1, group, group)),
  )
  monkeypatch.setattr(
    random_pairs,
    "MASKVLM",
    random_pairs.MASKVLM
    | {
      name: options.pop(name)
      for name in ("match_features", "joint_projection")
      if name in options
    },
  )
  config = random_pairs.maskvlm(*names, batch_size=2, **options)
  assert count(config) == 2 * maskvlm_flops.forward(config).total


def test_a_convolution_stem_runs_once_a_version(monkeypatch):
  del monkeypatch
  config = random_pairs.config(
    **random_pairs.SMALL_DATA
    | {"system": "maskvlm", "match_features": "product"},
    objectives=random_pairs.only("mlm", "mim"),
    batch_size=2,
  )
  assert count(config) == 2 * maskvlm_flops.forward(config).total
