"""No type is promoted in silence."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from glscl_jax.models import products
from glscl_jax.systems import inputs, maskvlm
from tests import random_pairs


@pytest.mark.parametrize("negatives", ["in_batch", "hard"])
@pytest.mark.parametrize("travels", ["float32", "bfloat16"])
def test_loss_and_gradients_run_under_strict_promotion(
  negatives, travels, key, monkeypatch
):
  config = random_pairs.maskvlm(
    depth=2,
    compute_dtype="bfloat16",
    objectives={
      "itm_negatives": negatives,
      "mim_loss": "l2",
      "mim_patch_norm": True,
    },
  )
  dtype = jnp.dtype(travels)
  monkeypatch.setattr(products, "activation_dtype", lambda _: dtype)

  def loss(params, batch):
    output = maskvlm.loss(params, batch, config=config, key=key)
    return output.loss, output.metrics

  with jax.numpy_dtype_promotion("strict"):
    params = jax.eval_shape(lambda: maskvlm.init(config, key))
    gradients, metrics = jax.eval_shape(
      jax.grad(loss, has_aux=True), params, inputs.example_batch(config)
    )
  for leaf in jax.tree.leaves((gradients, metrics)):
    assert leaf.dtype == jnp.float32
