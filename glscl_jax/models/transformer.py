"""Transformer blocks and stacks of equal blocks.

A stack keeps the parameters of its blocks stacked on a leading layer axis, so
scanned and unrolled runs share one checkpoint format.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from glscl_jax.config import ModelConfig
from glscl_jax.models import attention, layers, products


def example_token(width: int, dtype: str) -> jax.Array:
  """The smallest state, of the type that travels between products."""
  return jnp.zeros((1, 1, width), products.activation_dtype(dtype))


def coca_initializers(width: int, depth: int) -> dict[str, layers.Initializer]:
  """CLIP's normals, as open_clip's CoCa has them, for `depth` blocks.

  The last matrix of each residual branch is smaller the deeper the stack.
  """
  normal = nn.initializers.normal
  return {
    "qkv_init": normal(width**-0.5),
    "kernel_init": normal((2 * width) ** -0.5),
    "out_init": normal((width * 2 * max(depth, 1)) ** -0.5),
  }


class PreBlock(nn.Module):
  """`pre`: x += MHA(LN x); x += W2 act(W1 LN x)  (all ViTs, CoCa's text).

  With a `past`, which a causal block has, `x` are the tokens that follow, and
  the longer past is returned beside them.
  """

  width: int
  dtype: str
  eps: float
  activation: str
  zero_residual: bool = False
  qkv_init: layers.Initializer | None = None  # None: CLIP's, by the width
  kernel_init: layers.Initializer = nn.initializers.xavier_uniform()
  out_init: layers.Initializer | None = None  # of the last matrix of each
  # branch; None: as the others
  causal: bool = False
  fused: bool = False  # attention

  @nn.compact
  def __call__(
    self,
    x_BLD: jax.Array,
    valid_BL: jax.Array | None = None,
    *,
    past: attention.Past | None = None,
  ) -> jax.Array | tuple[jax.Array, attention.Past]:
    kernel_init = self.kernel_init
    out_init = self.out_init or kernel_init
    last_init = nn.initializers.zeros if self.zero_residual else out_init
    qkv_init = self.qkv_init or nn.initializers.normal(self.width**-0.5)
    h_BLD = layers.LayerNorm(self.eps, name="norm1")(x_BLD)
    attend = attention.Attention(
      self.dtype,
      qkv_init=qkv_init,
      out_init=last_init,
      causal=self.causal,
      fused=self.fused,
      name="attention",
    )
    if past is None:
      x_BLD += attend(h_BLD, h_BLD, valid_BL)
    else:
      mixed_BLD, past = attend.extend(h_BLD, past)
      x_BLD += mixed_BLD
    h_BLD = layers.LayerNorm(self.eps, name="norm2")(x_BLD)
    x_BLD += layers.Mlp(
      self.dtype,
      self.activation,
      kernel_init=kernel_init,
      out_init=last_init,
      name="mlp",
    )(h_BLD)
    return x_BLD if past is None else (x_BLD, past)

  def example(self) -> tuple[Any, ...]:
    """Smallest inputs, to create parameters."""
    return (example_token(self.width, self.dtype),)


class PostBlock(nn.Module):
  """`post`: x = LN(x + MHA(x)); x = LN(x + MLP(x))  (BERT)."""

  width: int
  dtype: str
  eps: float
  dropout: float
  init_std: float
  zero_residual: bool = False
  fused: bool = False  # attention

  @nn.compact
  def __call__(self, x_BLD: jax.Array, valid_BL: jax.Array) -> jax.Array:
    normal = nn.initializers.normal(self.init_std)
    last_init = nn.initializers.zeros if self.zero_residual else normal
    drop = layers.Dropout(self.dropout)
    h_BLD = attention.Attention(
      self.dtype,
      self.dropout,
      normal,
      last_init,
      fused=self.fused,
      name="attention",
    )(x_BLD, x_BLD, valid_BL)
    x_BLD = layers.LayerNorm(self.eps, name="norm1")(x_BLD + drop(h_BLD))
    h_BLD = layers.Mlp(
      self.dtype, kernel_init=normal, out_init=last_init, name="mlp"
    )(x_BLD)
    return layers.LayerNorm(self.eps, name="norm2")(x_BLD + drop(h_BLD))

  def example(self) -> tuple[Any, ...]:
    """Smallest inputs, to create parameters."""
    return example_token(self.width, self.dtype), jnp.ones((1, 1), bool)


class PostCrossBlock(nn.Module):
  """`post_cross`: self-attention, cross-attention, MLP, each LN(x + f(x)).

  With `rows_BQ` only those rows of `x` are computed, as queries against all
  of `x`: exact, because everything after the first attention is row-wise.
  """

  width: int
  dtype: str
  eps: float
  dropout: float
  init_std: float
  fused: bool = False  # attention

  def setup(self):
    normal = nn.initializers.normal(self.init_std)
    attend = functools.partial(
      attention.Attention,
      self.dtype,
      self.dropout,
      normal,
      normal,
      fused=self.fused,
    )
    self.self_attention, self.cross_attention = attend(), attend()
    self.mlp = layers.Mlp(self.dtype, kernel_init=normal)
    self.norm1 = layers.LayerNorm(self.eps)
    self.norm2 = layers.LayerNorm(self.eps)
    self.norm3 = layers.LayerNorm(self.eps)
    self.drop = layers.Dropout(self.dropout)

  def __call__(
    self,
    x_BLD: jax.Array,
    context_BMD: jax.Array,
    valid_BL: jax.Array | None,
    context_valid_BM: jax.Array | None,
    rows_BQ: jax.Array | None = None,
  ) -> jax.Array:
    h_BQD = self._after_self_attention(x_BLD, valid_BL, rows_BQ)
    mixed_BQD = self.cross_attention(h_BQD, context_BMD, context_valid_BM)
    h_BQD = self.norm2(h_BQD + self.drop(mixed_BQD))
    return self.norm3(h_BQD + self.drop(self.mlp(h_BQD)))

  def cross_probabilities(
    self,
    x_BLD: jax.Array,
    context_BMD: jax.Array,
    valid_BL: jax.Array | None,
    context_valid_BM: jax.Array | None,
  ) -> jax.Array:
    """Softmax of the cross-attention, (B, H, L, M)."""
    h_BLD = self._after_self_attention(x_BLD, valid_BL, None)
    return self.cross_attention(
      h_BLD, context_BMD, context_valid_BM, return_probabilities=True
    )

  def example(self) -> tuple[Any, ...]:
    """Smallest inputs, to create parameters."""
    token_11D = example_token(self.width, self.dtype)
    return token_11D, token_11D, None, None

  def _after_self_attention(self, x_BLD, valid_BL, rows_BQ):
    q_BQD = x_BLD if rows_BQ is None else layers.take_rows(x_BLD, rows_BQ)
    mixed_BQD = self.self_attention(q_BQD, x_BLD, valid_BL)
    return self.norm1(q_BQD + self.drop(mixed_BQD))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CocaPast:
  """What a `CocaBlock` keeps of a text that grows."""

  text: attention.Past
  context: attention.Keys | None  # None: no token yet

  def take(self, rows_A: jax.Array) -> CocaPast:
    """Of some texts; those of a context lie side by side and stay by it."""
    return CocaPast(self.text.take(rows_A), self.context)

  def replace(self, longer: CocaPast) -> CocaPast:
    """`longer`, what a block returned, with the context's keys if it has none.

    A block does not return those that it was given: a scan would copy them.
    """
    return CocaPast(longer.text, longer.context or self.context)


class CocaBlock(nn.Module):
  """`coca`: self-attention, MLP, cross-attention, MLP, each x += f(LN x).

  Self-attention is causal; the context has a norm of its own. The caption
  decoder of CoCa (2205.01917), as open_clip builds it.

  With a `past`, `x` are the tokens that follow, and the longer past is returned
  beside them; the context is read once, with the first ones. Later there may be
  several texts of each context, side by side.
  """

  width: int
  dtype: str
  eps: float
  qkv_init: layers.Initializer
  kernel_init: layers.Initializer
  out_init: layers.Initializer
  fused: bool = False  # attention

  def setup(self):
    maps = {
      "qkv_init": self.qkv_init,
      "out_init": self.out_init,
      "fused": self.fused,
    }
    self.self_attention = attention.Attention(self.dtype, causal=True, **maps)
    self.cross_attention = attention.Attention(self.dtype, **maps)
    self.mlp, self.cross_mlp = (
      layers.Mlp(
        self.dtype, kernel_init=self.kernel_init, out_init=self.out_init
      )
      for _ in range(2)
    )
    self.self_norm = layers.LayerNorm(self.eps)
    self.mlp_norm = layers.LayerNorm(self.eps)
    self.query_norm = layers.LayerNorm(self.eps)
    self.context_norm = layers.LayerNorm(self.eps)
    self.cross_mlp_norm = layers.LayerNorm(self.eps)

  def __call__(
    self,
    x_BLD: jax.Array,
    context_BMD: jax.Array,
    valid_BL: jax.Array | None,
    context_valid_BM: jax.Array | None,
    *,
    past: CocaPast | None = None,
  ) -> jax.Array | tuple[jax.Array, CocaPast]:
    if past is not None:
      return self._extend(x_BLD, context_BMD, past)
    x_BLD = self._read_text(x_BLD, valid_BL)
    x_BLD += self.cross_attention(
      self.query_norm(x_BLD), self.context_norm(context_BMD), context_valid_BM
    )
    return x_BLD + self.cross_mlp(self.cross_mlp_norm(x_BLD))

  def cross_probabilities(
    self,
    x_BLD: jax.Array,
    context_BMD: jax.Array,
    valid_BL: jax.Array | None,
    context_valid_BM: jax.Array | None,
  ) -> jax.Array:
    """Softmax of the cross-attention, (B, H, L, M)."""
    return self.cross_attention(
      self.query_norm(self._read_text(x_BLD, valid_BL)),
      self.context_norm(context_BMD),
      context_valid_BM,
      return_probabilities=True,
    )

  def example(self) -> tuple[Any, ...]:
    """Smallest inputs, to create parameters."""
    token_11D = example_token(self.width, self.dtype)
    return token_11D, token_11D, None, None

  def _read_text(self, x_BLD, valid_BL):
    h_BLD = self.self_norm(x_BLD)
    x_BLD += self.self_attention(h_BLD, h_BLD, valid_BL)
    return x_BLD + self.mlp(self.mlp_norm(x_BLD))

  def _extend(self, x_ALD, context_BMD, past):
    mixed_ALD, text = self.self_attention.extend(
      self.self_norm(x_ALD), past.text
    )
    x_ALD += mixed_ALD
    x_ALD += self.mlp(self.mlp_norm(x_ALD))
    made = None
    if past.context is None:
      made = self.cross_attention.keys(self.context_norm(context_BMD))
    keys = made or past.context
    # The texts of one context ask it together: its keys are not repeated.
    asked = keys.k_BHMK.shape[0], -1, x_ALD.shape[2]
    mixed = self.cross_attention(self.query_norm(x_ALD).reshape(asked), keys)
    x_ALD += mixed.reshape(x_ALD.shape)
    x_ALD += self.cross_mlp(self.cross_mlp_norm(x_ALD))
    return x_ALD, CocaPast(text, made)


class PreCrossBlock(nn.Module):
  """`pre_cross`: self-attention, cross-attention, MLP, each x += f(LN x).

  The context has a norm of its own. With `cross` off there is no
  cross-attention and no context. `rows_BQ` as in `PostCrossBlock`.
  """

  width: int
  dtype: str
  eps: float
  qkv_init: layers.Initializer
  kernel_init: layers.Initializer
  out_init: layers.Initializer
  cross: bool = True
  fused: bool = False  # attention

  def setup(self):
    maps = {
      "qkv_init": self.qkv_init,
      "out_init": self.out_init,
      "fused": self.fused,
    }
    self.self_attention = attention.Attention(self.dtype, **maps)
    self.mlp = layers.Mlp(
      self.dtype, kernel_init=self.kernel_init, out_init=self.out_init
    )
    self.self_norm = layers.LayerNorm(self.eps)
    self.mlp_norm = layers.LayerNorm(self.eps)
    if self.cross:
      self.cross_attention = attention.Attention(self.dtype, **maps)
      self.query_norm = layers.LayerNorm(self.eps)
      self.context_norm = layers.LayerNorm(self.eps)

  def __call__(
    self,
    x_BLD: jax.Array,
    context_BMD: jax.Array | None,
    valid_BL: jax.Array | None,
    context_valid_BM: jax.Array | None,
    rows_BQ: jax.Array | None = None,
  ) -> jax.Array:
    h_BLD = self.self_norm(x_BLD)
    x_BQD, q_BQD = x_BLD, h_BLD
    if rows_BQ is not None:
      x_BQD, q_BQD = (layers.take_rows(a, rows_BQ) for a in (x_BLD, h_BLD))
    x_BQD += self.self_attention(q_BQD, h_BLD, valid_BL)
    if self.cross:
      x_BQD += self.cross_attention(
        self.query_norm(x_BQD), self.context_norm(context_BMD), context_valid_BM
      )
    return x_BQD + self.mlp(self.mlp_norm(x_BQD))

  def example(self) -> tuple[Any, ...]:
    """Smallest inputs, to create parameters."""
    token_11D = example_token(self.width, self.dtype)
    return token_11D, token_11D if self.cross else None, None, None


REMAT_POLICIES = {
  "dots": jax.checkpoint_policies.save_only_these_names(products.PRODUCT),
  "full": None,
}


class Stack(nn.Module):
  """`depth` equal blocks, one after the other; with none the carry stays.

  `make_block` builds a block with `parent=None`; its `__call__(carry,
  *context)` returns the next carry. With a `past`, one a layer on a leading
  axis, it is called with its own one too and returns the next one as well; so
  does the stack.
  """

  make_block: Callable[[], nn.Module]
  depth: int
  scan: bool
  remat: str

  @nn.compact
  def __call__(self, carry: Any, *context: Any, past: Any = None) -> Any:
    if not self.depth:
      return carry if past is None else (carry, past)
    block = self.make_block()
    layers_N = self.param("layers", self._init_layers)
    drops = self.has_rng("dropout")
    keys_N = jax.random.split(
      self.make_rng("dropout") if drops else jax.random.key(0), self.depth
    )

    context = layers.keep_samples(context)

    def body(carry, layer):
      params, key, past = layer
      rngs = {"dropout": key} if drops else {}
      run = functools.partial(
        block.apply,
        {"params": params},
        layers.keep_samples(carry),
        *context,
        rngs=rngs,
      )
      return (run(), None) if past is None else run(past=past)

    if self.remat != "none":
      body = jax.checkpoint(
        body, policy=REMAT_POLICIES[self.remat], prevent_cse=not self.scan
      )
    inputs = layers_N, keys_N, past
    if self.scan:
      carry, longer = jax.lax.scan(body, carry, inputs)
    else:
      found = []
      for i in range(self.depth):
        carry, one = body(carry, jax.tree.map(lambda a: a[i], inputs))  # noqa: B023
        found.append(one)
      longer = jax.tree.map(lambda *a: jnp.stack(a), *found)
    carry = layers.keep_samples(carry)
    return carry if past is None else (carry, longer)

  def _init_layers(self, key: jax.Array) -> Any:
    block = self.make_block()
    example = block.example()
    keys_N = jax.random.split(key, self.depth)
    return jax.vmap(lambda k: block.init(k, *example)["params"])(keys_N)


def make_post_stack(config: ModelConfig, depth: int) -> Stack:
  """`depth` post blocks over states of `fusion.width`: CMAL's encoder."""
  fusion = config.fusion
  return Stack(
    functools.partial(
      PostBlock,
      width=fusion.width,
      dtype=config.compute_dtype,
      eps=fusion.norm_eps,
      dropout=fusion.dropout,
      init_std=config.init_std,
      zero_residual=config.zero_residual,
      fused=config.fused_attention,
      parent=None,
    ),
    depth,
    config.scan,
    config.remat,
  )
