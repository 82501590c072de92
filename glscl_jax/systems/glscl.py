"""GLSCL (2306.07096) and SCL (2211.13437); equations in docs/systems.md.

    total = MLM + ITM + ITC + MGSC_image + MGSC_text
            + .2 MLTC_image + .2 MLTC_text          (SCL: without MLTC)

`objective_reads` says which fused passes each objective reads, `encode` and
`fuse` run each of them once, and one short function an objective turns rows
into a scalar. Weights of 0 remove passes and parameters.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from glscl_jax.config import Config, ObjectiveConfig
from glscl_jax.models import layers
from glscl_jax.models.towers import Towers
from glscl_jax.models.vision import named_patches
from glscl_jax.objectives import completion, contrastive, matching
from glscl_jax.systems import encoders, inputs, terms, views
from glscl_jax.systems.views import Pass, Reads
from glscl_jax.types import Batch, Params


def objective_reads(config: ObjectiveConfig) -> dict[str, list[Reads]]:
  """What each objective reads (docs/systems.md, Views and passes of one step).

  Versions of the image: full, drop (I~80), token (I~30), itm (own or false).
  Versions of the text: full (T), mlm (T_mlm), scl (T_40).
  """

  def full(pass_name: str) -> str:
    """T, drawn once for all passes or once a pass (dropout)."""
    return "full" if config.share_text_dropout else f"full:{pass_name}"

  dropped = Pass("drop", full("drop"))
  token = Pass("token", full("token"))
  masked_text = Pass("full", "scl")
  clean = Pass("full", full("clean"))
  partner = config.completion_targets == "partner_masked"
  complete_image = masked_text if partner else clean
  complete_text = dropped if partner else clean

  def image(fused: Pass, rows: str, *, target: bool = False) -> Reads:
    return Reads(fused=fused, image_rows=(rows,), target=target)

  def text(fused: Pass, rows: str, *, target: bool = False) -> Reads:
    return Reads(fused=fused, text_rows=(rows,), target=target)

  return {
    "itm": [
      Reads(
        fused=Pass("itm", full("itm")),
        text_rows=("class",),
        image_rows=("class",),
      )
    ],
    "mlm": [text(Pass("full", "mlm"), "mlm")],
    "itc": [],
    "mgsc_image": [
      image(dropped, "class"),
      image(complete_image, "class", target=True),
    ],
    "mgsc_text": [
      text(masked_text, "class"),
      text(complete_text, "class", target=True),
    ],
    "mltc_image": [
      image(token, "token"),
      image(complete_image, "token", target=True),
    ],
    "mltc_text": [
      text(masked_text, "scl"),
      text(complete_text, "scl", target=True),
    ],
  }


def make_plan(config: ObjectiveConfig) -> views.Plan:
  """The versions and passes that the active objectives read together."""
  table = objective_reads(config)
  active = config.active
  text = "full" if config.share_text_dropout else "full:itc"
  return views.make_plan(
    [read for name in active for read in table[name]],
    images=("full",) if {"itc", "itm"} & set(active) else (),
    texts=(text,) if "itc" in active else (),
  )


@dataclasses.dataclass(frozen=True)
class Encoded:
  """Transformed states of each version, and the pairs that ITM shows."""

  images: Mapping[str, jax.Array]
  texts: Mapping[str, jax.Array]
  text_valid_BT: jax.Array
  joint: tuple[jax.Array, jax.Array] | None  # ITC vectors: text, image
  itm_labels_B: jax.Array | None
  itm_ok_B: jax.Array | None  # pairs that count; None: all


def encode_images(
  model: Towers, batch: Batch, versions: tuple[str, ...], config: Config
) -> dict[str, jax.Array]:
  """Encoder states of the versions of I, equal lengths in one call."""
  num_patches = config.model.vision.num_patches

  def visible(version: str) -> jax.Array | None:
    if version == "token":
      return ~named_patches(batch.tok_idx_BI, num_patches)
    if version == "drop":
      return named_patches(batch.keep_idx_BI, num_patches)
    return None

  patches = inputs.embed_versions(
    model.vision,
    inputs.normalize_images(batch.image_BYXC, config),
    {name: visible(name) for name in versions if name != "itm"},
  )
  embedded = {}
  if "full" in versions:
    embedded["full"] = (model.vision.complete(patches["full"]),)
  if "token" in versions:
    embedded["token"] = (model.vision.hide(patches["token"], batch.tok_idx_BI),)
  if "drop" in versions:
    embedded["drop"] = (model.vision.drop(patches["drop"], batch.keep_idx_BI),)
  return views.batch_by_shape(model.vision.encode, embedded)


def encode_texts(
  model: Towers, batch: Batch, versions: tuple[str, ...]
) -> dict[str, jax.Array]:
  """Encoder states of the versions of T, all in one call."""
  ids = {
    "full": batch.text_ids_BT,
    "mlm": batch.mlm_ids_BT,
    "scl": batch.scl_ids_BT,
  }
  return views.batch_by_shape(
    model.text,
    {
      name: (ids[name.partition(":")[0]], batch.text_valid_BT)
      for name in versions
    },
  )


def encode(
  model: Towers, batch: Batch, plan: views.Plan, config: Config, key: jax.Array
) -> Encoded:
  """All versions of the plan, transformed to the fusion width."""
  image_states = encode_images(model, batch, plan.image_versions, config)
  text_states = encode_texts(model, batch, plan.text_versions)
  images = {
    name: model.fusion.transform_image(y) for name, y in image_states.items()
  }
  texts = {
    name: model.fusion.transform_text(x) for name, x in text_states.items()
  }
  joint = labels_B = ok_B = None
  if config.objectives.itc > 0:
    itc_text = texts["full" if "full" in texts else "full:itc"]
    joint = (
      model.project_text(itc_text[:, 0]),
      model.project_image(images["full"][:, 0]),
    )
  if "itm" in plan.image_versions:
    show = ITM_IMAGES[config.objectives.itm_negatives]
    images["itm"], labels_B, ok_B = show(
      Pairing(model, batch, images["full"], joint, config, key)
    )
  return Encoded(images, texts, batch.text_valid_BT, joint, labels_B, ok_B)


# Image states shown to each text, labels (1: its own), and which pairs count
# (None: all).
Shown = tuple[jax.Array, jax.Array, jax.Array | None]


@dataclasses.dataclass(frozen=True)
class Pairing:
  """What the pairs of ITM are made from."""

  model: Towers
  batch: Batch
  y_BID: jax.Array  # transformed states of the complete images
  joint: tuple[jax.Array, jax.Array] | None  # ITC vectors: text, image
  config: Config
  key: jax.Array

  @property
  def group(self) -> int:
    """Samples whose images are shown to each other's texts."""
    return min(self.config.objectives.neg_group, self.y_BID.shape[0])

  def draw_labels(self) -> tuple[jax.Array, jax.Array]:
    """Labels, half of each group true, and a key for what is still to draw."""
    label_key, draw_key = jax.random.split(self.key)
    batch_size = self.y_BID.shape[0]
    return matching.half_labels(label_key, batch_size, self.group), draw_key

  def show(self, labels_B: jax.Array, index_B: jax.Array) -> jax.Array:
    """Own images where the label is 1, else those of the group at `index_B`."""
    false_BID = matching.take_from_group(self.y_BID, index_B, self.group)
    return jnp.where((labels_B == 1)[:, None, None], self.y_BID, false_BID)


def dataset_images(pairing: Pairing) -> Shown:
  """Labels and false images are the batch's, which drew them from the set."""
  batch, group = pairing.batch, pairing.group
  # Exactly half of each group (rounded up) is false: encode only those.
  num_false = len(batch.itm_labels_B) // group * (group - group // 2)
  rows_A = jnp.argsort(batch.itm_labels_B, stable=True)[:num_false]
  false_AID = pairing.model.fusion.transform_image(
    pairing.model.vision(
      inputs.normalize_images(batch.false_image_BYXC[rows_A], pairing.config)
    )
  )
  return pairing.y_BID.at[rows_A].set(false_AID), batch.itm_labels_B, None


def in_batch_images(pairing: Pairing) -> Shown:
  """Any other image of the group; without one a text is shown its own."""
  labels_B, draw_key = pairing.draw_labels()
  index_B, found_B = matching.random_negatives(
    pairing.batch.identity_BM, draw_key, pairing.group
  )
  labels_B = jnp.where(found_B, labels_B, 1)
  return pairing.show(labels_B, index_B), labels_B, None


def hard_images(pairing: Pairing) -> Shown:
  """Similar images of the group rather (ALBEF, 2107.07651).

  A false pair without a candidate does not count.
  """
  labels_B, draw_key = pairing.draw_labels()
  similarity_GAA = matching.similarity_in_groups(*pairing.joint, pairing.group)
  index_B, found_B = matching.hard_negatives(
    similarity_GAA / pairing.model.temperature(),
    matching.same_in_groups(pairing.batch.identity_BM, pairing.group),
    draw_key,
  )
  shown_BID = pairing.show(labels_B, index_B)
  return shown_BID, labels_B, found_B | (labels_B == 1)


# By objectives.itm_negatives.
ITM_IMAGES: dict[str, Callable[[Pairing], Shown]] = {
  "in_batch": in_batch_images,
  "hard": hard_images,
  "dataset": dataset_images,
}


@dataclasses.dataclass(frozen=True)
class Fused:
  """Rows of the fused streams, by pass and name."""

  text: Mapping[Pass, views.Rows]
  image: Mapping[Pass, views.Rows]


def fuse(
  model: Towers,
  batch: Batch,
  encoded: Encoded,
  plan: views.Plan,
  config: Config,
) -> Fused:
  """All passes of the plan: equal shapes together, last layer by rows."""
  batch_size = batch.text_ids_BT.shape[0]
  class_B1 = jnp.zeros((batch_size, 1), jnp.int32)
  text_index = {
    "class": class_B1,
    "mlm": batch.mlm_pos_BJ,
    "scl": batch.scl_pos_BJ,
  }
  image_index = {
    "class": class_B1,
    "token": None if batch.tok_idx_BI is None else batch.tok_idx_BI + 1,
  }
  streams_in = {
    fused: (
      encoded.texts[fused.text],
      encoded.text_valid_BT,
      encoded.images[fused.image],
    )
    for fused in plan.passes
  }
  bodies = views.batch_by_shape(model.fusion.body, streams_in)
  restricted = config.model.fusion.restrict_last_layer
  text, image = {}, {}
  for fused, streams in bodies.items():
    text_rows_BQ, text_offsets = views.index_rows(
      plan.text_rows[fused], text_index, batch_size
    )
    image_rows_BJ, image_offsets = views.index_rows(
      plan.image_rows[fused], image_index, batch_size
    )
    if restricted:
      x_BQD, y_BJD = model.fusion.head(
        streams, encoded.text_valid_BT, text_rows_BQ, image_rows_BJ
      )
    else:
      # A stream that nobody reads is left out here too, with its parameters.
      x_BLD, y_BMD = model.fusion.head(
        streams,
        encoded.text_valid_BT,
        None if plan.text_rows[fused] else text_rows_BQ,
        None if plan.image_rows[fused] else image_rows_BJ,
      )
      x_BQD = layers.take_rows(x_BLD, text_rows_BQ)
      y_BJD = layers.take_rows(y_BMD, image_rows_BJ)
    text[fused] = views.Rows(x_BQD, text_offsets)
    image[fused] = views.Rows(y_BJD, image_offsets)
  return Fused(text, image)


@dataclasses.dataclass(frozen=True)
class Context:
  """What an objective may read."""

  model: Towers
  batch: Batch
  encoded: Encoded
  fused: Fused
  reads: Mapping[str, list[Reads]]
  config: ObjectiveConfig

  def rows(self, objective: str) -> list[jax.Array]:
    """The rows of each pass that `objective` reads, text before image."""
    return [
      stream[read.fused][name]
      for read in self.reads[objective]
      for stream, names in (
        (self.fused.text, read.text_rows),
        (self.fused.image, read.image_rows),
      )
      for name in names
    ]


def _mlm(context: Context) -> terms.Term:
  (x_BJD,) = context.rows("mlm")
  return terms.mlm(context.model.mlm_head(x_BJD), context.batch)


def _itm(context: Context) -> terms.Term:
  x_B1D, y_B1D = context.rows("itm")
  logits_B2 = context.model.match_logits(x_B1D[:, 0], y_B1D[:, 0])
  encoded = context.encoded
  return terms.itm(logits_B2, encoded.itm_labels_B, encoded.itm_ok_B)


# The rows, or vectors, that meet those of the whole batch.
Features = tuple[jax.Array, jax.Array]
Contrast = Callable[[Towers, Features, Batch, ObjectiveConfig], terms.Term]


def features(context: Context, name: str) -> Features:
  """What `CONTRAST[name]` reads: masked and complete, or text and image."""
  if name == "itc":
    return context.encoded.joint
  first, second = context.rows(name)
  if name.startswith("mgsc"):
    return first[:, 0], second[:, 0]
  return first, second


def _itc(
  model: Towers, found: Features, batch: Batch, config: ObjectiveConfig
) -> terms.Term:
  return terms.itc(*found, model.temperature(), batch, config)


def _global(name: str) -> Contrast:
  def objective(
    model: Towers, found: Features, batch: Batch, config: ObjectiveConfig
  ) -> terms.Term:
    masked_BD, complete_BD = found
    loss = completion.global_completion(
      contrastive.scale_gradient(masked_BD, config.contrast_grad_scale),
      complete_BD,
      temperature=config.completion_temperature,
      identity_BM=batch.identity_BM,
      same_image=config.same_image,
      group=config.text_mgsc_group if name == "mgsc_text" else None,
      block=config.contrast_block,
    )
    return terms.Term((terms.whole(loss),), {})

  return objective


def _local(name: str) -> Contrast:
  is_text = name == "mltc_text"

  def objective(
    model: Towers, found: Features, batch: Batch, config: ObjectiveConfig
  ) -> terms.Term:
    masked_BJD, complete_BJD = found
    loss = completion.local_completion(
      contrastive.scale_gradient(masked_BJD, config.contrast_grad_scale),
      complete_BJD,
      batch.scl_ok_BJ if is_text else None,
      temperature=config.completion_temperature,
      group=config.mltc_text_group if is_text else config.mltc_image_group,
      identity_BM=batch.identity_BM,
      same_image=config.same_image,
      block=config.contrast_block,
    )
    return terms.Term((terms.whole(loss),), {})

  return objective


LOCAL: dict[str, Callable[[Context], terms.Term]] = {"mlm": _mlm, "itm": _itm}
CONTRAST: dict[str, Contrast] = {
  "itc": _itc,
  "mgsc_image": _global("mgsc_image"),
  "mgsc_text": _global("mgsc_text"),
  "mltc_image": _local("mltc_image"),
  "mltc_text": _local("mltc_text"),
}


def _parts(
  model: Towers, batch: Batch, config: Config, key: jax.Array
) -> terms.Parts:
  active = config.objectives.active
  plan = make_plan(config.objectives)
  encoded = encode(model, batch, plan, config, key)
  context = Context(
    model,
    batch,
    encoded,
    fuse(model, batch, encoded, plan, config),
    objective_reads(config.objectives),
    config.objectives,
  )
  return terms.Parts(
    local={name: LOCAL[name](context) for name in active if name in LOCAL},
    features={
      name: features(context, name) for name in active if name in CONTRAST
    },
  )


def _contrast(
  model: Towers, found: Mapping[str, Features], batch: Batch, config: Config
) -> dict[str, terms.Term]:
  return {
    name: CONTRAST[name](model, both, batch, config.objectives)
    for name, both in found.items()
  }


def parts(
  params: Params,
  batch: Batch,
  *,
  config: Config,
  key: jax.Array,
  step: jax.Array | int | None = None,
) -> terms.Parts:
  """All passes of a batch, or of a micro-batch, up to its contrasts.

  Args:
    params: as made by `init`.
    batch: with the masks that the active objectives need.
    config: the run's; `train.seed` is not read here.
    key: dropout and in-batch negatives of this step. None of both is drawn
      when dropout is 0 and negatives come from the data set.
    step: not read here.
  """
  del step
  dropout_key, draw_key = jax.random.split(key)
  return Towers(config.model).apply(
    {"params": params},
    batch,
    config,
    draw_key,
    method=_parts,
    rngs={"dropout": dropout_key},
  )


def contrast(
  params: Params,
  features: Mapping[str, Features],
  batch: Batch,
  *,
  config: Config,
) -> dict[str, terms.Term]:
  """ITC, MGSC and MLTC of a whole batch, from `Parts.features`."""
  return Towers(config.model).apply(
    {"params": params}, features, batch, config, method=_contrast
  )


loss = terms.make_loss(parts, contrast)


def init(config: Config, key: jax.Array) -> Params:
  """Parameters of everything the active objectives read, float32."""

  def method(model: Towers, batch: Batch) -> None:
    _contrast(model, _parts(model, batch, config, key).features, batch, config)

  return Towers(config.model).init(
    {"params": key}, inputs.example_batch(config), method=method
  )["params"]


_apply = functools.partial(encoders.apply, Towers)
encode_visual = functools.partial(encoders.encode_visual, Towers)
encode_text = functools.partial(encoders.encode_text, Towers)


def text_vectors(
  params: Params, x_BTD: jax.Array, *, config: Config
) -> jax.Array:
  """Unit ITC vectors (B, E) of `encode_text`'s states."""

  def method(model: Towers) -> jax.Array:
    return model.project_text(model.fusion.transform_text(x_BTD[:, :1])[:, 0])

  return contrastive.normalize(_apply(params, config, method))


def image_vectors(
  params: Params, y_BID: jax.Array, *, config: Config
) -> jax.Array:
  """Unit ITC vectors (B, E) of `encode_visual`'s states."""

  def method(model: Towers) -> jax.Array:
    return model.project_image(model.fusion.transform_image(y_BID[:, :1])[:, 0])

  return contrastive.normalize(_apply(params, config, method))


def match_scores(
  params: Params,
  x_BTD: jax.Array,
  text_valid_BT: jax.Array,
  y_BID: jax.Array,
  image_valid_BM: None = None,
  *,
  config: Config,
) -> jax.Array:
  """ITM logit difference (match - no match) of pairs of states, (B,)."""
  del image_valid_BM  # an image has no padding

  def method(model: Towers) -> jax.Array:
    streams = _fused_body(model, x_BTD, text_valid_BT, y_BID)
    class_B1 = jnp.zeros((x_BTD.shape[0], 1), jnp.int32)
    x_B1D, y_B1D = model.fusion.head(streams, text_valid_BT, class_B1, class_B1)
    return model.match_logits(x_B1D[:, 0], y_B1D[:, 0])

  logits_B2 = _apply(params, config, method)
  return logits_B2[:, 1] - logits_B2[:, 0]


def cross_attention(
  params: Params,
  x_BTD: jax.Array,
  text_valid_BT: jax.Array,
  y_BID: jax.Array,
  *,
  config: Config,
) -> jax.Array:
  """Text-to-image attention of the last fusion layer, (B, H, T, 1 + N)."""

  def method(model: Towers) -> jax.Array:
    streams = _fused_body(model, x_BTD, text_valid_BT, y_BID)
    return model.fusion.attention(streams, text_valid_BT)

  return _apply(params, config, method)


def _fused_body(model: Towers, x_BTD, text_valid_BT, y_BID):
  return model.fusion.body(
    model.fusion.transform_text(x_BTD),
    text_valid_BT,
    model.fusion.transform_image(y_BID),
  )
