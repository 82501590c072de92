"""The systems, by the name that `config.system` gives.

A new system is a file here that says which views are encoded and fused and
which objective reads which, and an entry in SYSTEMS. Training, evaluation,
export and report reach it through `find` alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax

from glscl_jax.config import Config
from glscl_jax.systems import glscl, glscl_flops
from glscl_jax.systems.flops import Forward
from glscl_jax.types import LossOutput, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class System:
  """What a system offers; all functions are pure and take `config=`."""

  # Training.
  init: Callable[[Config, jax.Array], Params]
  loss: Callable[..., LossOutput]  # (params, batch, config=, key=)
  forward: Callable[[Config], Forward]  # FLOPs
  # Retrieval.
  encode_image: Callable[..., jax.Array]  # (params, image_BYXC)
  encode_text: Callable[..., jax.Array]  # (params, text_ids_BT, text_valid_BT)
  image_vectors: Callable[..., jax.Array]  # (params, y_BID), unit
  text_vectors: Callable[..., jax.Array]  # (params, x_BTD), unit
  match_scores: Callable[
    ..., jax.Array
  ]  # (params, x_BTD, text_valid_BT, y_BID)
  # Report.
  cross_attention: Callable[..., jax.Array]  # as match_scores


SYSTEMS = {
  "glscl": System(
    init=glscl.init,
    loss=glscl.loss,
    forward=glscl_flops.forward,
    encode_image=glscl.encode_image,
    encode_text=glscl.encode_text,
    image_vectors=glscl.image_vectors,
    text_vectors=glscl.text_vectors,
    match_scores=glscl.match_scores,
    cross_attention=glscl.cross_attention,
  ),
}


def find(config: Config) -> System:
  """The system of a run."""
  return SYSTEMS[config.system]
