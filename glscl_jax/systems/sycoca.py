"""SyCoCa (2401.02137), and with it CoCa (2205.01917) and CLIP (2103.00020).

    total = ITC + 2 IC + TG-MIM                          (docs/systems.md)

    v, Z = f_i(I)     t, U = f_t(T)     Z_m = f_i(I, `high` patches hidden)

    ITC     contrast of v and t
    IC      the caption decoder asks Z, without the patches `low`, with U
    TG-MIM  the image decoder asks U with Z_m: the pixels of `high`

The caption tells the two sets apart (objectives/attentive.py): the text has to
supply the patches it speaks of, the image is read without those it does not.
Weights of 0 remove passes and parameters: CoCa is ITC + IC with
`masking.ic_mask` off, CLIP is ITC alone.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from glscl_jax import draws
from glscl_jax.config import Config
from glscl_jax.data import masking
from glscl_jax.models import attention, cross_stack, layers, vision
from glscl_jax.models.sycoca import SyCoCa
from glscl_jax.objectives import (
  attentive,
  captioning,
  contrastive,
  masked_regression,
)
from glscl_jax.systems import completed, encoders, inputs, terms
from glscl_jax.types import Batch, Params


def needs_split(config: Config) -> bool:
  """Whether an active objective hides or leaves out patches."""
  active = config.objectives.active
  return "tg_mim" in active or ("ic" in active and config.masking.ic_mask)


def needs_scores(config: Config) -> bool:
  """Whether the caption tells these patches."""
  return needs_split(config) and config.masking.split == "attentive"


def image_versions(config: Config) -> tuple[str, ...]:
  """Those that are encoded: full (I), hidden (I without `high`)."""
  active = config.objectives.active
  at_input = config.masking.mim_mask_level == "input"
  hidden = "tg_mim" in active and at_input
  full = active != ("tg_mim",) or not at_input
  return ("full",) * full + ("hidden",) * hidden


def needs_text(config: Config) -> bool:
  """Not where pixels are completed from pixels alone."""
  return config.objectives.active != ("tg_mim",) or config.model.fusion.mim_text


def count_split(config: Config) -> tuple[int, int]:
  """How many patches are `high`, and how many `low`."""
  num_patches = config.model.vision.num_patches
  return (
    masking.round_half_up(config.masking.r_high * num_patches),
    masking.round_half_up(config.masking.r_low * num_patches),
  )


@dataclasses.dataclass(frozen=True)
class Encoded:
  """What the clean pass of each encoder gives; None: nobody reads it."""

  patches_BID: jax.Array | None  # embedded
  image_BMD: jax.Array | None  # v, Z
  text_BLD: jax.Array | None  # U, class row; before LN_final


def embed_image(
  model: SyCoCa, batch: Batch, config: Config, hidden_BJ: jax.Array | None
) -> jax.Array:
  """Patch embeddings (B, I, D); a stem does not see the patches `hidden`."""
  visible_BI = None
  if hidden_BJ is not None:
    num_patches = config.model.vision.num_patches
    visible_BI = ~vision.named_patches(hidden_BJ, num_patches)
  image_BYXC = inputs.normalize_images(batch.image_BYXC, config)
  embedded = inputs.embed_versions(
    model.vision, image_BYXC, {"one": visible_BI}
  )
  return embedded["one"]


def encode(model: SyCoCa, batch: Batch, config: Config) -> Encoded:
  """The complete image and the text, as far as they are read."""
  patches_BID = image_BMD = text_BLD = None
  complete = "full" in image_versions(config)
  if complete or not config.model.vision.stem:
    patches_BID = embed_image(model, batch, config, None)
  if complete:
    image_BMD = model.vision.encode(model.vision.complete(patches_BID))
  if needs_text(config):
    text_BLD = model.text(batch.text_ids_BT, batch.text_valid_BT)
  return Encoded(patches_BID, image_BMD, text_BLD)


def joint_vectors(
  model: SyCoCa, encoded: Encoded
) -> tuple[jax.Array, jax.Array]:
  """ITC vectors of texts and images, float32, not yet normalised."""
  return (
    model.text_projection(model.text.finish(encoded.text_BLD[:, -1])),
    model.image_projection(encoded.image_BMD[:, 0]),
  )


def patch_scores(
  model: SyCoCa, batch: Batch, encoded: Encoded
) -> tuple[jax.Array, jax.Array]:
  """Scores in the space of ITC (B, I), and which texts have a word (B,)."""

  def project(projection: Callable, x_BLD: jax.Array) -> jax.Array:
    rows_AD = x_BLD.reshape(-1, x_BLD.shape[-1])
    return projection(rows_AD).reshape(*x_BLD.shape[:2], -1)

  words_BTD = model.text.finish(encoded.text_BLD[:, :-1])
  content_BT = attentive.content_words(batch.text_valid_BT)
  scores_BI = attentive.scores(
    project(model.image_projection, encoded.image_BMD[:, 1:]),
    project(model.text_projection, words_BTD),
    content_BT,
  )
  return scores_BI, jnp.any(content_BT, axis=1)


def split_patches(
  model: SyCoCa,
  batch: Batch,
  encoded: Encoded,
  config: Config,
  key: jax.Array,
  step: jax.Array | int | None,
) -> attentive.Split:
  """`high` and all but `low`, by the caption or at random."""
  options = config.masking
  num_high, num_low = count_split(config)
  shape = batch.text_ids_BT.shape[0], config.model.vision.num_patches
  noise_BI = draws.uniform(key, shape)
  chosen_BI = noise_BI
  if options.split == "attentive":
    chosen_BI, told_B = patch_scores(model, batch, encoded)
    if options.attentive_empty == "random":
      chosen_BI = jnp.where(told_B[:, None], chosen_BI, noise_BI)
    if options.mask_warmup_steps and step is not None:
      early = jnp.asarray(step) < options.mask_warmup_steps
      chosen_BI = jnp.where(early, noise_BI, chosen_BI)
  return attentive.split(chosen_BI, num_high=num_high, num_low=num_low)


@dataclasses.dataclass(frozen=True)
class Context:
  """What an objective may read."""

  model: SyCoCa
  batch: Batch
  encoded: Encoded
  split: attentive.Split | None  # None: no objective hides a patch
  config: Config


def caption_logits(context: Context) -> jax.Array:
  """Logits of each next token, (B, T - 1, V).

  The last token predicts nothing and is left out, as is the class row.
  """
  model, encoded = context.model, context.encoded
  keys_BMD = encoded.image_BMD[:, 1:]
  if context.config.masking.ic_mask:
    keys_BMD = layers.take_rows(keys_BMD, context.split.keep_BM)
  asked = keys_BMD, context.batch.text_valid_BT[:, :-1], None
  h_BLD = model.caption_decoder.body(encoded.text_BLD[:, :-2], *asked)
  return model.caption_head(model.caption_decoder.head(h_BLD, *asked))


def _ic(context: Context) -> terms.Term:
  """IC = CE(head(caption decoder(U | Z without low)), next tokens)."""
  logits_BLV = caption_logits(context)
  text = context.batch.text_ids_BT, context.batch.text_valid_BT
  number = terms.count(context.batch.text_valid_BT[:, 1:])
  loss = terms.Mean(captioning.captioning(logits_BLV, *text), number)
  accuracy = terms.Mean(captioning.accuracy(logits_BLV, *text), number)
  return terms.Term((loss,), {"ic_accuracy": accuracy})


def hidden_states(context: Context) -> jax.Array:
  """States of all patches, the `high` ones hidden, (B, I, D).

  At the level "feature" they are hidden where the encoder ends; the others
  have seen them by then.
  """
  model, config = context.model, context.config
  high_BJ = context.split.high_BJ
  if config.masking.mim_mask_level == "feature":
    return model.vision.put_token(context.encoded.image_BMD[:, 1:], high_BJ)
  patches_BID = context.encoded.patches_BID
  if config.model.vision.stem:  # which mixes neighbours: embedded without them
    patches_BID = embed_image(model, context.batch, config, high_BJ)
  return model.vision.encode(model.vision.hide(patches_BID, high_BJ))[:, 1:]


def reconstruct(context: Context) -> jax.Array:
  """States of the image decoder at the hidden patches, (B, J, D)."""
  model, encoded = context.model, context.encoded
  h_BID = hidden_states(context)
  h_BID += model.image_positions()[None].astype(h_BID.dtype)
  asked = None, None, None
  if context.config.model.fusion.mim_text:
    asked = encoded.text_BLD[:, :-1], None, context.batch.text_valid_BT
  h_BID = model.image_decoder.body(h_BID, *asked)
  return model.image_decoder.head(h_BID, *asked, context.split.high_BJ)


def _tg_mim(context: Context) -> terms.Term:
  """TG-MIM = (head(image decoder(Z_m | U)) - pixels)^2, of `high` patches."""
  config = context.config
  loss = masked_regression.masked_regression(
    context.model.pixel_head(reconstruct(context)),
    inputs.pixel_targets(context.batch.image_BYXC, config),
    context.split.high_BJ,
    loss=config.objectives.mim_loss,
    patch_norm=config.objectives.mim_patch_norm,
  )
  number = float(context.split.high_BJ.size)
  return terms.Term((terms.Mean(loss, number),), {})


LOCAL: dict[str, Callable[[Context], terms.Term]] = {
  "ic": _ic,
  "tg_mim": _tg_mim,
}


def _parts(
  model: SyCoCa,
  batch: Batch,
  config: Config,
  key: jax.Array,
  step: jax.Array | int | None,
) -> terms.Parts:
  active = config.objectives.active
  encoded = encode(model, batch, config)
  split = None
  if needs_split(config):
    split = split_patches(model, batch, encoded, config, key, step)
  context = Context(model, batch, encoded, split, config)
  return terms.Parts(
    local={name: LOCAL[name](context) for name in active if name in LOCAL},
    features=(
      {"itc": joint_vectors(model, encoded)} if "itc" in active else {}
    ),
  )


def parts(
  params: Params,
  batch: Batch,
  *,
  config: Config,
  key: jax.Array,
  step: jax.Array | int | None = None,
) -> terms.Parts:
  """All passes of a batch, or of a micro-batch, up to its contrast.

  Args:
    params: as made by `init`.
    batch: no mask of it is read.
    config: the run's; `train.seed` is not read here.
    key: patches that are hidden at random in this step.
    step: before `masking.mask_warmup_steps` all are; None: after it.
  """
  return SyCoCa(config.model).apply(
    {"params": params}, batch, config, key, step, method=_parts
  )


def contrast(
  params: Params,
  features: Mapping[str, terms.Joint],
  batch: Batch,
  *,
  config: Config,
) -> dict[str, terms.Term]:
  """ITC of a whole batch: symmetric InfoNCE of v and t, tau = exp(-theta)."""
  return SyCoCa(config.model).apply(
    {"params": params}, features, batch, config, method=terms.joint_contrast
  )


loss = terms.make_loss(parts, contrast)


def init(config: Config, key: jax.Array) -> Params:
  """Parameters of everything the active objectives read, float32."""

  def method(model: SyCoCa, batch: Batch) -> None:
    found = _parts(model, batch, config, key, None)
    terms.joint_contrast(model, found.features, batch, config)

  return SyCoCa(config.model).init(
    {"params": key}, inputs.example_batch(config), method=method
  )["params"]


_apply = functools.partial(encoders.apply, SyCoCa)
encode_visual = functools.partial(encoders.encode_visual, SyCoCa)
# States before LN_final, (B, T + 1, D), the class row last.
encode_text = functools.partial(encoders.encode_text, SyCoCa)


def text_vectors(
  params: Params, x_BLD: jax.Array, *, config: Config
) -> jax.Array:
  """Unit ITC vectors (B, E) of `encode_text`'s states."""

  def method(model: SyCoCa) -> jax.Array:
    return model.text_projection(model.text.finish(x_BLD[:, -1]))

  return contrastive.normalize(_apply(params, config, method))


def image_vectors(
  params: Params, y_BID: jax.Array, *, config: Config
) -> jax.Array:
  """Unit ITC vectors (B, E) of `encode_visual`'s states."""
  return contrastive.normalize(
    _apply(params, config, lambda model: model.image_projection(y_BID[:, 0]))
  )


def cross_attention(
  params: Params,
  x_BLD: jax.Array,
  text_valid_BT: jax.Array,
  y_BMD: jax.Array,
  *,
  config: Config,
) -> jax.Array:
  """Text-to-image attention of the caption decoder's last block.

  Returns:
    (B, H, T, 1 + N). Row l asks for the token after l. All patches are there;
    the class token is not asked: its column, the first one, is 0.
  """

  def method(model: SyCoCa) -> jax.Array:
    asked = y_BMD[:, 1:], text_valid_BT, None
    h_BTD = model.caption_decoder.body(x_BLD[:, :-1], *asked)
    return model.caption_decoder.attention(h_BTD, *asked)

  maps_BHTI = _apply(params, config, method)
  return jnp.pad(maps_BHTI, ((0, 0), (0, 0), (0, 0), (1, 0)))


def complete_patches(
  params: Params,
  batch: Batch,
  text_ids_BT: jax.Array,
  text_valid_BT: jax.Array,
  *,
  config: Config,
  key: jax.Array,
) -> completed.Completed:
  """The patches that the batch's own captions hide, from other texts.

  Args:
    params: as made by `init`.
    batch: images and the texts that tell which patches are hidden.
    text_ids_BT: what the images are completed from.
    text_valid_BT: its tokens.
    config: the run's.
    key: patches that are hidden at random.
  """

  def method(model: SyCoCa) -> tuple[jax.Array, jax.Array]:
    encoded = encode(model, batch, config)
    split = split_patches(model, batch, encoded, config, key, None)
    if needs_text(config):
      other_BLD = model.text(text_ids_BT, text_valid_BT)
      encoded = dataclasses.replace(encoded, text_BLD=other_BLD)
    other = dataclasses.replace(batch, text_valid_BT=text_valid_BT)
    context = Context(model, other, encoded, split, config)
    return model.pixel_head(reconstruct(context)), split.high_BJ

  prediction_BJP, high_BJ = _apply(params, config, method)
  return completed.compare(prediction_BJP, batch.image_BYXC, high_BJ, config)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CaptionPast:
  """What both causal stacks keep of captions that grow, and of their images."""

  text: attention.Past
  decoder: cross_stack.StackPast

  def take(self, rows_A: jax.Array) -> CaptionPast:
    """Of some captions; those of an image lie side by side and stay by it."""
    return CaptionPast(self.text.take(rows_A), self.decoder.take(rows_A))


def _extend(
  model: SyCoCa, ids_A: jax.Array, y_BMD: jax.Array | None, past: CaptionPast
) -> tuple[jax.Array, CaptionPast]:
  """Logits after one more token, (A, V); without y the images are known."""
  x_A1D, text = model.text.extend(ids_A[:, None], past.text)
  h_A1D, decoder = model.caption_decoder.extend(x_A1D, y_BMD, past.decoder)
  return model.caption_head(h_A1D[:, 0]), CaptionPast(text, decoder)


def begin_captions(
  params: Params,
  ids_B: jax.Array,
  y_BID: jax.Array,
  *,
  length: int,
  config: Config,
) -> tuple[jax.Array, CaptionPast]:
  """Logits of the token after the first one, (B, V), and what is kept.

  All patches are there, as in `cross_attention`.

  Args:
    params: as made by `init`.
    ids_B: the first token.
    y_BID: of `encode_visual`.
    length: room for tokens, the first one included.
    config: the run's.
  """

  def method(model: SyCoCa) -> tuple[jax.Array, CaptionPast]:
    size = ids_B.shape[0], length
    past = CaptionPast(
      model.text.start(*size), model.caption_decoder.start(*size)
    )
    return _extend(model, ids_B, y_BID[:, 1:], past)

  return _apply(params, config, method)


def extend_captions(
  params: Params, ids_A: jax.Array, past: CaptionPast, *, config: Config
) -> tuple[jax.Array, CaptionPast]:
  """Logits of the token after one more, (A, V), and what is kept."""
  return _apply(params, config, lambda model: _extend(model, ids_A, None, past))


def describe_fusion(config: Config) -> str:
  """The decoders that the active objectives have."""
  depths = {
    "ic": f"caption decoder of depth {config.model.fusion.text_depth}",
    "tg_mim": f"image decoder of depth {config.model.fusion.image_depth}",
  }
  there = [depths[n] for n in config.objectives.active if n in depths]
  return ", ".join(there) or "none"


def describe_hidden(config: Config) -> str:
  """Which patches TG-MIM hides."""
  share = f"{100 * config.masking.r_high:g} % of the patches"
  if config.masking.split == "random":
    return f"a random {share}"
  return f"the {share} that the drawing's own caption speaks of most"
