"""MaskVLM (2208.02131): each modality completed from the other one.

    total = MLM + MIM + ITC + ITM                       (docs/systems.md)

    v = f_i(I), v_m = f_i(I, blocks hidden)   w = f_t(T), w_m = f_t(T, masked)

One modality is masked at a time. g_text and g_image are stacks of
cross-attention blocks (`text_cross`, `image_cross`): queries of the one
modality, the other one's encoder states as context. Each encoder and each
stack runs once a step, on all versions and pairs that are read. Weights of 0
remove passes and parameters.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from glscl_jax.config import Config
from glscl_jax.models import vision
from glscl_jax.models.cross_stack import CrossStack
from glscl_jax.models.maskvlm import MaskVLM
from glscl_jax.objectives import contrastive, masked_regression, matching
from glscl_jax.systems import completed, encoders, inputs, terms, views
from glscl_jax.types import Batch, Params

# The versions of image and text that each objective reads.
READS = {
  "mlm": ("full", "mlm"),
  "mim": ("block", "full"),
  "itc": ("full", "full"),
  "itm": ("full", "full"),
}
# What ITM judges, in this order: the own pair, and two false ones.
ITM_PAIRS = ("own", "false_image", "false_text")

# Text states, which of them are valid, image states.
Pair = tuple[jax.Array, jax.Array, jax.Array]


def image_versions(config: Config) -> tuple[str, ...]:
  """Those that the active objectives read: full (I), block (I masked)."""
  return tuple(
    dict.fromkeys(READS[name][0] for name in config.objectives.active)
  )


def text_versions(config: Config) -> tuple[str, ...]:
  """Those that the active objectives read: full (T), mlm (T masked)."""
  return tuple(
    dict.fromkeys(READS[name][1] for name in config.objectives.active)
  )


@dataclasses.dataclass(frozen=True)
class Encoded:
  """Encoder states of each version, and the ITC vectors of the full ones."""

  images: Mapping[str, jax.Array]  # v, v_m
  texts: Mapping[str, jax.Array]  # w, w_m
  joint: tuple[jax.Array, jax.Array] | None  # text, image; None: no ITC


def encode_images(
  model: MaskVLM, batch: Batch, versions: tuple[str, ...], config: Config
) -> dict[str, jax.Array]:
  """States v = f_i(I) and v_m = f_i(I, patches replaced), in one call."""
  num_patches = config.model.vision.num_patches
  visible = {"full": None}
  if "block" in versions:
    visible["block"] = ~vision.named_patches(batch.block_idx_BI, num_patches)
  patches = inputs.embed_versions(
    model.vision,
    inputs.normalize_images(batch.image_BYXC, config),
    {name: visible[name] for name in versions},
  )
  embed = {
    "full": model.vision.complete,
    "block": lambda x_BID: model.vision.hide(x_BID, batch.block_idx_BI),
  }
  return views.batch_by_shape(
    model.vision.encode,
    {name: (embed[name](patches[name]),) for name in versions},
  )


def encode_texts(
  model: MaskVLM, batch: Batch, versions: tuple[str, ...]
) -> dict[str, jax.Array]:
  """States w = f_t(T) and w_m = f_t(T masked), in one call.

  Masked words are valid: which words are masked is no matter of validity.
  """
  ids = {"full": batch.text_ids_BT, "mlm": batch.mlm_ids_BT}
  return views.batch_by_shape(
    model.text, {name: (ids[name], batch.text_valid_BT) for name in versions}
  )


def encode(model: MaskVLM, batch: Batch, config: Config) -> Encoded:
  """All versions that the active objectives read."""
  images = encode_images(model, batch, image_versions(config), config)
  texts = encode_texts(model, batch, text_versions(config))
  joint = None
  if config.objectives.itc > 0:
    joint = (
      model.text_projection(texts["full"][:, 0]),
      model.image_projection(images["full"][:, 0]),
    )
  return Encoded(images, texts, joint)


@dataclasses.dataclass(frozen=True)
class Judged:
  """The pairs of ITM, with their labels (1: true) and which count."""

  pairs: Mapping[str, Pair]
  labels_A: jax.Array  # in the order of ITM_PAIRS, sample by sample
  ok_A: jax.Array


def draw_negatives(
  model: MaskVLM, batch: Batch, encoded: Encoded, config: Config, key: jax.Array
) -> tuple[matching.BothSides, int]:
  """For each text a false image, for each image a false text; the group.

  Drawn among the `neg_group` samples of a group: by the softmax of ITC
  similarity ("hard", ALBEF 2107.07651), or all alike ("in_batch").
  """
  group = min(config.objectives.neg_group, batch.text_ids_BT.shape[0])
  same_GAA = matching.same_in_groups(batch.identity_BM, group)
  if config.objectives.itm_negatives == "hard":
    similarity_GAA = matching.similarity_in_groups(*encoded.joint, group)
    logits_GAA = similarity_GAA / model.temperature()
  else:
    logits_GAA = jnp.zeros(same_GAA.shape)
  return matching.negatives_of_both(logits_GAA, same_GAA, key), group


def judge(
  model: MaskVLM, batch: Batch, encoded: Encoded, config: Config, key: jax.Array
) -> Judged:
  """B true pairs, B with a false image and B with a false text.

  States are gathered, nothing is encoded again. A pair for which the group
  holds no negative does not count.
  """
  negatives, group = draw_negatives(model, batch, encoded, config, key)
  (image_index_B, image_ok_B), (text_index_B, text_ok_B) = negatives
  x_BTD, y_BID = encoded.texts["full"], encoded.images["full"]
  valid_BT = batch.text_valid_BT
  false_x_BTD, false_valid_BT = (
    matching.take_from_group(item, text_index_B, group)
    for item in (x_BTD, valid_BT)
  )
  false_y_BID = matching.take_from_group(y_BID, image_index_B, group)
  true_B = jnp.ones(image_ok_B.shape, jnp.int32)
  return Judged(
    pairs={
      "own": (x_BTD, valid_BT, y_BID),
      "false_image": (x_BTD, valid_BT, false_y_BID),
      "false_text": (false_x_BTD, false_valid_BT, y_BID),
    },
    labels_A=views.stack_rows([true_B, 0 * true_B, 0 * true_B]),
    ok_A=views.stack_rows([true_B == 1, image_ok_B, text_ok_B]),
  )


# What a stack is called with: queries, context, validity of each.
Side = Callable[..., tuple[jax.Array | None, ...]]


def ask_text(x_BTD: jax.Array, valid_BT: jax.Array, y_BID: jax.Array):
  """g_text(w | v): text states are the queries."""
  return x_BTD, y_BID, valid_BT, None


def ask_image(x_BTD: jax.Array, valid_BT: jax.Array, y_BID: jax.Array):
  """g_image(v | w): image states are the queries."""
  return y_BID, x_BTD, None, valid_BT


def fuse(
  stack: CrossStack,
  ask: Side,
  pairs: Mapping[str, Pair],
  rows: Mapping[str, jax.Array],
) -> dict[str, jax.Array]:
  """The rows asked for of each pair, (B, Q, D); all pairs in one call.

  The last block runs once for each number of rows.
  """
  bodies = views.batch_by_shape(lambda *pair: stack.body(*ask(*pair)), pairs)

  def last(rows_BQ: jax.Array, h_BLD: jax.Array, *pair: jax.Array) -> jax.Array:
    return stack.head(h_BLD, *ask(*pair)[1:], rows_BQ)

  return views.batch_by_shape(
    last, {name: (rows[name], bodies[name], *pairs[name]) for name in pairs}
  )


def fuse_texts(
  model: MaskVLM, batch: Batch, encoded: Encoded, judged: Judged | None
) -> dict[str, jax.Array]:
  """g_text: masked words from the complete image (mlm), class rows of ITM."""
  class_B1 = jnp.zeros((batch.text_ids_BT.shape[0], 1), jnp.int32)
  pairs = dict(judged.pairs) if judged else {}
  rows = dict.fromkeys(pairs, class_B1)
  if "mlm" in encoded.texts:
    masked = encoded.texts["mlm"], batch.text_valid_BT, encoded.images["full"]
    pairs["mlm"], rows["mlm"] = masked, batch.mlm_pos_BJ
  return fuse(model.text_cross, ask_text, pairs, rows)


def fuse_images(
  model: MaskVLM, batch: Batch, encoded: Encoded, judged: Judged | None
) -> dict[str, jax.Array]:
  """g_image: all patches from the complete text (mim), class rows of ITM."""
  batch_size = batch.text_ids_BT.shape[0]
  pairs = dict(judged.pairs) if judged else {}
  rows = dict.fromkeys(pairs, jnp.zeros((batch_size, 1), jnp.int32))
  if "block" in encoded.images:
    masked = encoded.texts["full"], batch.text_valid_BT, encoded.images["block"]
    # The decoder asks with every patch; the class row is left out.
    patch_I = jnp.arange(1, masked[2].shape[1], dtype=jnp.int32)
    patch_BI = jnp.broadcast_to(patch_I[None], (batch_size, len(patch_I)))
    pairs["mim"], rows["mim"] = masked, patch_BI
  return fuse(model.image_cross, ask_image, pairs, rows)


@dataclasses.dataclass(frozen=True)
class Context:
  """What an objective may read."""

  model: MaskVLM
  batch: Batch
  encoded: Encoded
  judged: Judged | None
  texts: Mapping[str, jax.Array]  # rows of g_text
  images: Mapping[str, jax.Array]  # rows of g_image
  config: Config


def _mlm(context: Context) -> terms.Term:
  """MLM = CE(head(g_text(w_m | v)), words), at masked positions."""
  return terms.mlm(context.model.mlm_head(context.texts["mlm"]), context.batch)


def _mim(context: Context) -> terms.Term:
  """MIM = |head(dec(g_image(v_m | w) | w)) - pixels|, of hidden patches."""
  batch, config = context.batch, context.config
  decoded_BJD = decode(context.model, batch, context.encoded, context.images)
  loss = masked_regression.masked_regression(
    context.model.pixel_head(decoded_BJD),
    inputs.pixel_targets(batch.image_BYXC, config),
    batch.block_idx_BI,
    loss=config.objectives.mim_loss,
    patch_norm=config.objectives.mim_patch_norm,
  )
  number = float(batch.block_idx_BI.size)
  return terms.Term((terms.Mean(loss, number),), {})


def decode(
  model: MaskVLM,
  batch: Batch,
  encoded: Encoded,
  images: Mapping[str, jax.Array],
) -> jax.Array:
  """dec(. | w) at the hidden patches, (B, J, D); w is the unmasked text."""
  context = encoded.texts["full"], None, batch.text_valid_BT
  h_BID = model.decoder.body(images["mim"], *context)
  return model.decoder.head(h_BID, *context, batch.block_idx_BI)


def _itm(context: Context) -> terms.Term:
  """ITM = CE(head(g_image(v | w)_0 * g_text(w | v)_0), true?), 3 B pairs."""
  text_AD, image_AD = (
    views.stack_rows([rows[name][:, 0] for name in ITM_PAIRS])
    for rows in (context.texts, context.images)
  )
  logits_A2 = context.model.match_logits(text_AD, image_AD)
  return terms.itm(logits_A2, context.judged.labels_A, context.judged.ok_A)


LOCAL: dict[str, Callable[[Context], terms.Term]] = {
  "mlm": _mlm,
  "mim": _mim,
  "itm": _itm,
}


def _parts(
  model: MaskVLM, batch: Batch, config: Config, key: jax.Array
) -> terms.Parts:
  active = config.objectives.active
  encoded = encode(model, batch, config)
  judged = None
  if "itm" in active:
    judged = judge(model, batch, encoded, config, key)
  context = Context(
    model,
    batch,
    encoded,
    judged,
    fuse_texts(model, batch, encoded, judged),
    fuse_images(model, batch, encoded, judged),
    config,
  )
  return terms.Parts(
    local={name: LOCAL[name](context) for name in active if name in LOCAL},
    features={"itc": encoded.joint} if "itc" in active else {},
  )


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
    key: dropout and negatives of this step.
    step: not read here.
  """
  del step
  dropout_key, draw_key = jax.random.split(key)
  return MaskVLM(config.model).apply(
    {"params": params},
    batch,
    config,
    draw_key,
    method=_parts,
    rngs={"dropout": dropout_key},
  )


def contrast(
  params: Params,
  features: Mapping[str, terms.Joint],
  batch: Batch,
  *,
  config: Config,
) -> dict[str, terms.Term]:
  """ITC of a whole batch: symmetric InfoNCE of v_0 and w_0, tau learned."""
  return MaskVLM(config.model).apply(
    {"params": params}, features, batch, config, method=terms.joint_contrast
  )


loss = terms.make_loss(parts, contrast)


def init(config: Config, key: jax.Array) -> Params:
  """Parameters of everything the active objectives read, float32."""

  def method(model: MaskVLM, batch: Batch) -> None:
    terms.joint_contrast(
      model, _parts(model, batch, config, key).features, batch, config
    )

  return MaskVLM(config.model).init(
    {"params": key}, inputs.example_batch(config), method=method
  )["params"]


_apply = functools.partial(encoders.apply, MaskVLM)
encode_visual = functools.partial(encoders.encode_visual, MaskVLM)
encode_text = functools.partial(encoders.encode_text, MaskVLM)


def text_vectors(
  params: Params, x_BTD: jax.Array, *, config: Config
) -> jax.Array:
  """Unit ITC vectors (B, E) of `encode_text`'s states."""
  return contrastive.normalize(
    _apply(params, config, lambda model: model.text_projection(x_BTD[:, 0]))
  )


def image_vectors(
  params: Params, y_BID: jax.Array, *, config: Config
) -> jax.Array:
  """Unit ITC vectors (B, E) of `encode_visual`'s states."""
  return contrastive.normalize(
    _apply(params, config, lambda model: model.image_projection(y_BID[:, 0]))
  )


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

  def method(model: MaskVLM) -> jax.Array:
    pairs = {"pair": (x_BTD, text_valid_BT, y_BID)}
    rows = {"pair": jnp.zeros((x_BTD.shape[0], 1), jnp.int32)}
    text = fuse(model.text_cross, ask_text, pairs, rows)["pair"]
    image = fuse(model.image_cross, ask_image, pairs, rows)["pair"]
    return model.match_logits(text[:, 0], image[:, 0])

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
  """Text-to-image attention of g_text's last block, (B, H, T, 1 + N)."""

  def method(model: MaskVLM) -> jax.Array:
    asked = ask_text(x_BTD, text_valid_BT, y_BID)
    h_BTD = model.text_cross.body(*asked)
    return model.text_cross.attention(h_BTD, *asked[1:])

  return _apply(params, config, method)


def complete_patches(
  params: Params,
  batch: Batch,
  text_ids_BT: jax.Array,
  text_valid_BT: jax.Array,
  *,
  config: Config,
  key: jax.Array,
) -> completed.Completed:
  """The hidden blocks of the batch, from other texts than its own.

  Args:
    params: as made by `init`.
    batch: images and their blocks.
    text_ids_BT: what the images are completed from.
    text_valid_BT: its tokens.
    config: the run's.
    key: not read here.
  """
  asked = dataclasses.replace(
    batch, text_ids_BT=text_ids_BT, text_valid_BT=text_valid_BT
  )

  def method(model: MaskVLM) -> jax.Array:
    images = encode_images(model, asked, ("block",), config)
    texts = encode_texts(model, asked, ("full",))
    encoded = Encoded(images, texts, None)
    fused = fuse_images(model, asked, encoded, None)
    return model.pixel_head(decode(model, asked, encoded, fused))

  return completed.compare(
    _apply(params, config, method), batch.image_BYXC, batch.block_idx_BI, config
  )


def word_logits(params: Params, batch: Batch, *, config: Config) -> jax.Array:
  """Logits of the masked words from the image, (B, J, V)."""

  def method(model: MaskVLM) -> jax.Array:
    images = encode_images(model, batch, ("full",), config)
    texts = encode_texts(model, batch, ("mlm",))
    encoded = Encoded(images, texts, None)
    return model.mlm_head(fuse_texts(model, batch, encoded, None)["mlm"])

  return _apply(params, config, method)
