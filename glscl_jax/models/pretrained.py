"""Published SCL and GLSCL checkpoints, by name.

One table says for each of our parameters which torch array it comes from and
how the layouts differ. It is read in both directions: `from_scl` imports
weights, `to_scl` names weights, gradients or updates as the published code
does.

  linear   torch (out, in), ours (in, out)
  patches  torch (D, 3, p, p), ours (p p 3, D), patch values as (row, column,
           channel)
  row      torch (1, D), ours (D,)
  qkv      torch stacks query, key and value along its first axis
  layers   ours stacks equal blocks on a leading axis, torch numbers them
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import jax
import numpy as np

from glscl_jax import errors
from glscl_jax.types import Params


class WeightsError(errors.UserError):
  """Arrays that do not fit the model; the message lists the names."""


# Parts of published files that no loss reads, and buffers.
IGNORED = (
  r"vision_transformer\.(mask_token|decoder_pos_embed)",
  r"vision_transformer\.decoder_(embed|blocks|norm|pred)\..*",
  r"text_transformer\.pooler\..*",
  r"text_transformer\.embeddings\.position_ids",
  r"(train|val|dev|test)_.*",
)

POSITIONS = "vision_transformer.visual.positional_embedding"
PATCHES = "vision_transformer.visual.conv1.weight"

_VISION_BLOCK = {
  "attention/query": "attn.in_proj",
  "attention/key": "attn.in_proj",
  "attention/value": "attn.in_proj",
  "attention/out": "attn.out_proj",
  "norm1": "ln_1",
  "norm2": "ln_2",
  "mlp/fc1": "mlp.c_fc",
  "mlp/fc2": "mlp.c_proj",
}
_TEXT_BLOCK = {
  "attention/query": "attention.self.query",
  "attention/key": "attention.self.key",
  "attention/value": "attention.self.value",
  "attention/out": "attention.output.dense",
  "norm1": "attention.output.LayerNorm",
  "mlp/fc1": "intermediate.dense",
  "mlp/fc2": "output.dense",
  "norm2": "output.LayerNorm",
}
_FUSION_BLOCK = {
  "self_attention/query": "attention.self.query",
  "self_attention/key": "attention.self.key",
  "self_attention/value": "attention.self.value",
  "self_attention/out": "attention.output.dense",
  "norm1": "attention.output.LayerNorm",
  "cross_attention/query": "crossattention.self.query",
  "cross_attention/key": "crossattention.self.key",
  "cross_attention/value": "crossattention.self.value",
  "cross_attention/out": "crossattention.output.dense",
  "norm2": "crossattention.output.LayerNorm",
  "mlp/fc1": "intermediate.dense",
  "mlp/fc2": "output.dense",
  "norm3": "output.LayerNorm",
}
# Path of the stack -> torch name of block {}, and the names inside a block.
_STACKS = {
  "vision/blocks/layers": (
    "vision_transformer.visual.transformer.resblocks.{}.",
    _VISION_BLOCK,
  ),
  "text/blocks/layers": ("text_transformer.encoder.layer.{}.", _TEXT_BLOCK),
  "fusion/stack/layers/text": ("cross_modal_text_layers.{}.", _FUSION_BLOCK),
  "fusion/stack/layers/image": ("cross_modal_image_layers.{}.", _FUSION_BLOCK),
}
# The last fusion layer stands apart from its stack.
_LAST = {
  "fusion/last/text": ("cross_modal_text_layers.{}.", _FUSION_BLOCK),
  "fusion/last/image": ("cross_modal_image_layers.{}.", _FUSION_BLOCK),
}
_MODULES = {
  "vision/ln_pre": "vision_transformer.visual.ln_pre",
  "vision/ln_post": "vision_transformer.visual.ln_post",
  "text/norm": "text_transformer.embeddings.LayerNorm",
  "fusion/text_transform": "cross_modal_text_transform",
  "fusion/image_transform": "cross_modal_image_transform",
  "fusion/text_pooler": "cross_modal_text_pooler.dense",
  "fusion/image_pooler": "cross_modal_image_pooler.dense",
  "text_projection/fc1": "language_proj.0",
  "text_projection/norm": "language_proj.1",
  "text_projection/fc2": "language_proj.3",
  "image_projection/fc1": "vision_proj.0",
  "image_projection/norm": "vision_proj.1",
  "image_projection/fc2": "vision_proj.3",
  "mlm_head/fc1": "mlm_score.transform.dense",
  "mlm_head/norm": "mlm_score.transform.LayerNorm",
  "match_head/fc": "itm_score.fc",
}
_ARRAYS = {
  "vision/patch_kernel": (PATCHES, "patches"),
  "vision/class_embedding": (
    "vision_transformer.visual.class_embedding",
    "same",
  ),
  "vision/position_embedding": (POSITIONS, "same"),
  "vision/mask_token/value": (
    "vision_transformer.visual.visual_mask_token",
    "row",
  ),
  "text/word_embedding": (
    "text_transformer.embeddings.word_embeddings.weight",
    "same",
  ),
  "text/position_embedding": (
    "text_transformer.embeddings.position_embeddings.weight",
    "same",
  ),
  "text/type_embedding": (
    "text_transformer.embeddings.token_type_embeddings.weight",
    "same",
  ),
  "fusion/type_embedding/value": ("token_type_embeddings.weight", "same"),
  "temperature/value": ("cl_temp", "same"),
  "mlm_head/fc2/kernel": ("mlm_score.decoder.weight", "linear"),
  "mlm_head/fc2/bias": ("mlm_score.bias", "same"),
}
_THIRDS = {"query": 0, "key": 1, "value": 2}


@dataclass(frozen=True, kw_only=True)
class Source:
  """Where one of our parameters comes from."""

  names: tuple[str, ...]  # one a layer
  stacked: bool  # ours has a leading layer axis
  layout: str
  third: int | None = None  # of a fused qkv array


def _leaf(path: str, module: str, torch_module: str) -> tuple[str, str]:
  """The torch name and layout of `path`, a parameter of `module`."""
  leaf = path.removeprefix(module + "/")
  layout = "linear" if leaf == "kernel" else "same"
  suffix = "bias" if leaf == "bias" else "weight"
  joint = "_" if torch_module.endswith("in_proj") else "."
  return torch_module + joint + suffix, layout


def source(path: str, num_layers: int, fusion_depth: int) -> Source:
  """The torch arrays of the parameter `path`.

  Args:
    path: such as `text/blocks/layers/mlp/fc1/kernel`.
    num_layers: size of the leading axis, if `path` is in a stack.
    fusion_depth: all co-attention layers, with the one that stands apart.

  Raises:
    WeightsError: the published code has no such parameter.
  """
  if path in _ARRAYS:
    name, layout = _ARRAYS[path]
    return Source(names=(name,), stacked=False, layout=layout)
  module, _, _ = path.rpartition("/")
  if module in _MODULES:
    name, layout = _leaf(path, module, _MODULES[module])
    return Source(names=(name,), stacked=False, layout=layout)
  for prefix, (block_name, inside) in (_STACKS | _LAST).items():
    inner = module.removeprefix(prefix + "/")
    if inner == module or inner not in inside:
      continue
    name, layout = _leaf(path, module, inside[inner])
    stacked = prefix in _STACKS
    numbers = range(num_layers) if stacked else [fusion_depth - 1]
    fused = inside[inner].endswith("in_proj")
    return Source(
      names=tuple(block_name.format(i) + name for i in numbers),
      stacked=stacked,
      layout=layout,
      third=_THIRDS[inner.rpartition("/")[2]] if fused else None,
    )
  raise WeightsError(f"no published name for the parameter {path}")


def _sources(params: Params) -> Iterator[tuple[str, jax.Array, Source]]:
  """(path, leaf, source) of every parameter, in tree order."""
  leaves = [
    (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  ]
  stacks = [
    leaf.shape[0] for path, leaf in leaves if path.startswith("fusion/stack/")
  ]
  fusion_depth = 1 + (stacks[0] if stacks else 0)
  for path, leaf in leaves:
    num_layers = leaf.shape[0] if leaf.shape else 1
    yield path, leaf, source(path, num_layers, fusion_depth)


def _to_torch(array: np.ndarray, layout: str) -> np.ndarray:
  if layout == "linear":
    return array.T
  if layout == "patches":
    values, width = array.shape
    side = round((values / 3) ** 0.5)
    return array.reshape(side, side, 3, width).transpose(3, 2, 0, 1)
  return array[None] if layout == "row" else array


def _from_torch(array: np.ndarray, layout: str) -> np.ndarray:
  if layout == "linear":
    return array.T
  if layout == "patches":
    return array.transpose(2, 3, 1, 0).reshape(-1, array.shape[0])
  return array[0] if layout == "row" else array


def to_scl(params: Params) -> dict[str, np.ndarray]:
  """A tree shaped like the parameters, under the published names and layouts.

  Works on anything with that structure: weights, gradients, updates.

  Raises:
    WeightsError: a parameter that the published code does not have.
  """
  arrays: dict[str, np.ndarray] = {}
  thirds: dict[str, dict[int, np.ndarray]] = {}
  for _, leaf, src in _sources(params):
    value = np.asarray(leaf)
    for name, layer in zip(
      src.names, value if src.stacked else [value], strict=True
    ):
      if src.third is None:
        arrays[name] = _to_torch(layer, src.layout)
      else:
        thirds.setdefault(name, {})[src.third] = _to_torch(layer, src.layout)
  for name, parts in thirds.items():
    arrays[name] = np.concatenate([parts[i] for i in range(3)])
  return arrays


def from_scl(arrays: Mapping[str, np.ndarray], like: Params) -> Params:
  """Parameters from a published checkpoint's arrays; strict.

  Args:
    arrays: the checkpoint's `state_dict` or `model` entry as NumPy arrays.
    like: a tree of arrays or ShapeDtypeStructs with the wanted structure, such
      as `jax.eval_shape` of a system's `init`.

  Returns:
    A tree like `like`, NumPy float32. A position table of another grid is
    resized; nothing else is.

  Raises:
    WeightsError: missing names, names that are neither used nor in `IGNORED`,
      or wrong shapes; every one is listed.
  """
  table = {path: (leaf, src) for path, leaf, src in _sources(like)}
  wanted = {name for _, src in table.values() for name in src.names}
  problems = [f"missing: {name}" for name in sorted(wanted - set(arrays))]
  problems += [
    f"unexpected: {name}"
    for name in sorted(set(arrays) - wanted)
    if not any(re.fullmatch(pattern, name) for pattern in IGNORED)
  ]
  _raise(problems)
  values = {}
  for path, (leaf, src) in table.items():
    layers = [np.asarray(arrays[name], np.float32) for name in src.names]
    problems += _shape_problems(layers, leaf.shape, src)
    if not problems:
      values[path] = _join(layers, leaf.shape, src)
  _raise(problems)
  return jax.tree_util.tree_map_with_path(
    lambda path, _: values[
      jax.tree_util.keystr(path, simple=True, separator="/")
    ],
    like,
  )


def _raise(problems: list[str]) -> None:
  lines = dict.fromkeys(problems)  # query, key and value share an array
  if lines:
    raise WeightsError(
      "the checkpoint does not fit this model:\n  " + "\n  ".join(lines)
    )


def _join(
  layers: list[np.ndarray], shape: tuple[int, ...], src: Source
) -> np.ndarray:
  """Torch arrays of each layer as one array of ours."""
  if src.names == (POSITIONS,):
    return resize_positions(layers[0], round((shape[0] - 1) ** 0.5))
  if src.third is not None:
    layers = [np.split(layer, 3)[src.third] for layer in layers]
  ours = [_from_torch(layer, src.layout) for layer in layers]
  return np.stack(ours) if src.stacked else ours[0]


def _shape_problems(
  layers: list[np.ndarray], shape: tuple[int, ...], src: Source
) -> list[str]:
  """A line for each torch array whose shape differs from the expected one."""
  one_layer = shape[1:] if src.stacked else shape
  expected = _to_torch(np.broadcast_to(np.float32(0), one_layer), src.layout)
  rows, *rest = expected.shape or (None,)
  if src.third is not None:
    rows *= 3
  wanted = () if rows is None else (rows, *rest)
  found = []
  for name, layer in zip(src.names, layers, strict=True):
    square = name == POSITIONS and layer.ndim == 2 and layer.shape[0] > 1
    square = square and round((layer.shape[0] - 1) ** 0.5) ** 2 == (
      layer.shape[0] - 1
    )
    # Position tables of any square grid are resized.
    fits = layer.shape[1:] == wanted[1:] if square else layer.shape == wanted
    if not fits:
      found.append(f"shape: {name} is {layer.shape}, the model needs {wanted}")
  return found


def resize_matrix(old: int, new: int) -> np.ndarray:
  """The (new, old) float64 matrix of cubic convolution.

  a = -0.75, borders clamped, no antialiasing: torch's bicubic with
  align_corners=False. `jax.image.resize` differs.
  """
  a = -0.75
  matrix = np.zeros((new, old))
  for row in range(new):
    place = (row + 0.5) * old / new - 0.5
    floor = int(np.floor(place))
    for k in range(-1, 3):
      d = abs(place - floor - k)
      if d <= 1:
        weight = (a + 2) * d**3 - (a + 3) * d**2 + 1
      else:
        weight = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
      matrix[row, min(max(floor + k, 0), old - 1)] += weight
  return matrix


def resize_positions(table_LD: np.ndarray, grid: int) -> np.ndarray:
  """A position table (1 + g g, D) for another grid, (1 + grid grid, D).

  Row 0, the class token's, is copied. Text tables are never resized.
  """
  old = round((table_LD.shape[0] - 1) ** 0.5)
  if old == grid:
    return table_LD
  matrix = resize_matrix(old, grid)
  patches_YXD = table_LD[1:].reshape(old, old, -1).astype(np.float64)
  resized = np.einsum("yi,xj,ijd->yxd", matrix, matrix, patches_YXD)
  rows = resized.reshape(grid * grid, -1).astype(table_LD.dtype)
  return np.concatenate([table_LD[:1], rows])
