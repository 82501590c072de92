"""Vision encoder of all systems: a ViT in three modes.

complete: all patches. drop: only the kept patches travel. token: hidden
patches are replaced by a learned vector before positions are added.
"""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from glscl_jax.config import ModelConfig
from glscl_jax.models import layers, products, stem, transformer


def patchify(image_BYXC: jax.Array, patch_size: int) -> jax.Array:
  """(B,R,R,3) to (B,I,P), patches row-major, values (row, column, channel)."""
  cells_BLMP = stem.join_cells(image_BYXC, patch_size)
  return cells_BLMP.reshape(cells_BLMP.shape[0], -1, cells_BLMP.shape[-1])


def unpatchify(patches_BIP: jax.Array, patch_size: int) -> jax.Array:
  """Undoes `patchify` for square images."""
  batch, num_patches, _ = patches_BIP.shape
  grid = round(num_patches**0.5)
  cells = patches_BIP.reshape(batch, grid, grid, patch_size, patch_size, -1)
  side = grid * patch_size
  return cells.transpose(0, 1, 3, 2, 4, 5).reshape(batch, side, side, -1)


def named_patches(index_BJ: jax.Array, num_patches: int) -> jax.Array:
  """(B, I) bool: which patches `index_BJ` names."""
  number_11I = jnp.arange(num_patches)[None, None, :]
  return jnp.any(index_BJ[:, :, None] == number_11I, axis=1)


def replace_patches(
  x_BID: jax.Array, tok_idx_BJ: jax.Array, token_D: jax.Array
) -> jax.Array:
  """Puts `token_D` in place of the patches `tok_idx_BJ`."""
  hidden_BI = named_patches(tok_idx_BJ, x_BID.shape[1])
  token_11D = token_D[None, None, :].astype(x_BID.dtype)
  return jnp.where(hidden_BI[:, :, None], token_11D, x_BID)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Initializers:
  """How each kind of array of the encoder starts."""

  patches: layers.Initializer  # the patch matrix
  table: layers.Initializer  # class token and positions
  qkv: layers.Initializer
  kernel: layers.Initializer  # the other matrices of the blocks
  out: layers.Initializer | None = None  # the last one of each branch; None:
  # as `kernel`


def make_initializers(config: ModelConfig) -> Initializers:
  """Those that `config.vision.init` names."""
  if config.vision.init == "truncated":
    truncated = nn.initializers.truncated_normal(config.init_std)
    return Initializers(
      patches=truncated, table=truncated, qkv=truncated, kernel=truncated
    )
  normal = nn.initializers.normal(config.vision.width**-0.5)
  if config.vision.init == "coca":
    block = transformer.coca_initializers(
      config.vision.width, config.vision.depth
    )
    return Initializers(
      patches=layers.uniform_fan_in,
      table=normal,
      qkv=block["qkv_init"],
      kernel=block["kernel_init"],
      out=block["out_init"],
    )
  xavier = nn.initializers.xavier_uniform()
  return Initializers(patches=xavier, table=normal, qkv=normal, kernel=xavier)


class VisionEncoder(nn.Module):
  """Images to token states after ln_post on all tokens; row 0 is the class.

  `embed` is separate from `encode`, so that several versions of an image
  share one patch embedding and equal-length versions share one call.

  Without blocks (depth 0) nobody reads a class token before the mean takes its
  place: row 0 is zero, and its parameters and ln_pre are not there.
  """

  config: ModelConfig

  def setup(self):
    vision = self.config.vision
    inits = make_initializers(self.config)
    if vision.stem:
      self.stem = stem.Stem(self.config)
    else:
      self.patch_kernel_PD = self.param(
        "patch_kernel",
        inits.patches,
        (3 * vision.patch_size**2, vision.width),
      )
    if vision.patch_bias:
      self.patch_bias_D = self.param(
        "patch_bias", nn.initializers.zeros, (vision.width,)
      )
    if vision.depth:
      self.class_D = self.param("class_embedding", inits.table, (vision.width,))
    num_rows = vision.num_patches + (1 if vision.depth else 0)
    self.position_LD = self.param(
      "position_embedding", inits.table, (num_rows, vision.width)
    )
    self.mask_token = layers.Values(
      (vision.width,), nn.initializers.normal(vision.mask_token_std)
    )
    self.ln_pre = layers.LayerNorm(vision.norm_eps)
    self.ln_post = layers.LayerNorm(vision.norm_eps)
    self.blocks = transformer.Stack(
      functools.partial(
        transformer.PreBlock,
        width=vision.width,
        dtype=self.config.compute_dtype,
        eps=vision.norm_eps,
        activation=vision.activation,
        zero_residual=self.config.zero_residual,
        fused=self.config.fused_attention,
        qkv_init=inits.qkv,
        kernel_init=inits.kernel,
        out_init=inits.out,
        parent=None,
      ),
      vision.depth,
      self.config.scan,
      self.config.remat,
    )

  def embed(self, image_BYXC: jax.Array) -> jax.Array:
    """Patch embeddings before positions, (B, I, D).

    With a convolution stem, embeddings read neighbouring patches: pixels that
    must stay hidden have to be blanked before.
    """
    if self.config.vision.stem:
      return self.stem(image_BYXC)
    patches_BIP = patchify(image_BYXC, self.config.vision.patch_size)
    x_BID = products.dot(
      patches_BIP, self.patch_kernel_PD, dtype=self.config.compute_dtype
    )
    if self.config.vision.patch_bias:
      x_BID += self.patch_bias_D[None, None].astype(x_BID.dtype)
    return layers.keep_samples(x_BID)

  def complete(self, x_BID: jax.Array) -> jax.Array:
    """[cls; x] + P; without blocks [0; x + P]."""
    if not self.config.vision.depth:
      x_BID += self.position_LD[None].astype(x_BID.dtype)
      return jnp.pad(x_BID, ((0, 0), (1, 0), (0, 0)))
    class_B1D = jnp.broadcast_to(
      self.class_D[None, None, :].astype(x_BID.dtype),
      (x_BID.shape[0], 1, x_BID.shape[2]),
    )
    x_BLD = jnp.concatenate([class_B1D, x_BID], axis=1)
    return x_BLD + self.position_LD[None].astype(x_BID.dtype)

  def put_token(self, x_BID: jax.Array, tok_idx_BJ: jax.Array) -> jax.Array:
    """Puts the learned mask token in place of the patches `tok_idx_BJ`."""
    return replace_patches(x_BID, tok_idx_BJ, self.mask_token())

  def hide(self, x_BID: jax.Array, tok_idx_BJ: jax.Array) -> jax.Array:
    """As `complete`, with the patches `tok_idx_BJ` replaced by a token."""
    return self.complete(self.put_token(x_BID, tok_idx_BJ))

  def drop(self, x_BID: jax.Array, keep_idx_BJ: jax.Array) -> jax.Array:
    """As `complete`, with only the patches `keep_idx_BJ`, (B, 1 + J, D)."""
    x_BLD = self.complete(x_BID)
    kept_BJD = layers.take_rows(x_BLD, keep_idx_BJ + 1)
    return jnp.concatenate([x_BLD[:, :1], kept_BJD], axis=1)

  def encode(self, x_BLD: jax.Array) -> jax.Array:
    """Embedded tokens to states, same shape."""
    vision = self.config.vision
    if vision.depth and vision.ln_pre:
      x_BLD = self.ln_pre(x_BLD)
    y_BLD = self.ln_post(self.blocks(x_BLD))
    if vision.class_state == "mean":
      y_BLD = layers.put_mean_first(y_BLD)
    return y_BLD

  def __call__(self, image_BYXC: jax.Array) -> jax.Array:
    return self.encode(self.complete(self.embed(image_BYXC)))
