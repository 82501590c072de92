"""No type is promoted in silence."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from glscl_jax import config as config_lib
from glscl_jax.models import products
from glscl_jax.systems import cmal, inputs
from tests import random_regions


@pytest.mark.parametrize(
  ("task_mix", "travels"),
  [("sum", "bfloat16"), ("sum", "float32"), ("sample", "bfloat16")],
)
def test_loss_and_gradients_run_under_strict_promotion(
  task_mix, travels, key, monkeypatch
):
  config = random_regions.config(
    *config_lib.SYSTEM_OBJECTIVES["cmal"],
    compute_dtype="bfloat16",
    unimodal_layers=(1, 0),
    masking={"swap_rescale": True},
    objectives={"task_mix": task_mix, "amc_pair": 1.0},
  )
  dtype = jnp.dtype(travels)
  monkeypatch.setattr(products, "activation_dtype", lambda _: dtype)

  def loss(params, batch):
    output = cmal.loss(params, batch, config=config, key=key)
    return output.loss, output.metrics

  with jax.numpy_dtype_promotion("strict"):
    params = jax.eval_shape(lambda: cmal.init(config, key))
    gradients, metrics = jax.eval_shape(
      jax.grad(loss, has_aux=True), params, inputs.example_batch(config)
    )
  for leaf in jax.tree.leaves((gradients, metrics)):
    assert leaf.dtype == jnp.float32
