"""Multi-head attention: self, cross, causal, padded keys, keys kept."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from glscl_jax.config import HEAD_WIDTH
from glscl_jax.models import fused_attention, layers, products

MASKED = -1e30  # float32 logit of a key that is not there


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Keys:
  """Keys and values of a context, made once; a stack has one a layer first."""

  k_BHMK: jax.Array
  v_BHMK: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Past:
  """Keys of the first `count` tokens of a text that grows, and room for more.

  A stack has one a layer, on a leading axis.
  """

  keys: Keys
  count: jax.Array  # int32

  def append(self, new: Keys) -> Past:
    """With the tokens that follow; there must be room for them."""

    def put(old_BHMK: jax.Array, new_BHLK: jax.Array) -> jax.Array:
      return jax.lax.dynamic_update_slice_in_dim(
        old_BHMK, new_BHLK.astype(old_BHMK.dtype), self.count, axis=2
      )

    keys = jax.tree.map(put, self.keys, new)
    return Past(keys, self.count + new.k_BHMK.shape[2])

  def take(self, rows_A: jax.Array) -> Past:
    """Of some texts, in any order and as often as they are named."""

    def pick(leaf: jax.Array) -> jax.Array:
      return jnp.take(leaf, rows_A, axis=-4)  # layers may stand before

    return Past(jax.tree.map(pick, self.keys), self.count)


def start(
  batch: int, length: int, width: int, dtype: str, depth: int | None = None
) -> Past:
  """No token yet, room for `length`; `depth`: of a stack."""
  layer = () if depth is None else (depth,)
  shape = (*layer, batch, width // HEAD_WIDTH, length, HEAD_WIDTH)
  empty = jnp.zeros(shape, products.activation_dtype(dtype))
  return Past(Keys(empty, empty), jnp.zeros(layer, jnp.int32))


def probabilities(
  q_BHLK: jax.Array,
  k_BHMK: jax.Array,
  valid_BM: jax.Array | None,
  *,
  dtype: str,
  causal: bool = False,
  first: jax.Array | None = None,
) -> jax.Array:
  """softmax(q k^T / sqrt(K)) in float32; invalid keys get exactly zero.

  `causal`: so do the keys after the query's own place, which for the first
  query is `first`, 0 if None.
  """
  scale = q_BHLK.shape[-1] ** -0.5
  logits_BHLM = products.batched_dot(
    "BHLK,BHMK->BHLM", q_BHLK * scale, k_BHMK, dtype=dtype
  )
  if valid_BM is not None:
    logits_BHLM = jnp.where(valid_BM[:, None, None, :], logits_BHLM, MASKED)
  if causal:
    length, num_keys = logits_BHLM.shape[2:]
    place_L1 = (0 if first is None else first) + jnp.arange(length)[:, None]
    seen_LM = jnp.arange(num_keys)[None] <= place_L1
    logits_BHLM = jnp.where(seen_LM[None, None], logits_BHLM, MASKED)
  return jax.nn.softmax(logits_BHLM, axis=-1)


class Attention(nn.Module):
  """Attention of `x` over `context`; heads are 64 wide, all maps have biases.

  Every sample keeps at least one valid key: the first token always is. A
  context that is asked often may come as its `keys`.
  """

  dtype: str
  dropout: float = 0.0
  qkv_init: layers.Initializer = nn.initializers.normal(0.02)
  out_init: layers.Initializer = nn.initializers.normal(0.02)
  causal: bool = False
  fused: bool = False  # in one kernel, where the platform has one that fits;
  # no probabilities are dropped then, on any platform

  @nn.compact
  def __call__(
    self,
    x_BLD: jax.Array | None,
    context: jax.Array | Keys,
    valid_BM: jax.Array | None = None,
    *,
    first: jax.Array | None = None,
    return_probabilities: bool = False,
  ) -> jax.Array | Keys:
    def heads(name: str, inputs: jax.Array) -> jax.Array:
      dense = layers.Dense(
        inputs.shape[-1], self.dtype, kernel_init=self.qkv_init, name=name
      )
      split = dense(inputs).reshape(*inputs.shape[:2], -1, HEAD_WIDTH)
      return split.transpose(0, 2, 1, 3)

    keys = context
    if not isinstance(context, Keys):
      keys = Keys(heads("key", context), heads("value", context))
    if x_BLD is None:
      return keys
    q_BHLK = heads("query", x_BLD)
    how = {"dtype": self.dtype, "causal": self.causal}
    mixed_BHLK = None
    # Stacks create their layers by a vmap, which kernels do not all follow.
    asked = self.fused and not self.is_initializing()
    if asked and first is None and not return_probabilities:
      mixed_BHLK = fused_attention.attend(
        q_BHLK, keys.k_BHMK, keys.v_BHMK, valid_BM, **how
      )
    if mixed_BHLK is None:
      p_BHLM = probabilities(q_BHLK, keys.k_BHMK, valid_BM, first=first, **how)
      if return_probabilities:
        return p_BHLM
      if not self.fused:
        p_BHLM = layers.Dropout(self.dropout)(p_BHLM)
      mixed_BHLK = products.batched_dot(
        "BHLM,BHMK->BHLK", p_BHLM, keys.v_BHMK, dtype=self.dtype
      )
    mixed_BLD = mixed_BHLK.transpose(0, 2, 1, 3).reshape(x_BLD.shape)
    return layers.Dense(
      x_BLD.shape[-1], self.dtype, kernel_init=self.out_init, name="out"
    )(mixed_BLD.astype(x_BLD.dtype))

  def keys(self, context_BMD: jax.Array) -> Keys:
    """Keys and values of a context that is asked often."""
    return self(None, context_BMD)

  def extend(self, x_BLD: jax.Array, past: Past) -> tuple[jax.Array, Past]:
    """Causal self-attention of tokens that follow those of `past`."""
    longer = past.append(self.keys(x_BLD))
    return self(x_BLD, longer.keys, first=past.count), longer
