"""The systems, by the name that `config.system` gives.

A new system is a file here that says which views are encoded and fused and
which objective reads which, and an entry in SYSTEMS. Training, evaluation,
export and report reach it through `find` alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from glscl_jax.config import Config
from glscl_jax.systems import (
  cmal,
  cmal_flops,
  glscl,
  glscl_flops,
  inputs,
  maskvlm,
  maskvlm_flops,
  sycoca,
  sycoca_flops,
  terms,
)
from glscl_jax.systems.answers import Answers
from glscl_jax.systems.completed import Completed
from glscl_jax.systems.flops import Forward
from glscl_jax.types import Batch, LossOutput, Params, Visual


@dataclasses.dataclass(frozen=True, kw_only=True)
class System:
  """What a system offers; all functions are pure and take `config=`."""

  # Training.
  init: Callable[[Config, jax.Array], Params]
  # What a batch, or a micro-batch, says before its samples meet all others:
  # (params, batch, config=, key=, step=).
  parts: Callable[..., terms.Parts]
  # And what the features of all say: (params, features, batch, config=).
  contrast: Callable[..., dict[str, terms.Term]] = terms.no_contrast
  weights: Callable[..., dict[str, Any]] = terms.weights  # (config, key)
  forward: Callable[[Config], Forward]  # FLOPs
  # Retrieval.
  see: Callable[[Batch], Visual]  # what it reads of a batch beside the text
  encode_visual: Callable[..., jax.Array]  # (params, Visual)
  encode_text: Callable[..., jax.Array]  # (params, text_ids_BT, text_valid_BT)
  image_vectors: Callable[..., jax.Array] | None  # (params, y_BMD), unit; None:
  # no contrastive space
  text_vectors: Callable[..., jax.Array] | None  # (params, x_BLD), unit
  match_scores: Callable[..., jax.Array] | None  # (params, x_BTD,
  # text_valid_BT, y_BMD, Visual.valid); None: no image-text matching
  # Captions; None: writes no texts. Both give logits (A, V) of the next token
  # and what is kept for it: (params, ids_B, y_BMD, length=) begins, (params,
  # ids_A, what is kept) goes on.
  begin_captions: Callable[..., tuple[jax.Array, Any]] | None = None
  extend_captions: Callable[..., tuple[jax.Array, Any]] | None = None
  # Anchors of words and regions: (params, batch); None: it knows none.
  answer: Callable[..., Answers] | None = None
  answered: Callable[[Config], frozenset[str]] | None = None  # its fields that
  # an objective trains
  # Report.
  cross_attention: Callable[..., jax.Array] | None  # (params, x_BTD,
  # text_valid_BT, y_BMD); None: images are not seen patch by patch
  attention_part: str | None  # parameters that cross_attention needs
  describe_fusion: Callable[[Config], str]
  # By title; None: encoders of images and of texts, by their sizes.
  describe_inputs: Callable[[Config], dict[str, str]] | None = None
  # Hidden patches: (params, batch, text_ids_BT, text_valid_BT, key=); the
  # objective that trains it; which are hidden.
  complete_patches: Callable[..., Completed] | None = None
  patch_objective: str = ""
  describe_hidden: Callable[[Config], str] | None = None
  # Logits (B, J, V) of masked words, from the image: (params, batch).
  word_logits: Callable[..., jax.Array] | None = None
  word_objective: str = ""

  @property
  def loss(self) -> Callable[..., LossOutput]:
    """The loss of a whole batch, (params, batch, config=, key=, step=)."""
    return terms.make_loss(self.parts, self.contrast, self.weights)


SYSTEMS = {
  "glscl": System(
    init=glscl.init,
    parts=glscl.parts,
    contrast=glscl.contrast,
    forward=glscl_flops.forward,
    see=inputs.see_images,
    encode_visual=glscl.encode_visual,
    encode_text=glscl.encode_text,
    image_vectors=glscl.image_vectors,
    text_vectors=glscl.text_vectors,
    match_scores=glscl.match_scores,
    cross_attention=glscl.cross_attention,
    attention_part="fusion.last.text",
    describe_fusion=lambda config: (
      f"co-attention, depth {config.model.fusion.depth} a stream"
    ),
  ),
  "maskvlm": System(
    init=maskvlm.init,
    parts=maskvlm.parts,
    contrast=maskvlm.contrast,
    forward=maskvlm_flops.forward,
    see=inputs.see_images,
    encode_visual=maskvlm.encode_visual,
    encode_text=maskvlm.encode_text,
    image_vectors=maskvlm.image_vectors,
    text_vectors=maskvlm.text_vectors,
    match_scores=maskvlm.match_scores,
    cross_attention=maskvlm.cross_attention,
    attention_part="text_cross.last",
    complete_patches=maskvlm.complete_patches,
    patch_objective="mim",
    describe_hidden=lambda config: (
      f"random blocks of {config.masking.image_block_size} px, "
      f"{100 * config.masking.image_block_ratio:g} % of them, rounded up"
    ),
    word_logits=maskvlm.word_logits,
    word_objective="mlm",
    describe_fusion=lambda config: (
      f"cross-attention, depth {config.model.fusion.image_depth} (image), "
      f"{config.model.fusion.text_depth} (text), "
      f"{config.model.fusion.decoder_depth} (pixel decoder)"
    ),
  ),
  "sycoca": System(
    init=sycoca.init,
    parts=sycoca.parts,
    contrast=sycoca.contrast,
    forward=sycoca_flops.forward,
    see=inputs.see_images,
    encode_visual=sycoca.encode_visual,
    encode_text=sycoca.encode_text,
    image_vectors=sycoca.image_vectors,
    text_vectors=sycoca.text_vectors,
    match_scores=None,
    begin_captions=sycoca.begin_captions,
    extend_captions=sycoca.extend_captions,
    cross_attention=sycoca.cross_attention,
    attention_part="caption_decoder.last",
    complete_patches=sycoca.complete_patches,
    patch_objective="tg_mim",
    describe_hidden=sycoca.describe_hidden,
    describe_fusion=sycoca.describe_fusion,
  ),
  "cmal": System(
    init=cmal.init,
    parts=cmal.parts,
    weights=cmal.weights,
    forward=cmal_flops.forward,
    see=inputs.see_regions,
    encode_visual=cmal.encode_visual,
    encode_text=cmal.encode_text,
    image_vectors=None,
    text_vectors=None,
    match_scores=cmal.match_scores,
    answer=cmal.answer,
    answered=cmal.answered,
    cross_attention=None,
    attention_part=None,
    describe_inputs=cmal.describe_inputs,
    describe_fusion=lambda config: (
      f"one stack over words and regions, depth {config.model.fusion.depth}"
    ),
  ),
}


def find(config: Config) -> System:
  """The system of a run."""
  return SYSTEMS[config.system]
