"""No type is promoted in silence."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from glscl_jax.systems import glscl
from tests import random_pairs


@pytest.mark.parametrize(
  "objectives",
  [
    {"itm_negatives": "in_batch", "same_image": "positive"},
    {"itm_negatives": "hard", "same_image": "ignore"},
  ],
  ids=lambda objectives: objectives["itm_negatives"],
)
def test_loss_and_gradients_run_under_strict_promotion(objectives, key):
  config = random_pairs.config(objectives=objectives, compute_dtype="bfloat16")

  def loss(params, batch):
    output = glscl.loss(params, batch, config=config, key=key)
    return output.loss, output.metrics

  params = jax.eval_shape(lambda: glscl.init(config, key))
  with jax.numpy_dtype_promotion("strict"):
    gradients, metrics = jax.eval_shape(
      jax.grad(loss, has_aux=True), params, glscl.example_batch(config)
    )
  for leaf in jax.tree.leaves((gradients, metrics)):
    assert leaf.dtype == jnp.float32
