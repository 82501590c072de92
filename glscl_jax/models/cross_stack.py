"""Cross-attention stacks: one modality asks, the other answers.

The queries pass `depth` blocks; the context is the other encoder's output, the
same for all blocks. MaskVLM's g_image, g_text and pixel decoder are such
stacks of post_cross blocks, SyCoCa's decoders of coca and pre_cross blocks.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax

from glscl_jax.config import ModelConfig
from glscl_jax.models import attention, layers, transformer
from glscl_jax.models.transformer import CocaPast


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StackPast:
  """What a `CrossStack` of `CocaBlock`s keeps of a text that grows."""

  body: CocaPast | None  # None: it has but one block
  last: CocaPast

  def take(self, rows_A: jax.Array) -> StackPast:
    """Of some texts, see `CocaPast.take`."""
    body = self.body and self.body.take(rows_A)
    return StackPast(body, self.last.take(rows_A))


class CrossStack(nn.Module):
  """`depth` blocks of self-attention, cross-attention and MLP.

  The last block stands apart from the stack, because losses read few of its
  rows: it can be asked for just those.
  """

  config: ModelConfig
  depth: int
  make_block: Callable[..., nn.Module] | None = None  # None: post_cross

  def setup(self):
    fusion = self.config.fusion
    make_block = self.make_block or functools.partial(
      transformer.PostCrossBlock,
      fusion.width,
      self.config.compute_dtype,
      fusion.norm_eps,
      fusion.dropout,
      self.config.init_std,
      self.config.fused_attention,
    )
    if self.depth > 1:
      self.stack = transformer.Stack(
        functools.partial(make_block, parent=None),
        self.depth - 1,
        self.config.scan,
        self.config.remat,
      )
    self.last = make_block()

  def body(
    self,
    x_BLD: jax.Array,
    context_BMD: jax.Array | None,
    valid_BL: jax.Array | None,
    context_valid_BM: jax.Array | None,
  ) -> jax.Array:
    """All blocks but the last."""
    if self.depth == 1:
      return x_BLD
    return self.stack(x_BLD, context_BMD, valid_BL, context_valid_BM)

  def head(
    self,
    x_BLD: jax.Array,
    context_BMD: jax.Array | None,
    valid_BL: jax.Array | None,
    context_valid_BM: jax.Array | None,
    rows_BQ: jax.Array | None = None,
  ) -> jax.Array:
    """The last block on the states of `body`, for all rows or some."""
    states = x_BLD, context_BMD, valid_BL, context_valid_BM
    if rows_BQ is None or not self.config.fusion.restrict_last_layer:
      y_BLD = layers.keep_samples(self.last(*states))
      return y_BLD if rows_BQ is None else layers.take_rows(y_BLD, rows_BQ)
    return layers.keep_samples(self.last(*states, rows_BQ))

  def attention(
    self,
    x_BLD: jax.Array,
    context_BMD: jax.Array,
    valid_BL: jax.Array | None,
    context_valid_BM: jax.Array | None,
  ) -> jax.Array:
    """Cross-attention of the last block on the states of `body`, (B,H,L,M)."""
    return self.last.cross_probabilities(
      x_BLD, context_BMD, valid_BL, context_valid_BM
    )

  def start(self, batch: int, length: int) -> StackPast:
    """No token yet, room for `length`."""
    size = batch, length, self.config.fusion.width, self.config.compute_dtype
    body = None
    if self.depth > 1:
      body = CocaPast(attention.start(*size, self.depth - 1), None)
    return StackPast(body, CocaPast(attention.start(*size), None))

  def extend(
    self, x_BLD: jax.Array, context_BMD: jax.Array | None, past: StackPast
  ) -> tuple[jax.Array, StackPast]:
    """All blocks on tokens that follow those of `past`.

    The context is read with the first ones, later it may be None.
    """
    body, context = past.body, (context_BMD, None, None)
    if body is not None:
      x_BLD, longer = self.stack(x_BLD, *context, past=body)
      body = body.replace(longer)
    x_BLD, longer = self.last(x_BLD, *context, past=past.last)
    return x_BLD, StackPast(body, past.last.replace(longer))
