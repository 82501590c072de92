"""GLSCL as it was published, step and images, in plain PyTorch: to be beaten.

Every objective encodes and fuses what it reads by itself: 6 image and 6 text
encodings, 5 fusion passes, the vocabulary on every position. Parameters, batch
and objectives are those of the recipe, but that other pictures of one thing are
negatives here. Attention is PyTorch's `scaled_dot_product_attention`. Images
are read by Pillow in the processes of a DataLoader.
"""

from __future__ import annotations

import dataclasses
import io
import itertools
import time
from collections.abc import Mapping

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from glscl_jax import config as config_lib
from glscl_jax import errors
from glscl_jax.data import sources, transforms
from glscl_jax.train import metrics

PRECISIONS = ("float32", "bfloat16")  # the second by autocast
IMAGES_PER_BATCH = 16  # of the images alone: 16 MB a batch at 288 px


class Attention(nn.Module):
  """Heads of 64, all maps with biases."""

  def __init__(self, width: int, dropout: float):
    super().__init__()
    self.query, self.key, self.value, self.out = (
      nn.Linear(width, width) for _ in range(4)
    )
    self.dropout = dropout

  def forward(self, x_BLD, context_BMD, mask_B11M=None):
    def heads(x):
      split = x.view(*x.shape[:2], -1, config_lib.HEAD_WIDTH)
      return split.transpose(1, 2)

    mixed = F.scaled_dot_product_attention(
      heads(self.query(x_BLD)),
      heads(self.key(context_BMD)),
      heads(self.value(context_BMD)),
      attn_mask=mask_B11M,
      dropout_p=self.dropout,
    )
    return self.out(mixed.transpose(1, 2).reshape(x_BLD.shape))


def mlp(width: int) -> nn.Module:
  """W2 gelu(W1 x) with hidden width 4 D."""
  return nn.Sequential(
    nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
  )


class Block(nn.Module):
  """Self-attention, cross-attention if asked for, MLP; pre- or post-norm."""

  def __init__(self, width: int, dropout: float, *, pre: bool, cross: bool):
    super().__init__()
    self.attention = Attention(width, dropout)
    self.cross = Attention(width, dropout) if cross else None
    self.mlp = mlp(width)
    self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 + cross))
    self.drop, self.pre = nn.Dropout(dropout), pre

  def forward(self, x, mask=None, context=None, context_mask=None):
    if self.pre:
      h = self.norms[0](x)
      x = x + self.attention(h, h, mask)
      return x + self.mlp(self.norms[1](x))
    x = self.norms[0](x + self.drop(self.attention(x, x, mask)))
    if self.cross is not None:
      x = self.norms[2](x + self.drop(self.cross(x, context, context_mask)))
    return self.norms[1](x + self.drop(self.mlp(x)))


def joint_projection(width: int, joint_width: int) -> nn.Module:
  """The projection of ITC."""
  return nn.Sequential(
    nn.Linear(width, width),
    nn.LayerNorm(width),
    nn.GELU(),
    nn.Linear(width, joint_width),
  )


class Model(nn.Module):
  """Both encoders, the co-attention, the heads."""

  def __init__(self, config: config_lib.ModelConfig):
    super().__init__()
    vision, text, fusion = config.vision, config.text, config.fusion
    width = vision.width
    self.patches = nn.Conv2d(
      3, width, vision.patch_size, vision.patch_size, bias=False
    )
    self.class_token = nn.Parameter(torch.zeros(width))
    self.mask_token = nn.Parameter(torch.zeros(width))
    self.places = nn.Parameter(torch.zeros(1 + vision.num_patches, width))
    self.vision_norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
    self.vision = nn.ModuleList(
      Block(width, 0.0, pre=True, cross=False) for _ in range(vision.depth)
    )
    self.words = nn.Embedding(text.vocab_size, text.width)
    self.word_places = nn.Embedding(text.num_positions, text.width)
    self.word_norm = nn.LayerNorm(text.width)
    self.drop = nn.Dropout(text.dropout)
    self.text = nn.ModuleList(
      Block(text.width, text.dropout, pre=False, cross=False)
      for _ in range(text.depth)
    )
    self.to_fusion = nn.ModuleList(
      nn.Linear(w, fusion.width) for w in (width, text.width)
    )
    self.image_stream, self.text_stream = (
      nn.ModuleList(
        Block(fusion.width, fusion.dropout, pre=False, cross=True)
        for _ in range(fusion.depth)
      )
      for _ in range(2)
    )
    self.poolers = nn.ModuleList(
      nn.Linear(fusion.width, fusion.width) for _ in range(2)
    )
    self.match = nn.Linear(2 * fusion.width, 2)
    self.vocabulary = nn.Sequential(
      nn.Linear(fusion.width, fusion.width),
      nn.GELU(),
      nn.LayerNorm(fusion.width),
      nn.Linear(fusion.width, text.vocab_size),
    )
    self.joint = nn.ModuleList(
      joint_projection(fusion.width, config.joint_width) for _ in range(2)
    )
    self.temperature = nn.Parameter(torch.tensor(config.itc_temperature))

  def encode_image(self, image_BCYX, *, keep_BI=None, hide_BI=None):
    """All patches, or some dropped, or some replaced by the mask token."""
    x = self.patches(image_BCYX).flatten(2).transpose(1, 2)
    if hide_BI is not None:
      hidden = torch.zeros(x.shape[:2], dtype=torch.bool).scatter(
        1, hide_BI, True
      )
      x = torch.where(hidden[..., None], self.mask_token, x)
    x = x + self.places[1:]
    if keep_BI is not None:
      x = x.gather(1, keep_BI[..., None].expand(-1, -1, x.shape[-1]))
    first = (self.class_token + self.places[0]).expand(len(x), 1, -1)
    x = self.vision_norms[0](torch.cat([first.to(x.dtype), x], 1))
    for block in self.vision:
      x = block(x)
    return self.to_fusion[0](self.vision_norms[1](x))

  def encode_text(self, ids_BT, mask):
    """Token states of the fusion's width."""
    places = torch.arange(2, 2 + ids_BT.shape[1])
    x = self.drop(self.word_norm(self.words(ids_BT) + self.word_places(places)))
    for block in self.text:
      x = block(x, mask)
    return self.to_fusion[1](x)

  def fuse(self, text, image, mask):
    """Both streams through all layers."""
    pairs = zip(self.text_stream, self.image_stream, strict=True)
    for text_layer, image_layer in pairs:
      text, image = (
        text_layer(text, mask, image, None),
        image_layer(image, None, text, mask),
      )
    return text, image


def contrast(query, key, temperature, group=None):
  """Symmetric InfoNCE of matching rows, the sum of both directions.

  `group`: consecutive rows that meet; losses of groups are averaged.
  """
  if group is not None and group < len(query):
    both = zip(query.split(group), key.split(group), strict=True)
    return torch.stack([contrast(q, k, temperature) for q, k in both]).mean()
  logits = F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).T / temperature
  target = torch.arange(len(logits))
  return F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)


def rows(x_BLD, index_BJ):
  """The rows asked for, those of all samples in one list."""
  index = index_BJ[..., None].expand(-1, -1, x_BLD.shape[-1])
  return x_BLD.gather(1, index).flatten(0, 1)


def losses(
  model: Model, batch: Mapping[str, torch.Tensor], config: config_lib.Config
) -> dict[str, torch.Tensor]:
  """Each active objective by passes of its own."""
  weights, found = config.objectives, {}
  tau = weights.completion_temperature
  valid = batch["text_valid_BT"]
  mask = valid[:, None, None, :]
  mean, std = (
    torch.tensor(value)[:, None, None]
    for value in (config.data.mean, config.data.std)
  )
  image = (batch["image_BYXC"].permute(0, 3, 1, 2) / 255 - mean) / std
  ids = batch["text_ids_BT"]

  def fuse(ids, image, **options):
    return model.fuse(
      model.encode_text(ids, mask), model.encode_image(image, **options), mask
    )

  active = set(weights.active)
  if "itc" in active:
    text, complete = model.encode_text(ids, mask), model.encode_image(image)
    found["itc"] = 0.5 * contrast(
      model.joint[1](text[:, 0]),
      model.joint[0](complete[:, 0]),
      model.temperature,
    )
  if "mlm" in active:
    text, _ = fuse(batch["mlm_ids_BT"], image)
    labels = torch.full_like(ids, -100).scatter(
      1,
      batch["mlm_pos_BJ"],
      torch.where(batch["mlm_ok_BJ"], batch["mlm_labels_BJ"], -100),
    )
    found["mlm"] = F.cross_entropy(
      model.vocabulary(text).flatten(0, 1).float(), labels.flatten()
    )
  if "itm" in active:
    is_true = torch.arange(len(image)) % 2 == 0
    shown = torch.where(is_true[:, None, None, None], image, image.roll(1, 0))
    text, fused = fuse(ids, shown)
    pooled = [
      torch.tanh(pooler(x[:, 0]))
      for pooler, x in zip(model.poolers, (text, fused), strict=True)
    ]
    found["itm"] = F.cross_entropy(
      model.match(torch.cat(pooled, 1)).float(), is_true.long()
    )
  if {"mgsc_image", "mgsc_text", "mltc_image", "mltc_text"} & active:
    text_40, full = fuse(batch["scl_ids_BT"], image)
    text, dropped = fuse(ids, image, keep_BI=batch["keep_idx_BI"])
    if "mgsc_image" in active:
      found["mgsc_image"] = contrast(dropped[:, 0], full[:, 0].detach(), tau)
    if "mgsc_text" in active:
      found["mgsc_text"] = contrast(
        text_40[:, 0], text[:, 0].detach(), tau, weights.text_mgsc_group
      )
    if "mltc_text" in active:
      pieces = zip(
        *(
          x.split(weights.mltc_text_group)
          for x in (text_40, text, batch["scl_pos_BJ"], batch["scl_ok_BJ"])
        ),
        strict=True,
      )
      found["mltc_text"] = torch.stack(
        [
          contrast(
            rows(masked, index)[ok.flatten()],
            rows(whole, index)[ok.flatten()].detach(),
            tau,
          )
          for masked, whole, index, ok in pieces
        ]
      ).mean()
    if "mltc_image" in active:
      index = batch["tok_idx_BI"]
      _, token = fuse(ids, image, hide_BI=index)
      found["mltc_image"] = contrast(
        rows(token, index + 1),
        rows(full, index + 1).detach(),
        tau,
        weights.mltc_image_group * index.shape[1],
      )
  return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
  """Steps of one precision, in a process of their own."""

  seconds: tuple[float, ...]  # of each timed step
  loss: float  # of the last one
  peak_rss_mib: float


def time_steps(
  config: config_lib.Config,
  batch: Mapping[str, np.ndarray],
  *,
  precision: str,
  num_steps: int,
  num_warm: int,
) -> Timing:
  """Times steps of AdamW on the CPU, on one batch again and again.

  Args:
    config: one that `check` accepts.
    batch: of the recipe's pipeline.
    precision: of PRECISIONS.
    num_steps: that are timed.
    num_warm: before them.
  """
  torch.manual_seed(config.train.seed)
  model = Model(config.model)
  optimizer = torch.optim.AdamW(
    model.parameters(), config.optimizer.learning_rate
  )
  tensors = {name: torch.from_numpy(array) for name, array in batch.items()}
  for name, tensor in tensors.items():
    if tensor.dtype == torch.int32:
      tensors[name] = tensor.long()
  seconds = []
  for _ in range(num_warm + num_steps):
    started = time.perf_counter()
    optimizer.zero_grad(set_to_none=True)
    is_short = precision == "bfloat16"
    with torch.autocast("cpu", torch.bfloat16, enabled=is_short):
      found = losses(model, tensors, config)
    total = sum(
      getattr(config.objectives, name) * value for name, value in found.items()
    )
    total.backward()
    optimizer.step()
    seconds.append(time.perf_counter() - started)
  return Timing(
    seconds=tuple(seconds[num_warm:]),
    loss=total.item(),
    peak_rss_mib=metrics.peak_rss_mib(),
  )


class Pictures(torch.utils.data.Dataset):
  """Images alone: decoded, cropped, mirrored, resized, as float32.

  Crops are those of the recipe; RandAugment and the like are left out.
  """

  def __init__(self, config: config_lib.Config):
    self.source = sources.open_source(config.data.dir, config.data.train_split)
    self.augment = config.data.augment
    self.size = config.model.vision.image_size
    self.mean, self.std = (
      np.array(value, np.float32)
      for value in (config.data.mean, config.data.std)
    )

  def __len__(self) -> int:
    return len(self.source)

  def __getitem__(self, index: int) -> torch.Tensor:
    rng = np.random.default_rng(index)
    image = Image.open(io.BytesIO(self.source[index].image)).convert("RGB")
    top, left, height, width = transforms.crop_box(
      rng,
      image.height,
      image.width,
      scale=self.augment.crop_scale,
      ratio=self.augment.crop_ratio,
    )
    image = image.crop((left, top, left + width, top + height))
    image = image.resize((self.size, self.size), Image.Resampling.BICUBIC)
    if rng.random() < 0.5:
      image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    unit_YXC = (np.asarray(image, np.float32) / 255 - self.mean) / self.std
    return torch.from_numpy(unit_YXC.transpose(2, 0, 1).copy())


def time_images(
  config: config_lib.Config,
  *,
  num_images: int,
  num_workers: int,
) -> float:
  """`Pictures` a second, with nothing else to do.

  Args:
    config: whose images and crops.
    num_images: that are timed, at least.
    num_workers: processes.

  Raises:
    UserError: a process was ended.
  """
  pictures = Pictures(config)
  num_batches = -(-num_images // IMAGES_PER_BATCH)
  # Batches, more than the queues hold: before, so that none that was made while
  # processes started counts; after, so that all work to the end.
  ahead = 4 * num_workers
  loader = torch.utils.data.DataLoader(
    pictures,
    IMAGES_PER_BATCH,
    sampler=torch.utils.data.RandomSampler(
      pictures,
      replacement=True,
      num_samples=(ahead + num_batches + ahead) * IMAGES_PER_BATCH,
    ),
    num_workers=num_workers,
    multiprocessing_context="spawn",  # jax, which is here, has threads
  )
  batches = iter(loader)
  try:
    for _ in itertools.islice(batches, ahead):
      pass
    started = time.perf_counter()
    for _ in itertools.islice(batches, num_batches):
      pass
  except RuntimeError as error:  # a process was ended
    raise errors.UserError(
      f"--against=torch: PyTorch's images: {error}; its processes hand batches "
      "over in /dev/shm, which may be small"
    ) from error
  return num_batches * IMAGES_PER_BATCH / (time.perf_counter() - started)
