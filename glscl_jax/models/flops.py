"""Forward FLOPs of towers and heads, for one sample, from sizes alone.

A multiply-add counts as two. Matrix products only: linear maps, attention
logits and mixing. Biases, norms, softmax, activations and table look-ups are
left out. By this rule CLIP's published figures come out: 8.82, 35.13 and
162.03 GFLOP for the image towers B/32, B/16, L/14, 5.96 for the text tower.
"""

from __future__ import annotations

from glscl_jax.config import VisionConfig


def linear(rows: int, width_in: int, width_out: int) -> int:
  """A linear map of `rows` vectors."""
  return 2 * rows * width_in * width_out


def attention(queries: int, keys: int, width: int) -> int:
  """Four linear maps, logits and mixing; all heads together."""
  return (
    2 * linear(queries, width, width)
    + 2 * linear(keys, width, width)
    + 2 * linear(queries, keys, width)
  )


def mlp(rows: int, width: int) -> int:
  """Two linear maps with hidden width 4 D."""
  return 2 * linear(rows, width, 4 * width)


def encoder(width: int, depth: int, tokens: int) -> int:
  """`depth` blocks of self-attention and MLP; pre- and post-norm alike."""
  return depth * (attention(tokens, tokens, width) + mlp(tokens, width))


def patch_embedding(width: int, patch_size: int, patches: int) -> int:
  """Pixels of `patches` colour patches to vectors."""
  return linear(patches, 3 * patch_size**2, width)


def stem(cells: int, cell_values: int, widths: tuple[int, ...], blocks) -> int:
  """A convolution stem.

  Args:
    cells: of the first stage's grid; each later stage has a quarter.
    cell_values: pixels times colours of one such cell.
    widths: of the stages.
    blocks: residual blocks (two 3 x 3 convolutions) of each stage.
  """
  total, values = 0, cell_values
  for width, count in zip(widths, blocks, strict=True):
    total += linear(cells, values, width)
    total += count * 2 * linear(cells, 9 * width, width)
    cells, values = cells // 4, 4 * width
  return total


def embedding(vision: VisionConfig) -> int:
  """The patches of one image, by the patch matrix or the stem."""
  if not vision.stem:
    return patch_embedding(vision.width, vision.patch_size, vision.num_patches)
  cells_a_patch = 4 ** (len(vision.stem) - 1)
  return stem(
    vision.num_patches * cells_a_patch,
    3 * vision.patch_size**2 // cells_a_patch,
    vision.stem,
    vision.stem_blocks,
  )


def cross_block(rows: int, length: int, context: int, width: int) -> int:
  """Self-attention, cross-attention and MLP for `rows` of `length` tokens.

  Nothing at all where no row is asked for: the stream is left out.
  """
  if rows == 0:
    return 0
  return (
    attention(rows, length, width)
    + attention(rows, context, width)
    + mlp(rows, width)
  )


def co_attention(text_length: int, image_length: int, width: int) -> int:
  """One layer of both streams, all rows."""
  return cross_block(
    text_length, text_length, image_length, width
  ) + cross_block(image_length, image_length, text_length, width)


def joint_projection(kind: str, width: int, joint_width: int) -> int:
  """The ITC head of one modality, by `model.joint_projection`."""
  last = linear(1, width, joint_width)
  return {
    "mlp": linear(1, width, width) + last,
    "linear": last,
    "matrix": last,
    "none": 0,
  }[kind]


def vocabulary_head(rows: int, width: int, vocab_size: int) -> int:
  """The MLM head at `rows` positions."""
  return linear(rows, width, width) + linear(rows, width, vocab_size)


def match_head(width: int) -> int:
  """Both poolers and the two ITM logits."""
  return 2 * linear(1, width, width) + linear(1, 2 * width, 2)
