"""No type is promoted in silence."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from glscl_jax.models import products
from glscl_jax.systems import glscl, inputs
from tests import random_pairs

HARD = {"itm_negatives": "hard", "same_image": "ignore"}
IN_BATCH = {"itm_negatives": "in_batch", "same_image": "positive"}


@pytest.mark.parametrize(
  ("objectives", "encoders", "travels"),
  [
    (IN_BATCH, {}, "float32"),
    (HARD, {}, "float32"),
    (IN_BATCH, {"depth": 2, **random_pairs.SMALL_DATA}, "bfloat16"),
  ],
  ids=["in_batch", "hard", "as on an accelerator"],
)
def test_loss_and_gradients_run_under_strict_promotion(
  objectives, encoders, travels, key, monkeypatch
):
  config = random_pairs.config(
    objectives=objectives, compute_dtype="bfloat16", **encoders
  )
  dtype = jnp.dtype(travels)
  monkeypatch.setattr(products, "activation_dtype", lambda _: dtype)

  def loss(params, batch):
    output = glscl.loss(params, batch, config=config, key=key)
    return output.loss, output.metrics

  with jax.numpy_dtype_promotion("strict"):
    params = jax.eval_shape(lambda: glscl.init(config, key))
    gradients, metrics = jax.eval_shape(
      jax.grad(loss, has_aux=True), params, inputs.example_batch(config)
    )
  for leaf in jax.tree.leaves((gradients, metrics)):
    assert leaf.dtype == jnp.float32
