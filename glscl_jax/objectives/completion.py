"""Semantic completion (GLSCL 2306.07096; SCL 2211.13437): MGSC and MLTC.

The fused token of a masked input is asked to match the fused token of the
same input when it was complete. Raw fused tokens are compared: no pooler, no
projection. Targets carry no gradient. NCE is info_nce(reduce="sum"), whose
`block` says how much of the similarities a device holds at once.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from glscl_jax.objectives import contrastive


def global_completion(
  masked_BD: jax.Array,
  complete_BD: jax.Array,
  *,
  temperature: float,
  identity_BM: jax.Array | None = None,
  same_image: contrastive.SameImage = "ignore",
  group: int | None = None,
  block: int | None = None,
) -> jax.Array:
  """MGSC = NCE(masked global token, sg complete global token).

  Image side: masked = y3 (80 % of the patches dropped), complete = y5. Text
  side: masked = x5 (40 % of the words hidden), complete = x3.
  """
  return contrastive.info_nce(
    masked_BD,
    jax.lax.stop_gradient(complete_BD),
    temperature,
    identity_AM=identity_BM,
    same_image=same_image,
    group=group,
    block=block,
  )


def local_completion(
  masked_BJD: jax.Array,
  complete_BJD: jax.Array,
  ok_BJ: jax.Array | None = None,
  *,
  temperature: float,
  group: int,
  identity_BM: jax.Array | None = None,
  same_image: contrastive.SameImage = "ignore",
  block: int | None = None,
) -> jax.Array:
  """MLTC = NCE(tokens at masked positions, sg the same tokens complete).

  Masked positions of the `group` consecutive samples are flattened: other
  positions of the same sample are negatives. 0 when nothing is masked.
  same_image "positive" means "ignore" here: another sample that shows the same
  hides other words or patches, so its tokens are no targets of these.
  """
  if same_image == "positive":
    same_image = "ignore"
  batch, items, width = masked_BJD.shape
  samples_B = jnp.arange(batch, dtype=jnp.int32)
  identity_BM = samples_B[:, None] if identity_BM is None else identity_BM
  return contrastive.info_nce(
    masked_BJD.reshape(-1, width),
    jax.lax.stop_gradient(complete_BJD).reshape(-1, width),
    temperature,
    valid_A=None if ok_BJ is None else ok_BJ.reshape(-1),
    identity_AM=jnp.repeat(identity_BM, items, axis=0),
    sample_A=jnp.repeat(samples_B, items),
    same_image=same_image,
    group=group * items,
    block=block,
  )
