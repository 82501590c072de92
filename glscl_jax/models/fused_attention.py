"""Attention in one kernel, whose probabilities never reach main memory.

cuDNN's on GPU, Pallas splash on TPU. Both give softmax(q k^T / sqrt(K)) v of
`attention.probabilities`, as close as products in `dtype` allow.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from glscl_jax import errors, types
from glscl_jax.models import products

CUDNN_STEP = 8  # cudnn: lengths are multiples of it
LANES = 128  # splash: lengths are multiples of it
LARGEST_BLOCK = 1024  # splash: tokens that fit a TPU core's fast memory
MOST_PADDING = 2.0  # splash: times the work that padding may make of it

# (queries, keys, values, valid keys or None) -> mixed values
Kernel = Callable[
  [jax.Array, jax.Array, jax.Array, jax.Array | None], jax.Array
]


def attend(
  q_BHLK: jax.Array,
  k_BHMK: jax.Array,
  v_BHMK: jax.Array,
  valid_BM: jax.Array | None,
  *,
  dtype: str,
  causal: bool = False,
) -> jax.Array | None:
  """Mixed values (B, H, L, K) in `dtype`, or None: no kernel fits.

  None on CPU; with cuDNN in float32; with splash where lengths are far from
  multiples of 128; where the devices of a mesh do not divide the samples; and
  without a mesh in jax's context, as in evaluation: XLA cannot cut a kernel,
  and nobody says over which devices the samples are spread. Every sample has a
  valid key.
  """
  if jax.sharding.get_abstract_mesh().empty:
    return None
  platform = products.platform()
  kernel: Kernel
  if platform == "tpu":
    if _padding(q_BHLK.shape[2], k_BHMK.shape[2]) > MOST_PADDING:
      return None
    kernel = functools.partial(splash, causal=causal)
  elif platform in ("gpu", "cuda") and dtype == "bfloat16":
    kernel = functools.partial(cudnn, causal=causal)
  else:
    return None
  operands = (x.astype(dtype) for x in (q_BHLK, k_BHMK, v_BHMK))
  return on_each_device(kernel, *operands, valid_BM)


def on_each_device(
  kernel: Kernel,
  q_BHLK: jax.Array,
  k_BHMK: jax.Array,
  v_BHMK: jax.Array,
  valid_BM: jax.Array | None,
) -> jax.Array | None:
  """Runs `kernel` on each device's samples and heads: XLA cannot cut it.

  The mesh is that of jax's context. None: it does not divide the samples.
  """
  mesh = jax.sharding.get_abstract_mesh()
  axes, num_devices = types.sample_axes()
  batch, heads = q_BHLK.shape[:2]
  if batch % num_devices:
    return None
  num_parts = mesh.shape.get("tensor", 1)
  if num_devices * num_parts == 1:
    return kernel(q_BHLK, k_BHMK, v_BHMK, valid_BM)
  apart = P(axes, "tensor" if heads % num_parts == 0 else None)
  return jax.shard_map(
    kernel,
    mesh=mesh,
    in_specs=(apart, apart, apart, None if valid_BM is None else P(axes)),
    out_specs=apart,
    check_vma=False,  # a kernel does not say which axes its result varies over
  )(q_BHLK, k_BHMK, v_BHMK, valid_BM)


def cudnn(
  q_BHLK: jax.Array,
  k_BHMK: jax.Array,
  v_BHMK: jax.Array,
  valid_BM: jax.Array | None,
  *,
  causal: bool,
) -> jax.Array:
  """Flash attention of cuDNN.

  Lengths are filled up, since it has no gradient at odd ones. It takes masks of
  all queries and keys, or the number of keys of each sample.

  Raises:
    UserError: cuDNN is not there, or too old.
  """
  batch, _, length, _ = q_BHLK.shape
  num_keys = k_BHMK.shape[2]
  q_BHLK, k_BHMK, v_BHMK = (
    _fill(x, CUDNN_STEP, axis=2) for x in (q_BHLK, k_BHMK, v_BHMK)
  )
  mask_B1LM = counts_B = None
  if valid_BM is not None:
    valid_BM = _fill(valid_BM, CUDNN_STEP, axis=1)
    mask_B1LM = jnp.broadcast_to(
      valid_BM[:, None, None], (batch, 1, q_BHLK.shape[2], k_BHMK.shape[2])
    )
  elif num_keys < k_BHMK.shape[2]:
    counts_B = jnp.full(batch, num_keys, jnp.int32)
  q, k, v = (x.transpose(0, 2, 1, 3) for x in (q_BHLK, k_BHMK, v_BHMK))
  try:
    mixed = jax.nn.dot_product_attention(
      q,
      k,
      v,
      mask=mask_B1LM,
      key_value_seq_lengths=counts_B,
      is_causal=causal,
      implementation="cudnn",
    )
  except RuntimeError as error:  # there is none, or an old one
    raise errors.UserError(
      f"config.model.fused_attention: {error} The extra [gpu] brings cuDNN; "
      "without it set --config.model.fused_attention=False"
    ) from error
  return mixed.transpose(0, 2, 1, 3)[:, :, :length]


def splash(
  q_BHLK: jax.Array,
  k_BHMK: jax.Array,
  v_BHMK: jax.Array,
  valid_BM: jax.Array | None,
  *,
  causal: bool,
  interpret: bool = False,
) -> jax.Array:
  """Splash attention of one device; `interpret` runs it on any platform.

  Lengths are filled up to whole blocks. Queries and valid keys are of segment
  1, the rest of segment 0, which no query that is kept belongs to.
  """
  # Imported here: it is experimental, and only TPUs need it.
  from jax.experimental.pallas.ops.tpu import splash_attention as kernels

  batch, heads, length, width = q_BHLK.shape
  num_keys = k_BHMK.shape[2]
  q_block, k_block = _block(length), _block(num_keys)
  if valid_BM is None:
    valid_BM = jnp.ones((batch, num_keys), bool)

  # Splash does not scale.
  q = _fill(q_BHLK * q_BHLK.dtype.type(width**-0.5), q_block, axis=2)
  k, v = (_fill(x, k_block, axis=2) for x in (k_BHMK, v_BHMK))
  segments = kernels.SegmentIds(
    q=jnp.ones((batch, q.shape[2]), jnp.int32),
    kv=_fill(valid_BM.astype(jnp.int32), k_block, axis=1),
  )
  make_mask = kernels.CausalMask if causal else kernels.FullMask
  size = q.shape[2], k.shape[2]
  one_sample = kernels.make_splash_mha_single_device(
    kernels.MultiHeadMask([make_mask(size) for _ in range(heads)]),
    block_sizes=kernels.BlockSizes(
      block_q=q_block,
      block_kv=k_block,
      block_q_dkv=q_block,
      block_kv_dkv=k_block,
      block_q_dq=q_block,
      block_kv_dq=k_block,
    ),
    interpret=interpret,
  )
  return jax.vmap(one_sample)(q, k, v, segments)[:, :, :length]


def _fill(x: jax.Array, step: int, *, axis: int) -> jax.Array:
  """Zeros behind, up to a length that is a multiple of `step`."""
  ends = [(0, 0)] * x.ndim
  ends[axis] = (0, -x.shape[axis] % step)
  return jnp.pad(x, ends)


def _block(length: int) -> int:
  """Tokens of a block: all of them, or equal parts that fit."""
  lanes = math.ceil(length / LANES)
  parts = math.ceil(lanes * LANES / LARGEST_BLOCK)
  return math.ceil(lanes / parts) * LANES


def _padding(length: int, num_keys: int) -> float:
  """How many times as many pairs splash computes."""
  filled = [
    math.ceil(n / _block(n)) * _block(n) / n for n in (length, num_keys)
  ]
  return math.prod(filled)
