"""Multi-head attention: self, cross, causal, padded keys."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from glscl_jax.config import HEAD_WIDTH
from glscl_jax.models import layers, products

MASKED = -1e30  # float32 logit of a key that is not there


def probabilities(
  q_BHLK: jax.Array,
  k_BHMK: jax.Array,
  valid_BM: jax.Array | None,
  *,
  dtype: str,
  causal: bool = False,
) -> jax.Array:
  """softmax(q k^T / sqrt(K)) in float32; invalid keys get exactly zero.

  `causal`: so do the keys after the query's own place.
  """
  scale = q_BHLK.shape[-1] ** -0.5
  logits_BHLM = products.batched_dot(
    "BHLK,BHMK->BHLM", q_BHLK * scale, k_BHMK, dtype=dtype
  )
  if valid_BM is not None:
    logits_BHLM = jnp.where(valid_BM[:, None, None, :], logits_BHLM, MASKED)
  if causal:
    seen_LM = jnp.tril(jnp.ones(logits_BHLM.shape[2:], bool))
    logits_BHLM = jnp.where(seen_LM[None, None], logits_BHLM, MASKED)
  return jax.nn.softmax(logits_BHLM, axis=-1)


class Attention(nn.Module):
  """Attention of `x` over `context`; heads are 64 wide, all maps have biases.

  Every sample keeps at least one valid key: the first token always is.
  """

  dtype: str
  dropout: float = 0.0
  qkv_init: layers.Initializer = nn.initializers.normal(0.02)
  out_init: layers.Initializer = nn.initializers.normal(0.02)
  causal: bool = False

  @nn.compact
  def __call__(
    self,
    x_BLD: jax.Array,
    context_BMD: jax.Array,
    valid_BM: jax.Array | None = None,
    *,
    return_probabilities: bool = False,
  ) -> jax.Array:
    width = x_BLD.shape[-1]

    def heads(name: str, inputs: jax.Array) -> jax.Array:
      dense = layers.Dense(
        width, self.dtype, kernel_init=self.qkv_init, name=name
      )
      split = dense(inputs).reshape(*inputs.shape[:2], -1, HEAD_WIDTH)
      return split.transpose(0, 2, 1, 3)

    p_BHLM = probabilities(
      heads("query", x_BLD),
      heads("key", context_BMD),
      valid_BM,
      dtype=self.dtype,
      causal=self.causal,
    )
    if return_probabilities:
      return p_BHLM
    p_BHLM = layers.Dropout(self.dropout)(p_BHLM)
    mixed_BHLK = products.batched_dot(
      "BHLM,BHMK->BHLK", p_BHLM, heads("value", context_BMD), dtype=self.dtype
    )
    mixed_BLD = mixed_BHLK.transpose(0, 2, 1, 3).reshape(x_BLD.shape)
    return layers.Dense(
      width, self.dtype, kernel_init=self.out_init, name="out"
    )(mixed_BLD.astype(x_BLD.dtype))
