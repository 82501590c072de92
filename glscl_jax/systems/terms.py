"""The terms of a loss, what they are means over, and their weighted sum.

A step is cut where samples meet. What a sample, or a group of samples, says by
itself are `Parts.local`; what is contrasted with the whole batch are
`Parts.features`, from which a system's `contrast` makes the other terms. Local
terms of micro-batches are merged by their counts, features are joined
(`train/accumulate.py`); a whole batch has one part of each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from glscl_jax.config import Config, ObjectiveConfig
from glscl_jax.objectives import contrastive, masked_lm, matching
from glscl_jax.types import Batch, LossOutput, Params


class Mean(NamedTuple):
  """A mean over `count` items; 0 where there are none."""

  value: jax.Array
  count: jax.Array | float


class Term(NamedTuple):
  """What an objective adds to the loss, and scalars to log."""

  summands: tuple[Mean, ...]  # means over different items
  metrics: dict[str, Mean]

  @property
  def value(self) -> jax.Array:
    """The objective."""
    return sum(mean.value for mean in self.summands)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Parts:
  """A batch, or a micro-batch, before its samples meet all others."""

  local: dict[str, Term]  # by objective
  features: dict[str, Any]  # by objective; arrays with a leading batch axis
  extra: dict[str, Mean] = dataclasses.field(default_factory=dict)  # to log,
  # of no objective


def whole(value: jax.Array) -> Mean:
  """What is known of the batch as a whole."""
  return Mean(value, 1.0)


def count(ok: jax.Array) -> jax.Array:
  """How many slots count."""
  return jnp.sum(ok, dtype=jnp.float32)


def mlm(logits_BJV: jax.Array, batch: Batch) -> Term:
  """Masked language modelling, from the logits at the masked positions."""
  labels = batch.mlm_labels_BJ, batch.mlm_ok_BJ
  loss = masked_lm.masked_cross_entropy(logits_BJV, *labels)
  accuracy = masked_lm.accuracy(logits_BJV, *labels)
  number = count(batch.mlm_ok_BJ)
  return Term((Mean(loss, number),), {"mlm_accuracy": Mean(accuracy, number)})


def itm(
  logits_A2: jax.Array, labels_A: jax.Array, ok_A: jax.Array | None
) -> Term:
  """Image-text matching of any number of pairs; `ok_A` says which count."""
  loss = matching.match_cross_entropy(logits_A2, labels_A, ok_A)
  accuracy = matching.accuracy(logits_A2, labels_A, ok_A)
  number = float(len(labels_A)) if ok_A is None else count(ok_A)
  return Term((Mean(loss, number),), {"itm_accuracy": Mean(accuracy, number)})


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
  accuracy = contrastive.accuracy(
    image_BE, text_BE, batch.identity_BM, block=config.contrast_block
  )
  return Term(
    (whole(loss),),
    {
      "itc_accuracy": whole(accuracy),
      "itc_temperature": whole(temperature),
    },
  )


Joint = tuple[jax.Array, jax.Array]  # vectors of ITC: text, image


def joint_contrast(
  model: Any, features: Mapping[str, Joint], batch: Batch, config: Config
) -> dict[str, Term]:
  """Of a system that contrasts nothing but the vectors of ITC, if these."""
  return {
    name: itc(*joint, model.temperature(), batch, config.objectives)
    for name, joint in features.items()
  }


def weights(config: Config, key: jax.Array) -> dict[str, float]:
  """Of the active objectives."""
  del key
  objectives = config.objectives
  return {name: getattr(objectives, name) for name in objectives.active}


def weighted_sum(
  terms: Mapping[str, Term],
  weights: Mapping[str, jax.Array | float],
  extra: Mapping[str, Mean],
) -> LossOutput:
  """The loss of a step: each objective by its weight.

  One of weight 0 may be NaN: it was not computed.
  """
  total, metrics = jnp.zeros(()), {}
  for name, weight in weights.items():
    value = terms[name].value
    total += jnp.where(weight > 0, weight * value, 0.0)
    metrics |= {name: value, **_values(terms[name].metrics)}
  metrics |= _values(extra)
  return LossOutput(loss=total, metrics={"loss": total, **metrics})


def _values(means: Mapping[str, Mean]) -> dict[str, jax.Array]:
  return {name: mean.value for name, mean in means.items()}


def no_contrast(
  params: Params,
  features: Mapping[str, Any],
  batch: Batch,
  *,
  config: Config,
) -> dict[str, Term]:
  """Of a system whose samples never meet the whole batch."""
  del params, features, batch, config
  return {}


def make_loss(
  parts: Callable[..., Parts],
  contrast: Callable[..., dict[str, Term]] = no_contrast,
  weights: Callable[..., Mapping[str, jax.Array | float]] = weights,
) -> Callable[..., LossOutput]:
  """The loss of a whole batch, `loss(params, batch, config=, key=, step=)`.

  Args:
    parts: as `System.parts`.
    contrast: as `System.contrast`.
    weights: as `System.weights`.
  """

  def loss(
    params: Params,
    batch: Batch,
    *,
    config: Config,
    key: jax.Array,
    step: jax.Array | int | None = None,
  ) -> LossOutput:
    """The weighted sum of the active objectives on one global batch.

    Args:
      params: as made by `init`.
      batch: with the masks that the active objectives need.
      config: the run's; `train.seed` is not read here.
      key: all that is drawn in this step.
      step: of training, for what changes with it; None: after all changes.
    """
    found = parts(params, batch, config=config, key=key, step=step)
    wide = contrast(params, found.features, batch, config=config)
    return weighted_sum(found.local | wide, weights(config, key), found.extra)

  return loss
