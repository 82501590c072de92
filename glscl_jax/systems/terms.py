"""The terms of a loss that several systems share, and their weighted sum.

A term is a scalar and further scalars to log.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from glscl_jax.config import ObjectiveConfig
from glscl_jax.objectives import contrastive, masked_lm, matching
from glscl_jax.types import Batch, LossOutput

Term = tuple[jax.Array, dict[str, jax.Array]]


def mlm(logits_BJV: jax.Array, batch: Batch) -> Term:
  """Masked language modelling, from the logits at the masked positions."""
  labels = batch.mlm_labels_BJ, batch.mlm_ok_BJ
  loss = masked_lm.masked_cross_entropy(logits_BJV, *labels)
  return loss, {"mlm_accuracy": masked_lm.accuracy(logits_BJV, *labels)}


def itm(
  logits_A2: jax.Array, labels_A: jax.Array, ok_A: jax.Array | None
) -> Term:
  """Image-text matching of any number of pairs; `ok_A` says which count."""
  loss = matching.match_cross_entropy(logits_A2, labels_A, ok_A)
  accuracy = matching.accuracy(logits_A2, labels_A, ok_A)
  return loss, {"itm_accuracy": accuracy}


def itc(
  text_BE: jax.Array,
  image_BE: jax.Array,
  temperature: jax.Array,
  batch: Batch,
  config: ObjectiveConfig,
) -> Term:
  """Image-text contrast of joint vectors that are not yet normalised."""
  text_BE, image_BE = (
    contrastive.scale_gradient(v_BE, config.contrast_grad_scale)
    for v_BE in (text_BE, image_BE)
  )
  loss = contrastive.image_text_contrast(
    image_BE,
    text_BE,
    temperature,
    identity_BM=batch.identity_BM,
    same_image=config.same_image,
    block=config.contrast_block,
  )
  return loss, {
    "itc_accuracy": contrastive.accuracy(
      image_BE, text_BE, batch.identity_BM, block=config.contrast_block
    ),
    "itc_temperature": temperature,
  }


def weighted_sum(
  config: ObjectiveConfig, make_term: Callable[[str], Term]
) -> LossOutput:
  """The loss of a step: each active objective by its weight."""
  total, metrics = jnp.zeros(()), {}
  for name in config.active:
    value, extra = make_term(name)
    total += getattr(config, name) * value
    metrics |= {name: value, **extra}
  return LossOutput(loss=total, metrics={"loss": total, **metrics})
