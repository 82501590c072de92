"""No type is promoted in silence."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from glscl_jax.models import products
from glscl_jax.systems import inputs, sycoca
from tests import random_pairs


@pytest.mark.parametrize(
  ("level", "travels"), [("input", "bfloat16"), ("feature", "float32")]
)
def test_loss_and_gradients_run_under_strict_promotion(
  level, travels, key, monkeypatch
):
  config = random_pairs.sycoca(
    depth=2,
    compute_dtype="bfloat16",
    masking={"mim_mask_level": level, "mask_warmup_steps": 3},
  )
  dtype = jnp.dtype(travels)
  monkeypatch.setattr(products, "activation_dtype", lambda _: dtype)

  def loss(params, batch, step):
    output = sycoca.loss(params, batch, config=config, key=key, step=step)
    return output.loss, output.metrics

  with jax.numpy_dtype_promotion("strict"):
    params = jax.eval_shape(lambda: sycoca.init(config, key))
    gradients, metrics = jax.eval_shape(
      jax.grad(loss, has_aux=True),
      params,
      inputs.example_batch(config),
      jax.ShapeDtypeStruct((), jnp.int32),
    )
  for leaf in jax.tree.leaves((gradients, metrics)):
    assert leaf.dtype == jnp.float32
