"""Batches of random pictures and captions, and the smallest model for them."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np

from glscl_jax import config as config_lib
from glscl_jax.data import masking
from glscl_jax.systems import registry
from glscl_jax.types import Batch

START, PAD, END = 0, 1, 2
FIRST_PLAIN = 4  # ids below are special; so is the last one, the mask


DEPTHS = ("depth", "image_depth", "text_depth", "decoder_depth")


def _reads(system: str, name: str) -> bool:
  return system in config_lib.READ_BY[f"model.fusion.{name}"]


def config(
  *,
  depth: int = 1,
  width: int = 64,
  dropout: float = 0.0,
  batch_size: int = 8,
  image_size: int = 32,
  vocab_size: int = 64,
  max_length: int = 10,
  objectives: dict | None = None,
  optimizer: dict | None = None,
  num_steps: int = 10,
  vision: dict | None = None,
  text: dict | None = None,
  masking: dict | None = None,
  fusion: dict | None = None,
  system: str = "glscl",
  **model,
) -> config_lib.Config:
  """By default 16 patches of 8 x 8 pixels, 10 tokens, 64 words, width 64."""
  return config_lib.Config(
    system=system,
    masking=config_lib.MaskingConfig(**(masking or {})),
    model=config_lib.ModelConfig(
      vision=config_lib.VisionConfig(
        image_size=image_size,
        width=width,
        **{"patch_size": 8, "depth": depth, **(vision or {})},
      ),
      text=config_lib.TextConfig(
        vocab_size=vocab_size,
        max_length=max_length,
        num_positions=24,
        width=width,
        dropout=dropout,
        **{"depth": depth, **(text or {})},
      ),
      fusion=config_lib.FusionConfig(
        width=width,
        dropout=dropout,
        restrict_last_layer=model.pop("restrict_last_layer", True),
        **{name: depth for name in DEPTHS if _reads(system, name)}
        | (fusion or {}),
      ),
      **{
        "joint_width": 32,
        "compute_dtype": "float32",
        "remat": "none",
        **model,
      },
    ),
    objectives=config_lib.ObjectiveConfig(**(objectives or {})),
    optimizer=config_lib.OptimizerConfig(**(optimizer or {})),
    data=config_lib.DataConfig(dir="unused", batch_size=batch_size),
    train=config_lib.TrainConfig(num_steps=num_steps),
  )


# The quick start's encoders, narrow: 16 patches of 16 x 16 pixels.
SMALL_DATA = {
  "image_size": 64,
  "vision": {
    "patch_size": 16,
    "depth": 0,
    "stem": (8, 16, 64),
    "stem_blocks": (1, 1, 1),
    "class_state": "mean",
  },
  "text": {"depth": 0, "class_state": "mean", "embedding_norm": False},
  "joint_projection": "none",
  "joint_width": 64,
  "zero_residual": True,
}


# MaskVLM: ImageNet's ViT, and blocks of 2 x 2 patches, 3 of 4 hidden.
MASKVLM = {
  "system": "maskvlm",
  "masking": {"mlm_rate": 0.3, "image_block_size": 16},
  "vision": {
    "activation": "gelu",
    "norm_eps": 1e-6,
    "patch_bias": True,
    "ln_pre": False,
    "init": "truncated",
    "mask_token_std": 0.02,
  },
  "joint_projection": "linear",
  "match_features": "product",
}


def maskvlm(*names: str, **options) -> config_lib.Config:
  """The smallest MaskVLM; `names`: its objectives, by default all.

  `objectives`: further values of that section.
  """
  weights = only(*(names or config_lib.SYSTEM_OBJECTIVES["maskvlm"]))
  negatives = "hard" if weights["itc"] else "in_batch"
  objectives = {"itm_negatives": negatives, **options.pop("objectives", {})}
  return config(**MASKVLM, objectives=weights | objectives, **options)


# SyCoCa: CoCa's towers and decoders.
SYCOCA = {
  "system": "sycoca",
  "vision": {"activation": "gelu", "init": "coca", "mask_token_std": 0.02},
  "text": {"embedding_norm": False, "place_std": 0.01},
  "fusion": {"norm_eps": 1e-5},
  "objectives": {"mim_loss": "l2", "mim_patch_norm": True},
  "joint_projection": "matrix",
}


def sycoca(*names: str, **options) -> config_lib.Config:
  """The smallest SyCoCa; `names`: its objectives, by default all.

  Where ITC is missing patches are split at random, or by `masking`.
  """
  weights = only(*(names or config_lib.SYSTEM_OBJECTIVES["sycoca"]))
  split = "attentive" if weights["itc"] else "random"
  sections = SYCOCA | {"masking": {"split": split}}
  for name, values in sections.items():
    if isinstance(values, dict):
      options[name] = values | options.pop(name, {})
    else:
      options.setdefault(name, values)
  options["objectives"] = weights | options["objectives"]
  return config(**options)


def only(*names: str, **weights: float) -> dict[str, float]:
  """Objective weights: 1 for `names`, 0 for the others."""
  chosen = {name: 1.0 for name in names} | weights
  return {name: 0.0 for name in config_lib.OBJECTIVES} | chosen


def batch(
  config: config_lib.Config,
  *,
  seed: int = 0,
  size: int | None = None,
  num_real: tuple[int, ...] | None = None,
) -> Batch:
  """Distinct random samples with masks as the data pipeline makes them.

  `num_real`: words of each caption; by default 3 up to all there is room for.
  """
  size = size or config.data.batch_size
  rng = np.random.default_rng([seed, 1])
  length = config.model.text.max_length
  side = config.model.vision.image_size
  if num_real is None:
    num_real = tuple(rng.integers(3, length - 1, size))
  plain_ids_V = np.arange(FIRST_PLAIN, config.model.text.vocab_size - 1)
  rows = []
  for index, count in enumerate(num_real):
    words = rng.choice(plain_ids_V, count)
    rows.append(
      sample(
        config,
        masking.sample_rng(seed, 0, index, "all"),
        rng.integers(0, 256, (side, side, 3), dtype=np.uint8),
        words,
        index,
      )
    )
  columns = {k: np.stack([row[k] for row in rows]) for k in rows[0]}
  return Batch(**columns)


def sample(
  config: config_lib.Config,
  rng: np.random.Generator,
  image_YXC: np.ndarray,
  words: np.ndarray,
  index: int,
) -> dict[str, np.ndarray]:
  """One row of a batch."""
  length = config.model.text.max_length
  mask_id = config.model.text.vocab_size - 1
  count = len(words)
  ids_T = np.full(length, PAD, np.int32)
  ids_T[: count + 2] = [START, *words, END]
  position_T = np.arange(length)
  real_T = (position_T > 0) & (position_T <= count)
  mlm = masking.mask_tokens(
    rng,
    ids_T,
    real_T,
    rate=config.masking.mlm_rate,
    mask_id=mask_id,
    plain_ids_V=np.arange(FIRST_PLAIN, mask_id),
  )
  scl = masking.mask_completion(
    rng,
    ids_T,
    real_T,
    rate=config.masking.completion_text_rate,
    mask_id=mask_id,
  )
  num_patches = config.model.vision.num_patches
  blocks = {}
  if config.objectives.mim > 0:
    blocks["block_idx_BI"] = masking.block_patches(
      rng,
      config.model.vision.image_size,
      config.model.vision.patch_size,
      block_size=config.masking.image_block_size,
      ratio=config.masking.image_block_ratio,
    )
  return blocks | {
    "image_BYXC": image_YXC,
    "identity_BM": np.array([index], np.int32),
    "text_ids_BT": ids_T,
    "text_valid_BT": position_T < count + 2,
    "mlm_ids_BT": mlm.ids_T,
    "mlm_pos_BJ": mlm.pos_J,
    "mlm_labels_BJ": mlm.labels_J,
    "mlm_ok_BJ": mlm.ok_J,
    "scl_ids_BT": scl.ids_T,
    "scl_pos_BJ": scl.pos_J,
    "scl_ok_BJ": scl.ok_J,
    "keep_idx_BI": masking.drop_patches(
      rng, num_patches, drop_ratio=config.masking.image_drop_ratio
    ),
    "tok_idx_BI": masking.token_patches(
      rng, num_patches, ratio=config.masking.image_token_ratio
    ),
  }


def change(batch: Batch, **fields: np.ndarray) -> Batch:
  """A copy with other arrays."""
  return dataclasses.replace(batch, **fields)


def params(config: config_lib.Config, *, seed: int = 0):
  """Fresh parameters."""
  init = functools.partial(registry.find(config).init, config)
  return jax.jit(init)(jax.random.key(seed))


def spread_params(
  config: config_lib.Config, *, seed: int = 0, spread: float = 0.1
):
  """Random weights, wide enough that outputs differ; compiles nothing."""
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    name = jax.tree_util.keystr(path)
    noise = rng.standard_normal(leaf.shape).astype(np.float32)
    if "temperature" in name or "logit_scale" in name:
      value = 0.07 if "temperature" in name else -np.log(0.07)
      return np.full(leaf.shape, value, np.float32)
    return 1 + spread * noise if "scale" in name else spread * noise

  return jax.tree_util.tree_map_with_path(draw, abstract_params(config))


def abstract_params(config: config_lib.Config):
  """Shapes and types of the parameters; compiles nothing."""
  init = functools.partial(registry.find(config).init, config)
  return jax.eval_shape(init, jax.random.key(0))


@functools.cache
def loss_function(config: config_lib.Config):
  """Compiled `(params, batch, key) -> LossOutput`, once per configuration."""
  loss = registry.find(config).loss
  return jax.jit(
    lambda params, batch, key: loss(params, batch, config=config, key=key)
  )


@functools.cache
def gradient_function(config: config_lib.Config):
  """Compiled `(params, batch, key) -> (gradients, metrics)`."""
  loss = registry.find(config).loss

  def scalar(params, batch, key):
    output = loss(params, batch, config=config, key=key)
    return output.loss, output.metrics

  return jax.jit(jax.grad(scalar, has_aux=True))


def difference(a, b) -> float:
  """The largest absolute difference of two trees, relative to its array."""
  return max(
    float(np.max(np.abs(x - y)) / max(1e-3, np.max(np.abs(y))))
    for x, y in zip(
      map(np.asarray, jax.tree.leaves(a)),
      map(np.asarray, jax.tree.leaves(b)),
      strict=True,
    )
  )


def moments(opt_state):
  """AdamW's running moments somewhere in an optimizer state."""
  (found,) = [
    node
    for node in jax.tree.leaves(opt_state, is_leaf=lambda x: hasattr(x, "mu"))
    if hasattr(node, "mu")
  ]
  return found
