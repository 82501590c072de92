"""The whole configuration as frozen dataclasses: the only place with defaults.

`configs/*.py` build a ConfigDict from `to_config_dict(Config())` and change
what a recipe changes; the launcher applies `--config.a.b=v` and calls
`from_config_dict`, which is strict. Below the launcher only these classes
travel. Comments say where a value is from: [paper], [code] (the published code
does so), [choice], ours where no source fixes it, or [uncertain], believed to
be the paper's but not confirmed.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import ml_collections

from glscl_jax import errors

HEAD_WIDTH = 64  # every tower: heads = width / 64


class ConfigError(errors.UserError):
  """A configuration that cannot run; the message names the path."""


def _check(condition: bool, name: str, message: str) -> None:
  if not condition:
    raise ConfigError(f"{name}: {message}")


def _check_ratio(config: Any, *names: str) -> None:
  for name in names:
    value = getattr(config, name)
    _check(0.0 <= value < 1.0, name, f"must be in [0, 1), is {value}")


def _check_positive(config: Any, *names: str) -> None:
  for name in names:
    value = getattr(config, name)
    _check(value > 0, name, f"must be positive, is {value}")


def _check_not_negative(config: Any, *names: str) -> None:
  for name in names:
    value = getattr(config, name)
    _check(value >= 0, name, f"must not be negative, is {value}")


def _names_test(split: str) -> bool:
  """Whether a word of a split's name begins like test: testA, test1k, Test."""
  return any(part.lower().startswith("test") for part in split.split("_"))


def _check_depth(encoder: VisionConfig | TextConfig) -> None:
  _check_not_negative(encoder, "depth")
  _check(
    encoder.depth > 0 or encoder.class_state == "mean",
    "depth",
    "0: without blocks the first token sees no other; set class_state to mean",
  )


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
  """A pre-norm ViT with a norm on all states (ln_post) at the end.

  By default CLIP's (SCL, GLSCL). ImageNet's (MaskVLM): `patch_bias`, no
  `ln_pre`, `init` truncated, `activation` gelu, `norm_eps` 1e-6. CoCa's
  (SyCoCa): `init` coca, `activation` gelu.
  """

  image_size: int = 288  # R, pixels; images are square
  patch_size: int = 16  # p, pixels; divides image_size
  width: int = 768  # D
  depth: int = 11  # CLIP's last block is dropped, as METER and SCL do; 0: the
  # embeddings alone, with a stem a convolutional encoder [choice]
  activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
  norm_eps: float = 1e-5
  patch_bias: bool = False  # of the patch matrix
  ln_pre: bool = True  # a norm before the blocks
  init: Literal["clip", "truncated", "coca"] = "clip"  # of matrices and
  # tables; truncated: normal with model.init_std, cut at two of it; coca:
  # normals by width and depth, as of CoCa's text tower [choice]
  mask_token_std: float = 1.0  # N(0, std) init of the learned patch vector
  stem: tuple[int, ...] = ()  # widths of the stages of a convolution stem,
  # for training from little data [choice]; empty: CLIP's patch matrix
  stem_blocks: tuple[int, ...] = ()  # residual blocks in each stage
  class_state: Literal["token", "mean"] = "token"  # mean: of the other states
  # takes the place of the class token's [choice]

  def __post_init__(self):
    _check_positive(self, "image_size", "patch_size", "width", "norm_eps")
    _check_not_negative(self, "mask_token_std")
    _check_depth(self)
    _check(
      self.image_size % self.patch_size == 0,
      "patch_size",
      f"{self.patch_size} does not divide image_size {self.image_size}",
    )
    _check(
      self.width % HEAD_WIDTH == 0, "width", f"not a multiple of {HEAD_WIDTH}"
    )
    _check(
      all(n > 0 for n in self.stem), "stem", f"not all positive: {self.stem}"
    )
    _check(
      not self.stem or self.stem[-1] == self.width,
      "stem",
      f"{self.stem} does not end with width {self.width}",
    )
    _check(
      not (self.stem and self.patch_bias),
      "patch_bias",
      "is of the patch matrix, which a stem takes the place of",
    )
    _check(
      self.patch_size % 2 ** max(len(self.stem) - 1, 0) == 0,
      "stem",
      f"{len(self.stem)} stages do not halve to patch_size {self.patch_size}",
    )
    _check(
      len(self.stem_blocks) == len(self.stem)
      and all(n >= 0 for n in self.stem_blocks),
      "stem_blocks",
      f"needs one number a stage of stem {self.stem}, is {self.stem_blocks}",
    )

  @property
  def num_patches(self) -> int:
    """Image tokens besides the class token."""
    return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True, kw_only=True)
class TextConfig:
  """A transformer with learned positions.

  SCL, GLSCL, MaskVLM: RoBERTa's, post-norm. SyCoCa: CoCa's, pre-norm and
  causal, with the class token appended. CMAL: BERT's embeddings, whose blocks
  are `model.unimodal_layers`; it does not read `depth`.
  """

  vocab_size: int = 50265  # V; must equal the tokenizer's
  max_length: int = 50  # L, with both special tokens; CoCa's class token,
  # which is no token of the tokenizer, comes on top
  width: int = 768  # D
  depth: int = 12  # 0: the embeddings alone, a bag of words [choice]
  class_state: Literal["token", "mean"] = "token"  # mean: of the other valid
  # states takes the place of the first token's [choice]
  place_std: float | None = None  # of the position and type tables at random
  # initialisation; None: model.init_std [choice]
  embedding_norm: bool = True  # False: a word counts by the length of its
  # vector; those never trained shrink by optimizer.weight_decay [choice]
  num_positions: int = 514  # real tokens use rows 2, 3, ..; pads use row 1.
  # CoCa's use 0, 1, .. and the class token the last one; BERT's 0, 1, ..
  norm_eps: float = 1e-5
  dropout: float = 0.1

  def __post_init__(self):
    _check_positive(self, "vocab_size", "width", "norm_eps")
    _check_depth(self)
    if self.place_std is not None:
      _check_not_negative(self, "place_std")
    _check_ratio(self, "dropout")
    _check(self.max_length >= 3, "max_length", "needs room for 3 tokens")
    _check(
      self.width % HEAD_WIDTH == 0, "width", f"not a multiple of {HEAD_WIDTH}"
    )


@dataclass(frozen=True, kw_only=True)
class RegionConfig:
  """What a detector found in an image, in place of its pixels: CMAL."""

  number: int = 36  # R, slots of an image; those it does not fill are padding
  feature_width: int = 2048  # P, values of a region's feature
  num_classes: int = 1600  # of the detector, 1, 2, ..; 0 is the background

  def __post_init__(self):
    _check_positive(self, "number", "feature_width", "num_classes")


@dataclass(frozen=True, kw_only=True)
class FusionConfig:
  """How text and image meet.

  SCL, GLSCL (METER): co-attention, `depth` layers per stream. MaskVLM: stacks
  of cross-attention blocks, `image_depth`, `text_depth`, `decoder_depth`.
  SyCoCa: a caption decoder of `text_depth`, an image decoder of `image_depth`.
  CMAL: one stack of `depth` blocks over words and regions, all rows of them.
  """

  width: int = 768  # D
  depth: int = 6
  image_depth: int = 3  # of g_image, which completes images [uncertain]
  text_depth: int = 3  # of g_text, which completes texts [uncertain]
  decoder_depth: int = 3  # of the pixel decoder [paper]
  mim_text: bool = True  # SyCoCa's image decoder asks the text; False: it has
  # no cross-attention, as in the paper's ablation
  norm_eps: float = 1e-12
  dropout: float = 0.1
  restrict_last_layer: bool = True  # only rows a loss reads; exact

  def __post_init__(self):
    _check_positive(
      self,
      "width",
      "depth",
      "image_depth",
      "text_depth",
      "decoder_depth",
      "norm_eps",
    )
    _check_ratio(self, "dropout")
    _check(
      self.width % HEAD_WIDTH == 0, "width", f"not a multiple of {HEAD_WIDTH}"
    )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
  """All towers of a system."""

  vision: VisionConfig = field(default_factory=VisionConfig)
  text: TextConfig = field(default_factory=TextConfig)
  region: RegionConfig = field(default_factory=RegionConfig)
  fusion: FusionConfig = field(default_factory=FusionConfig)
  joint_width: int = 512  # E, of the contrastive space
  joint_projection: Literal["mlp", "linear", "matrix", "none"] = "mlp"  # into
  # that space; linear: one matrix and bias, as in MaskVLM; matrix: without
  # bias, as in CoCa; none: it is that of the class states, which SCL and GLSCL
  # transform before [choice]
  match_features: Literal["pooled", "product", "concat"] = "pooled"  # what ITM
  # reads of the two fused class states: pooled, in SCL and GLSCL; their product
  # [uncertain] or both side by side [choice], in MaskVLM
  unimodal_layers: tuple[int, int] = (0, 0)  # CMAL: blocks of regions and of
  # words by themselves, before the swap: none [code], some in the paper's text
  # [uncertain]
  init_std: float = 0.02  # text, fusion and heads
  zero_residual: bool = False  # encoders start as the identity: the last
  # matrix of each residual branch is 0 [choice]
  itc_temperature: float = 0.07  # initial value of the learned divisor, of ITC
  # and of WRC
  compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of products
  fused_attention: bool = False  # one kernel where the platform has one that
  # fits: cuDNN on GPU, splash on TPU; probabilities of attention are not
  # dropped then, on any platform, other states are [choice]. cuDNN may add up
  # gradients in another order each time: a resume is bit-equal with
  # XLA_FLAGS=--xla_gpu_deterministic_ops=true
  scan: bool = True  # one compiled body per stack of layers
  remat: Literal["none", "dots", "full"] = "full"  # what backward recomputes:
  # dots: all but the products with parameters

  def __post_init__(self):
    _check_positive(self, "joint_width", "init_std", "itc_temperature")
    _check(
      min(self.unimodal_layers) >= 0,
      "unimodal_layers",
      f"must not be negative, is {self.unimodal_layers}",
    )
    _check(
      self.joint_projection != "none" or self.joint_width == self.fusion.width,
      "joint_width",
      f"{self.joint_width}, but without a projection the contrastive space has "
      f"fusion.width {self.fusion.width}",
    )


@dataclass(frozen=True, kw_only=True)
class MaskingConfig:
  """How much of an input each masked view hides."""

  mlm_rate: float = 0.15  # share of real tokens
  mlm_scheme: Literal["801010", "all"] = "801010"
  mlm_whole_word: bool = False
  mlm_padded_draw: bool = False  # published code: draws over padding too
  completion_text_rate: float = 0.4  # T_40 of MGSC and MLTC
  text_mask_with_replacement: bool = False  # published code
  image_drop_ratio: float = 0.8  # I~80 of MGSC
  image_token_ratio: float = 0.3  # I~30 of MLTC
  image_block_ratio: float = 0.6  # of MIM: share of the blocks, rounded up
  image_block_size: int = 32  # of MIM, pixels a side: whole patches, 36 for
  # patches of 18
  # SyCoCa: all patches ordered by how much the caption speaks of them.
  split: Literal["attentive", "random"] = "attentive"  # random: in any order
  r_high: float = 0.5  # share that TG-MIM hides, from the top [paper]
  r_low: float = 0.5  # share that IC does without, from the bottom [paper]
  ic_mask: bool = True  # False: IC reads all patches, as in CoCa
  mim_mask_level: Literal["input", "feature"] = "input"  # where TG-MIM hides:
  # feature: where the encoder ends, without a second pass [choice]
  mask_warmup_steps: int = 0  # before them the order is random [choice]
  attentive_empty: Literal["random", "order"] = "random"  # captions without a
  # word: in any order [choice], or as patches are numbered
  # CMAL: anchors are a word and a region that name the same.
  anchors: Literal["found", "random"] = "found"  # random: as many pairs of any
  # word and region, the control
  anchor_match: Literal["phrase", "piece"] = "phrase"  # what may be a class's
  # name: up to three words with their plurals [choice], or one entry of the
  # vocabulary, which many classes have not [code]
  anchor_region: Literal["confident", "random"] = "confident"  # of those that
  # fit a word: the detector's surest [choice], or any [code]
  max_anchors: int = 8  # of a sample [choice]
  max_pairs: int = 32  # of WRC, of a sample [choice]
  swap: Literal["both", "text", "image", "none"] = "both"  # whose slots of
  # anchors get the other side's content, where AMC, MLM (text), MRC and MRFR
  # (image) ask for what was there [code: both of AMC]. none: AMC hides these
  # slots instead; MLM hides any words, MRC and MRFR any regions, as UNITER does
  swap_rescale: bool = False  # content comes as long as what it replaces
  # [choice]
  region_mask_rate: float = 0.25  # of the regions that are no anchors [code]

  def __post_init__(self):
    _check_not_negative(self, "mask_warmup_steps")
    _check_positive(self, "max_anchors", "max_pairs")
    _check_ratio(
      self,
      "r_high",
      "r_low",
      "mlm_rate",
      "completion_text_rate",
      "image_drop_ratio",
      "image_token_ratio",
      "image_block_ratio",
      "region_mask_rate",
    )
    _check_positive(self, "image_block_size")


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
  """Weights and constants of the losses. Weight 0 removes the passes too.

  Which of them a system has: SYSTEM_OBJECTIVES.
  """

  mlm: float = 1.0
  itm: float = 1.0
  itc: float = 1.0
  mgsc_image: float = 1.0
  mgsc_text: float = 1.0
  mltc_image: float = 0.2
  mltc_text: float = 0.2
  mim: float = 0.0
  mim_loss: Literal["l1", "l2"] = "l1"  # of a pixel value; of TG-MIM too
  mim_patch_norm: bool = False  # targets with mean 0 and variance 1 a patch
  ic: float = 0.0
  tg_mim: float = 0.0
  amc: float = 0.0
  amc_pair: float = 0.0  # within AMC: of the contrast of an anchor's word and
  # region over the batch [choice]
  amc_pair_group: int = 128  # samples whose anchors are contrasted [choice]
  wrc: float = 0.0
  mrc: float = 0.0
  mrfr: float = 0.0
  task_mix: Literal["sum", "sample"] = "sum"  # sample: a step has one of the
  # objectives, drawn by weight [code of CMAL]. There sum is their mean by
  # weight [choice]
  completion_temperature: float = 0.03  # fixed, MGSC and MLTC
  completion_targets: Literal["partner_masked", "clean"] = "partner_masked"
  # where one modality is complete: in the pass that masks the other [code], or
  # in a pass of its own that masks none [choice]
  same_image: Literal["none", "ignore", "positive"] = "ignore"  # other pairs
  # that show the same (data.identity): negatives like all [code], left out, or
  # positives too, except of MLTC [choice]
  itm_negatives: Literal["in_batch", "hard", "dataset"] = "in_batch"  # false
  # images: another one of the group [choice], there by ITC similarity
  # (ALBEF), or any of the training set, even a true one [code]. MaskVLM draws
  # false texts too, from the batch
  neg_group: int = 16  # samples of one ITM group, half of them true; a GPU's
  # batch in [code]
  text_mgsc_group: int | None = None  # samples contrasted; None: the whole
  # batch, as in MGSC image [choice]; 16, a GPU's batch [code]
  mltc_image_group: int = 16  # samples whose patches are contrasted: a GPU's
  # batch in [code]; of the global batch here [choice]
  mltc_text_group: int = 128  # samples whose words are contrasted: the
  # micro-batch in [code]; of the global batch here [choice]
  share_text_dropout: bool = True  # one draw of T for all passes that read it
  # [choice]; False: a draw a pass [code]
  itc_temperature_range: tuple[float, float] | None = (0.001, 0.5)
  contrast_grad_scale: float = 1.0  # published code on W devices: 1 / W
  contrast_block: int = 1024  # rows and columns of the similarities that a
  # device holds at once; changes no value. Batches up to it are one block, and
  # smaller ones are no faster (docs/scaling.md) [choice]

  @property
  def active(self) -> tuple[str, ...]:
    """Objectives with a weight above 0, in a fixed order."""
    return tuple(name for name in OBJECTIVES if getattr(self, name) > 0)

  def __post_init__(self):
    _check_not_negative(self, *OBJECTIVES)
    _check(
      bool(self.active),
      "*",
      "every weight is 0: nothing to train",
    )
    _check_positive(
      self,
      "completion_temperature",
      "neg_group",
      "mltc_image_group",
      "mltc_text_group",
      "amc_pair_group",
      "contrast_grad_scale",
      "contrast_block",
    )
    _check_not_negative(self, "amc_pair")
    if self.text_mgsc_group is not None:
      _check_positive(self, "text_mgsc_group")
    if self.itc_temperature_range is not None:
      low, high = self.itc_temperature_range
      _check(
        0 < low <= high,
        "itc_temperature_range",
        f"needs 0 < low <= high, is {low, high}",
      )
    _check(
      self.itm_negatives != "hard" or self.itc > 0 or self.itm == 0,
      "itm_negatives",
      "'hard' draws by ITC similarity and needs itc > 0",
    )


SYSTEM_OBJECTIVES = {
  "glscl": (
    "mlm",
    "itm",
    "itc",
    "mgsc_image",
    "mgsc_text",
    "mltc_image",
    "mltc_text",
  ),
  "maskvlm": ("mlm", "mim", "itc", "itm"),
  "sycoca": ("itc", "ic", "tg_mim"),
  "cmal": ("amc", "wrc", "itm", "mlm", "mrc", "mrfr"),
}
# Groups of samples, and the objective that reads each.
GROUPS = {
  "neg_group": "itm",
  "mltc_image_group": "mltc_image",
  "mltc_text_group": "mltc_text",
  "text_mgsc_group": "mgsc_text",
  "amc_pair_group": "amc_pair",
}
# Fields that only these systems read: elsewhere they keep their defaults.
READ_BY = {
  "model.fusion.depth": ("glscl", "cmal"),
  "model.fusion.image_depth": ("maskvlm", "sycoca"),
  "model.fusion.text_depth": ("maskvlm", "sycoca"),
  "model.fusion.decoder_depth": ("maskvlm",),
  "model.fusion.mim_text": ("sycoca",),
  "masking.completion_text_rate": ("glscl",),
  "masking.text_mask_with_replacement": ("glscl",),
  "masking.image_drop_ratio": ("glscl",),
  "masking.image_token_ratio": ("glscl",),
  "masking.image_block_ratio": ("maskvlm",),
  "masking.image_block_size": ("maskvlm",),
  "masking.split": ("sycoca",),
  "masking.r_high": ("sycoca",),
  "masking.r_low": ("sycoca",),
  "masking.ic_mask": ("sycoca",),
  "masking.mim_mask_level": ("sycoca",),
  "masking.mask_warmup_steps": ("sycoca",),
  "masking.attentive_empty": ("sycoca",),
  "model.region.number": ("cmal",),
  "model.region.feature_width": ("cmal",),
  "model.region.num_classes": ("cmal",),
  "model.unimodal_layers": ("cmal",),
  "masking.anchors": ("cmal",),
  "masking.anchor_match": ("cmal",),
  "masking.anchor_region": ("cmal",),
  "masking.max_anchors": ("cmal",),
  "masking.max_pairs": ("cmal",),
  "masking.swap": ("cmal",),
  "masking.swap_rescale": ("cmal",),
  "masking.region_mask_rate": ("cmal",),
  "objectives.amc_pair": ("cmal",),
  "objectives.amc_pair_group": ("cmal",),
}
# Rows of the text's position table besides those of the tokens: RoBERTa's two
# first ones, the class token of CoCa.
SPARE_POSITIONS = {"glscl": 2, "maskvlm": 2, "sycoca": 1, "cmal": 0}
OBJECTIVES = tuple(
  dict.fromkeys(name for own in SYSTEM_OBJECTIVES.values() for name in own)
)


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
  """Training-time image augmentation; evaluation only resizes."""

  crop_scale: tuple[float, float] = (0.8, 1.0)  # area of the random crop
  crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height
  hflip: Literal["off", "guarded", "always"] = "guarded"  # guarded: not when
  # the caption says left or right
  randaugment_ops: int = 0  # operations an image
  randaugment_magnitude: float = 9.0  # of 30
  color: bool = True  # False drops the colour operations
  resize: Literal["pillow", "opencv"] = "pillow"  # opencv: faster, and not
  # antialiased where a side hardly shrinks [choice]
  warp: float = 0.0  # up to 2; strength of a random affine map that takes the
  # place of the crop; for drawings, 0: none [choice]
  recolor: float = 0.0  # up to 1; deviation of a random mix of the three
  # colours, for drawings, 0: none [choice]
  phrases: Literal["all", "subset"] = "all"  # subset: of a caption's parts
  # between colons and commas a random number, in random order

  def __post_init__(self):
    for name in ("crop_scale", "crop_ratio"):
      low, high = getattr(self, name)
      _check(0 < low <= high, name, f"needs 0 < low <= high, is {low, high}")
    _check(self.crop_scale[1] <= 1, "crop_scale", "must not exceed 1")
    _check_not_negative(
      self, "randaugment_ops", "randaugment_magnitude", "warp", "recolor"
    )
    _check(
      self.randaugment_magnitude <= 30, "randaugment_magnitude", "at most 30"
    )
    # Stronger warps shrink the window to nothing or mirror it.
    _check(self.warp <= 2, "warp", f"must not exceed 2, is {self.warp}")
    _check(
      self.recolor <= 1, "recolor", f"must not exceed 1, is {self.recolor}"
    )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
  """Where the pairs come from and how they become batches."""

  dir: str = ""  # made by launch/prepare.py; empty is an error at start
  tokenizer: str = ""  # .model (sentencepiece) or .json (tokenizers); empty:
  # the one in `dir`
  train_split: str = "train"
  batch_size: int = 4096  # B, over all processes
  seed: int = 0
  text_lengths: tuple[int, ...] = ()  # in tokens, rising, below
  # model.text.max_length: a batch has pairs whose texts fit the same one of
  # these and holds no more; each is a compiled step of its own. Empty: all
  # batches hold max_length, any pairs [choice]
  num_workers: int = 0  # grain processes; 0: threads of this process
  num_threads: int = 2
  prefetch: int = 4  # batches
  max_bad_share: float = 0.001  # of rows read; more fails the run
  identity: Literal["image", "caption"] = "image"  # which pairs show the same,
  # as objectives.same_image and ITM's negatives take it: image: those of one
  # image; caption: also those whose records share their first caption that is
  # not blank, several pictures of one thing [choice]
  mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
  std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
  augment: AugmentConfig = field(default_factory=AugmentConfig)

  def __post_init__(self):
    _check_positive(self, "batch_size", "num_threads", "prefetch")
    _check_not_negative(self, "num_workers", "seed")
    _check(
      list(self.text_lengths) == sorted(set(self.text_lengths)),
      "text_lengths",
      f"must rise, is {self.text_lengths}",
    )
    _check(0 <= self.max_bad_share <= 1, "max_bad_share", "must be in [0, 1]")
    _check(min(self.std) > 0, "std", "must be positive")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
  """AdamW, its published variant, or Muon; part by part a multiplier.

  The rate warms up, then decays, linearly or as a cosine.
  """

  learning_rate: float = 2e-5  # peak, of the encoders
  schedule: Literal["linear", "cosine"] = "linear"  # after the warm-up
  warmup_fraction: float = 0.1  # of all steps
  final_fraction: float = 0.0  # of the peak: where the decay ends
  beta1: float = 0.9  # beta1, beta2 and eps are Adam's
  beta2: float = 0.98
  eps: float = 1e-8
  weight_decay: float = 0.01
  clip_norm: float | None = None  # global gradient norm; None: no clipping
  fusion_multiplier: float = 5.0  # transforms, fusion layers, poolers
  head_multiplier: float = 5.0  # MLM and ITM heads
  decay_norms: bool = False  # published code decays some norms by accident
  variant: Literal["standard", "hf", "muon"] = "standard"  # hf: published
  # AdamW order; muon: orthogonalized momentum for matrices
  muon_rms: float = 0.2  # of a matrix's update over the learning rate
  muon_beta: float = 0.95  # of the matrices' momentum (Jordan et al., 2024)
  max_skips: int = 10  # non-finite steps before the run fails

  def __post_init__(self):
    _check_positive(self, "learning_rate", "eps", "max_skips", "muon_rms")
    _check_not_negative(
      self, "weight_decay", "fusion_multiplier", "head_multiplier"
    )
    _check_ratio(
      self,
      "warmup_fraction",
      "final_fraction",
      "beta1",
      "beta2",
      "muon_beta",
    )
    if self.clip_norm is not None:
      _check_positive(self, "clip_norm")


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
  """Devices along each axis; -1 takes what is left."""

  data: int = -1  # batch only
  fsdp: int = 1  # batch and parameters
  tensor: int = 1  # heads and mlp

  def __post_init__(self):
    sizes = (self.data, self.fsdp, self.tensor)
    _check(
      all(n == -1 or n > 0 for n in sizes), "*", "sizes are positive or -1"
    )
    _check(sizes.count(-1) <= 1, "*", "at most one axis may be -1")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
  """Length of the run and its rhythm, all in optimizer steps."""

  num_steps: int = 100_000
  accumulate: int = 1  # micro-batches of a step, one in memory at a time
  seed: int = 0  # parameters, dropout, in-batch negatives
  init_from: str = ""  # work dir or export whose parameters start this run
  log_every: int = 50
  save_every: int = 1000
  eval_every: int = 0  # retrieval on `eval_splits`; 0: never
  eval_splits: tuple[str, ...] = ()  # validation only: picks keep-best
  keep_last: int = 2
  keep_best: int = 1
  profile_steps: int = 0  # traced after step 10 into workdir/profile
  wandb: bool = False

  def __post_init__(self):
    _check_positive(
      self, "num_steps", "accumulate", "log_every", "save_every", "keep_last"
    )
    _check_not_negative(
      self, "seed", "eval_every", "keep_best", "profile_steps"
    )
    _check(self.seed < 2**31, "seed", "must be less than 2^31")
    _check(
      not any(_names_test(name) for name in self.eval_splits),
      "eval_splits",
      "a test split must not pick a checkpoint",
    )

  @property
  def validation_splits(self) -> tuple[str, ...]:
    """The splits whose recalls pick the best checkpoint; none if never."""
    return self.eval_splits if self.eval_every else ()


@dataclass(frozen=True, kw_only=True)
class Config:
  """One run."""

  system: Literal["glscl", "maskvlm", "sycoca", "cmal"] = "glscl"
  model: ModelConfig = field(default_factory=ModelConfig)
  masking: MaskingConfig = field(default_factory=MaskingConfig)
  objectives: ObjectiveConfig = field(default_factory=ObjectiveConfig)
  data: DataConfig = field(default_factory=DataConfig)
  optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
  mesh: MeshConfig = field(default_factory=MeshConfig)
  train: TrainConfig = field(default_factory=TrainConfig)

  def __post_init__(self):
    batch = self.data.batch_size
    for name, objective in GROUPS.items():
      if getattr(self.objectives, objective) == 0:
        continue
      group = min(getattr(self.objectives, name) or batch, batch)
      _check(
        batch % group == 0,
        f"objectives.{name}",
        f"{group} does not divide data.batch_size {batch}",
      )
    longest = self.model.text.max_length
    _check(
      all(3 <= n < longest for n in self.data.text_lengths),
      "data.text_lengths",
      f"{self.data.text_lengths} are not all from 3 to below "
      f"model.text.max_length {longest}",
    )
    _check(
      self.data.train_split not in self.train.eval_splits,
      "train.eval_splits",
      f"data.train_split {self.data.train_split!r} must not pick a checkpoint",
    )
    if self.objectives.itc_temperature_range is not None:
      low, high = self.objectives.itc_temperature_range
      _check(
        low <= self.model.itc_temperature <= high,
        "model.itc_temperature",
        f"{self.model.itc_temperature} is outside of"
        f" objectives.itc_temperature_range {low, high}",
      )
    _check_system(self)
    if self.objectives.mim > 0:
      _check_blocks(self.model.vision, self.masking.image_block_size)


def at_length(config: Config, length: int) -> Config:
  """The recipe of a step whose texts have `length` tokens, with padding."""
  text = dataclasses.replace(config.model.text, max_length=length)
  return dataclasses.replace(
    config,
    model=dataclasses.replace(config.model, text=text),
    data=dataclasses.replace(config.data, text_lengths=()),
  )


def _check_system(config: Config) -> None:
  """What only some systems have must not be asked of the others."""
  own = SYSTEM_OBJECTIVES[config.system]
  for name in config.objectives.active:
    _check(
      name in own,
      f"objectives.{name}",
      f"{getattr(config.objectives, name):g}, but the objectives of system"
      f" {config.system!r} are {', '.join(own)}; set it to 0",
    )
  features = {
    "glscl": ("pooled",),
    "maskvlm": ("product", "concat"),
    "sycoca": ("pooled",),  # matches no pairs
    "cmal": ("pooled",),
  }
  _check(
    config.model.match_features in features[config.system],
    "model.match_features",
    f"{config.model.match_features!r}, but system {config.system!r} knows"
    f" {', '.join(features[config.system])}",
  )
  _check_read(config)
  text, spare = config.model.text, SPARE_POSITIONS[config.system]
  needed = text.max_length + spare
  _check(
    text.num_positions >= needed,
    "model.text.num_positions",
    f"must be at least max_length + {spare} = {needed}",
  )
  _check(
    config.objectives.task_mix == "sum" or config.system == "cmal",
    "objectives.task_mix",
    f"'sample', but system {config.system!r} knows 'sum' only",
  )
  if config.system == "maskvlm":
    _check_widths(config, "vision", "text")
    _check_maskvlm(config)
  if config.system == "sycoca":
    _check_widths(config, "vision", "text")
    _check_sycoca(config)
  if config.system == "cmal":
    _check_widths(config, "text")
    _check_cmal(config)


def _check_read(config: Config) -> None:
  """A value that nothing reads would be a mistake without a message."""
  for path, systems in READ_BY.items():
    *parents, name = path.split(".")
    section = config
    for parent in parents:
      section = getattr(section, parent)
    value, default = getattr(section, name), getattr(type(section)(), name)
    _check(
      config.system in systems or value == default,
      path,
      f"{value!r}, but system {config.system!r} does not read it: leave it at"
      f" {default!r}",
    )


def _check_widths(config: Config, *names: str) -> None:
  """Encoders that meet without a transform."""
  model = config.model
  for name in names:
    width = getattr(model, name).width
    _check(
      width == model.fusion.width,
      f"model.{name}.width",
      f"{width}, but system {config.system!r} needs fusion.width"
      f" {model.fusion.width}",
    )


def _check_maskvlm(config: Config) -> None:
  """It draws pairs from the batch."""
  _check(
    config.objectives.share_text_dropout,
    "objectives.share_text_dropout",
    "False, but system 'maskvlm' encodes each text once",
  )
  _check(
    config.objectives.itm_negatives != "dataset",
    "objectives.itm_negatives",
    "'dataset', but system 'maskvlm' knows in_batch, hard",
  )


def _check_sycoca(config: Config) -> None:
  """Its towers are CoCa's; ITC's space orders the patches."""
  model, masking, objectives = config.model, config.masking, config.objectives
  for path, value, only in (
    ("model.text.dropout", model.text.dropout, 0.0),
    ("model.fusion.dropout", model.fusion.dropout, 0.0),
    ("model.text.embedding_norm", model.text.embedding_norm, False),
    ("model.text.class_state", model.text.class_state, "token"),
  ):
    _check(
      value == only, path, f"{value!r}, but system 'sycoca' knows {only!r} only"
    )
  masks_ic = objectives.ic > 0 and masking.ic_mask
  _check(
    masking.split == "random"
    or objectives.itc > 0
    or not (masks_ic or objectives.tg_mim > 0),
    "masking.split",
    "'attentive' orders patches by ITC similarity and needs objectives.itc > 0",
  )
  num_patches = model.vision.num_patches
  _check(
    objectives.tg_mim == 0 or masking.r_high * num_patches >= 0.5,
    "masking.r_high",
    f"{masking.r_high} of {num_patches} patches is none to predict",
  )
  _check(
    not masks_ic or (1 - masking.r_low) * num_patches > 0.5,
    "masking.r_low",
    f"{masking.r_low} of {num_patches} patches leaves none to describe",
  )


def _check_cmal(config: Config) -> None:
  """Its text side is BERT's table of words; false images are of the batch."""
  text, objectives = config.model.text, config.objectives
  for path, value, only in (
    ("model.text.embedding_norm", text.embedding_norm, True),
    ("model.text.class_state", text.class_state, "token"),
    ("objectives.itm_negatives", objectives.itm_negatives, "in_batch"),
  ):
    _check(
      value == only, path, f"{value!r}, but system 'cmal' knows {only!r} only"
    )
  _check(
    objectives.amc_pair == 0 or objectives.amc > 0,
    "objectives.amc_pair",
    f"{objectives.amc_pair:g} is within AMC and needs objectives.amc > 0",
  )
  mask = config.masking
  swaps_words = objectives.mlm > 0 and mask.swap in ("both", "text")
  if objectives.amc == 0 and not swaps_words:
    return
  for name, only in (
    ("mlm_scheme", "801010"),
    ("mlm_whole_word", False),
    ("mlm_padded_draw", False),
  ):
    value = getattr(mask, name)
    _check(
      value == only,
      f"masking.{name}",
      f"{value!r}, but around anchors system 'cmal' knows {only!r} only",
    )


def _check_blocks(vision: VisionConfig, block_size: int) -> None:
  """MIM hides square blocks of whole patches that tile the image."""
  name = "masking.image_block_size"
  _check(
    block_size % vision.patch_size == 0,
    name,
    f"{block_size} is no multiple of model.vision.patch_size"
    f" {vision.patch_size}",
  )
  _check(
    vision.image_size % block_size == 0,
    name,
    f"{block_size} does not divide model.vision.image_size {vision.image_size}",
  )


def maskvlm_defaults() -> Config:
  """MaskVLM at the paper's size; the fields' own defaults are GLSCL's."""
  weights = {
    name: 1.0 if name in SYSTEM_OBJECTIVES["maskvlm"] else 0.0  # [paper]
    for name in OBJECTIVES
  }
  return Config(
    system="maskvlm",
    model=ModelConfig(
      vision=VisionConfig(  # ImageNet's ViT-B/16
        image_size=224,  # [uncertain], may be 256
        depth=12,
        activation="gelu",
        norm_eps=1e-6,
        patch_bias=True,
        ln_pre=False,
        init="truncated",
        mask_token_std=0.02,  # [choice]
      ),
      joint_projection="linear",
      joint_width=256,  # [choice]
      match_features="product",  # [uncertain]
    ),
    masking=MaskingConfig(mlm_rate=0.3),  # [paper]; its scheme is [uncertain]
    objectives=ObjectiveConfig(
      itm_negatives="hard",
      neg_group=32,  # [choice]: 512 over 16 devices
      **weights,
    ),
    data=DataConfig(
      batch_size=512,  # [uncertain]
      mean=(0.485, 0.456, 0.406),  # ImageNet's
      std=(0.229, 0.224, 0.225),
      # No colour operations: pixels are the target of MIM [choice].
      augment=AugmentConfig(randaugment_ops=2, color=False),
    ),
    optimizer=OptimizerConfig(
      learning_rate=1e-5,  # of the encoders [uncertain]
      fusion_multiplier=30.0,  # 3e-4 for stacks, decoder and heads [uncertain]
      head_multiplier=30.0,
      schedule="cosine",
      final_fraction=0.1,  # down to 3e-5 [uncertain]
      weight_decay=0.05,  # [uncertain]
      beta2=0.999,  # [choice]
    ),
  )


def sycoca_defaults() -> Config:
  """SyCoCa at the paper's size; the fields' own defaults are GLSCL's.

  CoCa: `objectives.tg_mim` 0 and `masking.ic_mask` off. CLIP: `objectives.ic`
  0 too.
  """
  weights = {name: 0.0 for name in OBJECTIVES}
  return Config(
    system="sycoca",
    model=ModelConfig(
      vision=VisionConfig(  # ViT-B/18 of open_clip's CoCa
        image_size=288,  # [uncertain]
        patch_size=18,
        depth=12,
        activation="gelu",
        init="coca",
        mask_token_std=0.02,  # [choice]
      ),
      text=TextConfig(  # open_clip's
        vocab_size=49408,
        max_length=76,
        num_positions=77,
        place_std=0.01,
        embedding_norm=False,
        dropout=0.0,
      ),
      fusion=FusionConfig(
        text_depth=12,  # of the caption decoder, open_clip's
        image_depth=4,  # of the image decoder [choice]
        norm_eps=1e-5,
        dropout=0.0,
      ),
      joint_projection="matrix",
      joint_width=512,
    ),
    objectives=ObjectiveConfig(
      **weights | {"itc": 1.0, "ic": 2.0, "tg_mim": 1.0},  # [paper]
      mim_loss="l2",  # [choice]; of pixels [paper]
      mim_patch_norm=True,  # [choice]
      itc_temperature_range=(0.01, 1.0),  # open_clip's
    ),
    data=DataConfig(
      batch_size=2048,  # [paper]
      augment=AugmentConfig(crop_scale=(0.9, 1.0), hflip="off"),  # [choice]
    ),
    optimizer=OptimizerConfig(  # [choice]
      learning_rate=5e-4,
      fusion_multiplier=1.0,
      head_multiplier=1.0,
      schedule="cosine",
      weight_decay=0.2,
      eps=1e-6,
    ),
  )


def cmal_defaults() -> Config:
  """CMAL at the paper's size; the fields' own defaults are GLSCL's.

  UNITER: `masking.swap` none, and the objectives itm, mlm and mrc.
  """
  weights = {name: 0.0 for name in OBJECTIVES}
  return Config(
    system="cmal",
    model=ModelConfig(
      text=TextConfig(  # BERT-base-cased
        vocab_size=28996,
        max_length=62,  # 60 and both special tokens [code]
        num_positions=512,
        norm_eps=1e-12,
      ),
      fusion=FusionConfig(depth=12),
    ),
    objectives=ObjectiveConfig(
      **weights | {"amc": 3.0, "wrc": 2.0, "itm": 1.0},  # [code]
      task_mix="sample",
    ),
    data=DataConfig(batch_size=1280),  # [choice]: batches of equally many
    # tokens, about 1300 pairs, in [code]
    optimizer=OptimizerConfig(  # [code]
      learning_rate=5e-5,
      fusion_multiplier=1.0,
      head_multiplier=1.0,
      clip_norm=5.0,
    ),
  )


def to_config_dict(config: Any) -> ml_collections.ConfigDict:
  """Turns a dataclass tree into a ConfigDict that `configs/` may change."""
  hints = typing.get_type_hints(type(config))
  tree = ml_collections.ConfigDict(type_safe=False)
  for item in dataclasses.fields(config):
    value = getattr(config, item.name)
    if dataclasses.is_dataclass(value):
      value = to_config_dict(value)
    elif value is None:
      # A bare None has no type, so the command line could not override it.
      value = ml_collections.config_dict.placeholder(_present(hints[item.name]))
    tree[item.name] = value
  return tree


def _present(optional: Any) -> type:
  """The class behind `X | None`."""
  kind = next(
    arg for arg in typing.get_args(optional) if arg is not types.NoneType
  )
  return typing.get_origin(kind) or kind


def from_config_dict(tree: Mapping[str, Any], cls: type = Config) -> Any:
  """Builds `cls` from a mapping; every mistake names its path.

  Raises:
    ConfigError: an unknown key (with the nearest name), a wrong type, a value
      out of range, or values that contradict each other.
  """
  return _build(tree, cls, "config")


def _build(tree: Mapping[str, Any], cls: type, path: str) -> Any:
  hints = typing.get_type_hints(cls)
  names = [item.name for item in dataclasses.fields(cls)]
  for key in tree:
    if key not in names:
      near = difflib.get_close_matches(key, names, n=1)
      hint = f"; did you mean {path}.{near[0]}?" if near else f" of {names}"
      raise ConfigError(f"{path}.{key}: unknown key{hint}")
  values = {
    name: _convert(tree[name], hints[name], f"{path}.{name}")
    for name in names
    if name in tree
  }
  try:
    return cls(**values)
  except ConfigError as error:
    raise ConfigError(f"{path}.{error}") from None


def _convert(value: Any, hint: Any, path: str) -> Any:
  """Converts one value strictly: bool is not int, int widens to float."""
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if dataclasses.is_dataclass(hint):
    if not isinstance(value, Mapping | ml_collections.ConfigDict):
      raise ConfigError(f"{path}: expected a section, got {value!r}")
    return _build(value, hint, path)
  if origin in (types.UnionType, typing.Union):
    kind = next(arg for arg in args if arg is not types.NoneType)
    # A flag that holds a tuple reads the word None as (None,).
    if value is None or value == (None,):
      return None
    return _convert(value, kind, path)
  if origin is Literal:
    if value not in args:
      near = difflib.get_close_matches(str(value), list(map(str, args)), n=1)
      hint_text = f"; did you mean {near[0]!r}?" if near else ""
      raise ConfigError(f"{path}: {value!r} is not one of {args}{hint_text}")
    return value
  if origin is tuple:
    if not isinstance(value, list | tuple):
      raise ConfigError(f"{path}: expected a tuple, got {value!r}")
    kinds = (
      [args[0]] * len(value) if len(args) == 2 and args[1] is ... else args
    )
    if len(kinds) != len(value):
      raise ConfigError(f"{path}: expected {len(kinds)} values, got {value!r}")
    return tuple(
      _convert(v, kind, f"{path}[{i}]")
      for i, (v, kind) in enumerate(zip(value, kinds, strict=True))
    )
  if hint is float and type(value) is int:
    return float(value)
  if type(value) is not hint:
    raise ConfigError(
      f"{path}: expected {hint.__name__}, got {type(value).__name__} {value!r}"
    )
  return value


def to_json(config: Any) -> str:
  """The whole configuration as sorted, indented JSON."""
  return json.dumps(dataclasses.asdict(config), indent=2, sort_keys=True)


def from_json(text: str) -> Config:
  """Reads what `to_json` wrote, with the same checks as the launcher."""
  return from_config_dict(json.loads(text))


def sha256(config: Any) -> str:
  """A fingerprint for result files."""
  return hashlib.sha256(to_json(config).encode()).hexdigest()
