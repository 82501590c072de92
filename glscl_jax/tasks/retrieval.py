"""Image-text retrieval, both directions, by dual encoder and re-ranked.

Each image and each caption is encoded once. The dual encoder orders by the
cosine of the contrastive vectors, and may correct it by what another split, the
bank, says. Re-ranking scores pairs with the fusion layers: per image the
`rerank_k` captions of best cosine, per caption the `rerank_k` best images, a
pair that both ask for once.

  rerank           score of a candidate pair
  none             cosine
  querybank        cosine less what the bank gives the candidate
  querybank_conse  the same of vectors moved towards what they match in the bank
  itm              ITM logit difference, match - no match
  itm_plus_itc     ITM logit difference + itc_weight * cosine (LAVIS: weight 1)
  full             ITM logit difference, every pair is a candidate

Ranks and ties: tasks/ranking.py. Shape letters beside those of types.py:
U images of the split, Z captions, Q queries, A candidates, J candidates of a
query that are scored again.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from glscl_jax import config as config_lib
from glscl_jax import errors, sharding
from glscl_jax.data import pipeline
from glscl_jax.data import retrieval_set as retrieval_sets
from glscl_jax.data import tokenizer as tokenizers
from glscl_jax.systems import registry
from glscl_jax.tasks import conse, querybank, ranking
from glscl_jax.types import Params

Rerank = Literal[
  "none", "querybank", "querybank_conse", "itm", "itm_plus_itc", "full"
]
RERANKS = get_args(Rerank)
DIRECTIONS = ("i2t", "t2i")
DEFAULT_RERANK_K = 128
SHOWN = 10  # best candidates kept for predictions

OnProgress = Callable[[str, int, int], None]  # stage, done, total


class RetrievalError(errors.UserError):
  """A measurement that cannot be made; the message says why."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Protocol:
  """How candidates are ordered; part of every result."""

  rerank: Rerank = "none"
  querybank: str = "train"  # split whose queries are the bank
  querybank_temperature: float = 0.1  # in cosines; .05 in the paper [choice]
  conse_temperature: float = 0.03  # in cosines; near what ITC learns [choice]
  rerank_k: int = DEFAULT_RERANK_K  # candidates a query of itm, itm_plus_itc
  itc_weight: float = 1.0  # itm_plus_itc only
  captions: retrieval_sets.CaptionChoice = "first"
  views: int = 1  # of an image, whose mean vector counts [choice]
  limit: int = 0  # images of a split, from the first stored on; 0: all

  def __post_init__(self):
    if self.rerank not in RERANKS:
      raise RetrievalError(f"rerank={self.rerank!r} is not one of {RERANKS}")
    if self.rerank_k < 1:
      raise RetrievalError(f"rerank_k must be positive, is {self.rerank_k}")
    if self.views < 1:
      raise RetrievalError(f"views must be positive, is {self.views}")
    if self.limit < 0:
      raise RetrievalError(f"limit must not be negative, is {self.limit}")
    for name in ("querybank_temperature", "conse_temperature"):
      if not getattr(self, name) > 0:
        raise RetrievalError(
          f"{name} must be positive, is {getattr(self, name)}"
        )

  @property
  def fuses(self) -> bool:
    """Whether the fusion layers score pairs."""
    return self.rerank != "none" and not self.asks_bank

  @property
  def asks_bank(self) -> bool:
    """Whether the vectors of the split `querybank` take part."""
    return self.rerank in ("querybank", "querybank_conse")

  @property
  def candidates(self) -> int | None:
    """Candidates a query that are scored again; None: all of them."""
    return None if self.rerank == "full" else self.rerank_k

  def describe(self) -> dict[str, Any]:
    """What a result file says about it; only what took part."""
    facts: dict[str, Any] = {"rerank": self.rerank, "captions": self.captions}
    if self.asks_bank:
      facts["querybank"] = self.querybank
      facts["querybank_temperature"] = self.querybank_temperature
    if self.rerank == "querybank_conse":
      facts["conse_temperature"] = self.conse_temperature
    if self.rerank in ("itm", "itm_plus_itc"):
      facts["rerank_k"] = self.rerank_k
    if self.rerank == "itm_plus_itc":
      facts["itc_weight"] = self.itc_weight
    if self.views > 1:
      facts["views"] = self.views
    if self.limit:
      facts["limit"] = self.limit
    facts["ties"] = "count against the model"
    facts["unit"] = "R@k are shares of the queries"
    return facts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encodings:
  """A split encoded once. Token arrays stay on the device, or are None."""

  retrieval_set: retrieval_sets.RetrievalSet  # undecodable images left out
  image_UE: np.ndarray  # float32, unit
  text_ZE: np.ndarray  # float32, unit
  image_row_U: np.ndarray  # row of `image_tokens`
  image_tokens: jax.Array | None  # (A, I, D), padding rows included
  image_valid: jax.Array | None  # (A, I); None: all are
  text_tokens: jax.Array | None  # (A, T, D), row = caption
  text_valid: jax.Array | None  # (A, T)
  caption_counts: Mapping[str, int]  # how many lost something; _count_losses
  seconds: float

  @functools.cached_property
  def cosine_UZ(self) -> np.ndarray:
    """Cosines of all pairs, float32; a bank of queries needs none."""
    return self.image_UE @ self.text_ZE.T


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ranking:
  """One direction: the rank of each query and its best candidates."""

  rank_Q: np.ndarray
  top_QJ: np.ndarray  # candidate numbers, best first, at most SHOWN
  top_score_QJ: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fused:
  """ITM logit differences of the pairs that are candidates of somebody."""

  count: int | None  # candidates a query; None: all pairs
  captions_UJ: np.ndarray  # the candidates of each image, best cosine first
  images_ZJ: np.ndarray  # and of each caption
  pairs: np.ndarray  # image * Z + caption, ascending, each once
  scores: np.ndarray  # float32, of each pair
  seconds: float  # compilation included
  pairs_per_second: float | None  # after the first batch, which compiles


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rankings:
  """Both directions, and what the fusion layers cost."""

  i2t: Ranking
  t2i: Ranking
  fused: Fused | None  # None: by vectors alone
  bank: Encodings | None  # None: no other split took part


@dataclasses.dataclass(frozen=True)
class _Programs:
  """The compiled parts, made once per configuration and mesh."""

  encode_images: Callable[..., tuple[jax.Array, jax.Array]]
  encode_texts: Callable[..., tuple[jax.Array, jax.Array]]
  match: Callable[..., jax.Array]
  place: Callable[[np.ndarray], Any]  # rows of a batch over the mesh
  replicate: Callable[[np.ndarray], Any]


# Kept across calls: the train loop evaluates many times with one config.
@functools.lru_cache(maxsize=4)
def _make_programs(
  config: config_lib.Config, mesh: jax.sharding.Mesh | None
) -> _Programs:
  system = registry.find(config)

  def vectors(project, params, states_BLD):
    if config.objectives.itc == 0:
      return jnp.zeros((states_BLD.shape[0], 0))
    return project(params, states_BLD, config=config)

  # Without re-ranking no token state leaves the devices.
  def encode_images(params, visual, *, keep):
    y_BID = system.encode_visual(params, visual, config=config)
    image_BE = vectors(system.image_vectors, params, y_BID)
    return y_BID if keep else None, image_BE

  def encode_texts(params, text_ids_BT, text_valid_BT, *, keep):
    x_BLD = system.encode_text(
      params, text_ids_BT, text_valid_BT, config=config
    )
    text_BE = vectors(system.text_vectors, params, x_BLD)
    return x_BLD if keep else None, text_BE

  def take(states, rows_B):
    return jax.tree.map(lambda leaf: leaf[rows_B], states)

  def match(params, texts, images, text_row_B, image_row_B):
    x_BTD, valid_BT = take(texts, text_row_B)
    y_BID, valid_BI = take(images, image_row_B)
    return system.match_scores(
      params, x_BTD, valid_BT, y_BID, valid_BI, config=config
    )

  compiled = functools.partial(jax.jit, static_argnames="keep")
  if mesh is None:
    return _Programs(
      compiled(encode_images),
      compiled(encode_texts),
      jax.jit(match),
      np.asarray,
      jnp.asarray,
    )
  # Replicated outputs can be read on every process of a pod.
  everywhere = sharding.replicated(mesh)
  compiled = functools.partial(compiled, out_shardings=everywhere)
  return _Programs(
    compiled(encode_images),
    compiled(encode_texts),
    jax.jit(match, out_shardings=everywhere),
    functools.partial(_put, sharding=sharding.batch_sharding(mesh)),
    functools.partial(_put, sharding=everywhere),
  )


def _put(array: np.ndarray, *, sharding: jax.sharding.Sharding) -> jax.Array:
  """Makes a global array of an array that every process holds whole."""
  return jax.make_array_from_callback(
    array.shape, sharding, lambda index: array[index]
  )


def encode(
  params: Params,
  retrieval_set: retrieval_sets.RetrievalSet,
  *,
  config: config_lib.Config,
  tokenizer: tokenizers.Tokenizer,
  batch_size: int = 64,
  keep_tokens: bool = False,
  views: int = 1,
  mesh: jax.sharding.Mesh | None = None,
  on_progress: OnProgress | None = None,
) -> Encodings:
  """Encodes every image and every caption of a split once.

  Vectors of a model that was trained without ITC have width 0; its tokens can
  be scored by fusion.

  Args:
    params: of the model that `config` describes.
    retrieval_set: the split.
    config: the run's; image size, text length and normalisation are read.
    tokenizer: the one the model was trained with.
    batch_size: images or captions a call; rounded up to fill the mesh.
    keep_tokens: keep the outputs of both encoders for re-ranking.
    views: of an image: the whole one, and random ones by `view_augment`. The
      mean of their vectors stands for it; tokens are those of the whole one.
    mesh: spread batches over it; None: where `params` are.
    on_progress: called as (stage, done, total).

  Raises:
    RetrievalSetError: no image can be decoded.
    RetrievalError: the model gives vectors that are not finite.
  """
  started = time.perf_counter()
  programs = _make_programs(config, mesh)
  settings = {
    "batch_size": _round_to_mesh(batch_size, mesh),
    "keep_tokens": keep_tokens,
    "tell": on_progress or (lambda *_: None),
  }
  image_tokens, image_valid, image_AE, ok_A, bad = _encode_images(
    params, retrieval_set, programs, config, **settings
  )
  for view in range(1, views):
    again = settings | {"keep_tokens": False}
    image_AE += _encode_images(
      params, retrieval_set, programs, config, view=view, **again
    )[2]
  if views > 1:
    image_AE = conse.unit(image_AE)
  kept = retrieval_sets.keep_images(retrieval_set, ok_A, bad)
  text_tokens, text_ZE, valid, caption_counts = _encode_texts(
    params, kept.captions, programs, config, tokenizer, **settings
  )
  image_UE = image_AE[ok_A]
  if not (np.isfinite(image_UE).all() and np.isfinite(text_ZE).all()):
    raise RetrievalError(
      f"split {kept.split!r}: the model gives vectors that are not finite"
    )
  return Encodings(
    retrieval_set=kept,
    image_UE=image_UE,
    text_ZE=text_ZE,
    image_row_U=np.flatnonzero(ok_A),
    image_tokens=jnp.concatenate(image_tokens) if keep_tokens else None,
    image_valid=(
      None
      if image_valid is None or not keep_tokens
      else programs.replicate(image_valid)
    ),
    text_tokens=jnp.concatenate(text_tokens) if keep_tokens else None,
    text_valid=programs.replicate(valid) if keep_tokens else None,
    caption_counts=caption_counts,
    seconds=time.perf_counter() - started,
  )


def _encode_images(
  params: Params,
  retrieval_set: retrieval_sets.RetrievalSet,
  programs: _Programs,
  config: config_lib.Config,
  *,
  batch_size: int,
  keep_tokens: bool,
  tell: OnProgress,
  view: int = 0,
) -> tuple[
  list[jax.Array],
  np.ndarray | None,
  np.ndarray,
  np.ndarray,
  tuple[str, ...],
]:
  """Token batches, their validity, (A, E) vectors, (A,) ok, the bad ones."""
  stage = f"view {view}" if view else "images"
  tokens, valid, vectors, ok, bad = [], [], [], [], []
  total = retrieval_set.num_images
  for batch in retrieval_sets.image_batches(
    retrieval_set,
    batch_size=batch_size,
    image_size=config.model.vision.image_size,
    num_threads=config.data.num_threads,
    num_regions=(
      config.model.region.number if pipeline.reads_regions(config) else None
    ),
    view=view,
    augment=view_augment(config),
  ):
    visual = jax.tree.map(programs.place, batch.visual)
    y, vector = programs.encode_images(params, visual, keep=keep_tokens)
    tokens.append(y)
    valid.append(batch.visual.valid)
    vectors.append(vector)
    # The host decodes the next batch while this one is computed.
    vectors[-2:-1] = [np.asarray(done, np.float32) for done in vectors[-2:-1]]
    ok.append(batch.ok_B)
    bad.extend(batch.bad)
    tell(stage, min(batch.start + batch_size, total), total)
  return (
    tokens,
    None if valid[0] is None else np.concatenate(valid),
    np.concatenate([np.asarray(v, np.float32) for v in vectors])[:total],
    np.concatenate(ok)[:total],
    tuple(bad),
  )


def view_augment(config: config_lib.Config) -> config_lib.AugmentConfig:
  """The training's crops or, half as strong, its warps; nothing else."""
  augment = config.data.augment
  return dataclasses.replace(
    augment,
    warp=augment.warp / 2,
    recolor=0.0,
    randaugment_ops=0,
    hflip="off",
    resize="pillow",  # as the whole image is
  )


def _encode_texts(
  params: Params,
  captions: tuple[str, ...],
  programs: _Programs,
  config: config_lib.Config,
  tokenizer: tokenizers.Tokenizer,
  *,
  batch_size: int,
  keep_tokens: bool,
  tell: OnProgress,
) -> tuple[list[jax.Array], np.ndarray, np.ndarray, dict[str, int]]:
  """Token batches, (Z, E) vectors, (Z + padding, T) validity, and losses."""
  total = len(captions)
  encoded = [
    tokenizer.encode(text, config.model.text.max_length) for text in captions
  ]
  # Padding rows repeat row 0: a real text, so every row has a valid token.
  padded = encoded + encoded[:1] * (-total % batch_size)
  ids = np.stack([item.ids_T for item in padded])
  valid = np.stack([item.valid_T for item in padded])
  tokens, vectors = [], []
  for start in range(0, total, batch_size):
    rows = slice(start, start + batch_size)
    x, vector = programs.encode_texts(
      params,
      programs.place(ids[rows]),
      programs.place(valid[rows]),
      keep=keep_tokens,
    )
    tokens.append(x)
    vectors.append(np.asarray(vector, np.float32))
    tell("captions", min(start + batch_size, total), total)
  losses = _count_losses(captions, encoded)
  return tokens, np.concatenate(vectors)[:total], valid, losses


def _count_losses(
  captions: Sequence[str], encoded: Sequence[tokenizers.Tokens]
) -> dict[str, int]:
  """Captions of which the text encoder sees less than is written.

  Truncated: longer than the limit. Unknown: a part has no piece of its own.
  Spelled: an unknown word is read as the known ones that spell it. Alike:
  another text has the same tokens, so no model can tell them apart.
  """
  texts = {}
  for text, item in zip(captions, encoded, strict=True):
    texts.setdefault(item.ids_T.tobytes(), set()).add(text)
  return {
    "num_truncated_captions": sum(item.truncated for item in encoded),
    "num_unknown_captions": sum(item.unknown for item in encoded),
    "num_spelled_captions": sum(item.spelled for item in encoded),
    "num_alike_captions": sum(
      len(texts[item.ids_T.tobytes()]) > 1 for item in encoded
    ),
  }


def _check_head(config: config_lib.Config, name: str, why: str) -> None:
  if getattr(config.objectives, name) == 0:
    raise RetrievalError(
      f"the model was trained with objectives.{name} = 0 and has no such "
      f"head, but {why}"
    )


def check_protocol(config: config_lib.Config, protocol: Protocol) -> None:
  """Checks that the model can order candidates as the protocol asks.

  Raises:
    RetrievalError: its system matches no pairs, or it was trained without what
      the protocol orders by.
  """
  if protocol.rerank != "full":
    _check_head(config, "itc", "the dual encoder orders by it; full needs none")
  if not protocol.fuses:
    return
  if registry.find(config).match_scores is None:
    raise RetrievalError(
      f"system {config.system!r} has no image-text matching, which re-ranking "
      "by itm, itm_plus_itc and full scores by: take none or querybank"
    )
  _check_head(config, "itm", "re-ranking scores by it")


def _round_to_mesh(size: int, mesh: jax.sharding.Mesh | None) -> int:
  if mesh is None:
    return size
  ways = mesh.shape["data"] * mesh.shape["fsdp"]
  return -(-size // ways) * ways


def fuse(
  params: Params,
  encodings: Encodings,
  *,
  config: config_lib.Config,
  count: int | None,
  pair_batch_size: int = 256,
  mesh: jax.sharding.Mesh | None = None,
  on_progress: OnProgress | None = None,
) -> Fused:
  """Scores the candidates of every image and caption with the fusion layers.

  Args:
    params: those that made the encodings.
    encodings: made with `keep_tokens`.
    config: the run's.
    count: candidates a query, by cosine; None: every pair.
    pair_batch_size: pairs a call of the fusion layers.
    mesh: as for `encode`.
    on_progress: as for `encode`.

  Raises:
    RetrievalError: encodings without tokens.
  """
  if encodings.image_tokens is None:
    raise RetrievalError("re-ranking needs encodings with keep_tokens=True")
  cosine_UZ = encodings.cosine_UZ
  relevant_UZ = encodings.retrieval_set.relevant_UZ
  num_images, num_captions = cosine_UZ.shape
  captions = ranking.best_candidates(
    cosine_UZ, relevant_UZ, count=count or num_captions
  )
  images = ranking.best_candidates(
    cosine_UZ.T, relevant_UZ.T, count=count or num_images
  )
  # A pair that both its image and its caption ask for is scored once.
  asked = (
    _pair_numbers(np.arange(num_images)[:, None], captions, num_captions),
    _pair_numbers(images, np.arange(num_captions)[:, None], num_captions),
  )
  pairs = np.unique(np.concatenate([numbers.ravel() for numbers in asked]))
  started = time.perf_counter()
  scores, per_second = _score_pairs(
    params,
    encodings,
    pairs,
    programs=_make_programs(config, mesh),
    batch_size=_round_to_mesh(min(pair_batch_size, len(pairs)), mesh),
    tell=on_progress or (lambda *_: None),
  )
  return Fused(
    count=count,
    captions_UJ=captions,
    images_ZJ=images,
    pairs=pairs,
    scores=scores,
    seconds=time.perf_counter() - started,
    pairs_per_second=per_second,
  )


def _pair_numbers(
  image: np.ndarray, caption: np.ndarray, num_captions: int
) -> np.ndarray:
  return image * num_captions + caption


def rank(
  encodings: Encodings,
  *,
  protocol: Protocol,
  fused: Fused | None = None,
  bank: Encodings | None = None,
) -> Rankings:
  """Orders all captions for each image and all images for each caption.

  Args:
    encodings: of the split.
    protocol: how candidates are ordered.
    fused: of `protocol.candidates` candidates, where the protocol fuses.
    bank: of the split `protocol.querybank`, where the protocol asks for one.

  Raises:
    RetrievalError: `fused` or `bank` is not what the protocol asks for.
  """
  cosine_UZ = encodings.cosine_UZ
  relevant_UZ = encodings.retrieval_set.relevant_UZ
  if not protocol.fuses:
    i2t_UZ, t2i_ZU = _scores_of_vectors(encodings, protocol, bank)
    return Rankings(
      i2t=_rank_by_score(i2t_UZ, relevant_UZ),
      t2i=_rank_by_score(t2i_ZU, relevant_UZ.T),
      fused=None,
      bank=bank if protocol.asks_bank else None,
    )
  if fused is None or fused.count != protocol.candidates:
    raise RetrievalError(f"no fused scores for {protocol}")
  scores = fused.scores
  if protocol.rerank == "itm_plus_itc":
    scores = scores + protocol.itc_weight * cosine_UZ.ravel()[fused.pairs]
  num_images, num_captions = cosine_UZ.shape

  def look_up(numbers: np.ndarray) -> np.ndarray:
    return scores[np.searchsorted(fused.pairs, numbers)]

  of_images = _pair_numbers(
    np.arange(num_images)[:, None], fused.captions_UJ, num_captions
  )
  of_captions = _pair_numbers(
    fused.images_ZJ, np.arange(num_captions)[:, None], num_captions
  )
  return Rankings(
    i2t=_rank_by_fusion(
      cosine_UZ, relevant_UZ, fused.captions_UJ, look_up(of_images)
    ),
    t2i=_rank_by_fusion(
      cosine_UZ.T, relevant_UZ.T, fused.images_ZJ, look_up(of_captions)
    ),
    fused=fused,
    bank=None,
  )


def _scores_of_vectors(
  encodings: Encodings, protocol: Protocol, bank: Encodings | None
) -> tuple[np.ndarray, np.ndarray]:
  """What the dual encoder orders by: of images (U, Z), of captions (Z, U)."""
  cosine_UZ = encodings.cosine_UZ
  if protocol.rerank == "none":
    return cosine_UZ, cosine_UZ.T
  if bank is None or bank.retrieval_set.split != protocol.querybank:
    raise RetrievalError(f"no bank of queries for {protocol}")
  score = functools.partial(_score_by_bank, protocol=protocol)
  return (
    score(encodings.image_UE, encodings.text_ZE, bank.image_UE, bank.text_ZE),
    score(encodings.text_ZE, encodings.image_UE, bank.text_ZE, bank.image_UE),
  )


def _score_by_bank(
  query_QE: np.ndarray,
  candidate_AE: np.ndarray,
  bank_query_BE: np.ndarray,
  bank_candidate_KE: np.ndarray,
  *,
  protocol: Protocol,
) -> np.ndarray:
  """Scores (Q, A); the bank has queries and candidates of its own."""
  if protocol.rerank == "querybank_conse":
    expand = functools.partial(
      conse.expand, temperature=protocol.conse_temperature
    )
    query_QE = expand(query_QE, bank_candidate_KE)
    candidate_AE = expand(candidate_AE, bank_query_BE)
    bank_query_BE = expand(bank_query_BE, bank_candidate_KE)
  return querybank.normalize(
    query_QE @ candidate_AE.T,
    bank_query_BE,
    candidate_AE,
    temperature=protocol.querybank_temperature,
  )


def _score_pairs(
  params: Params,
  encodings: Encodings,
  pairs: np.ndarray,
  *,
  programs: _Programs,
  batch_size: int,
  tell: OnProgress,
) -> tuple[np.ndarray, float | None]:
  """ITM logit differences of all pairs, float32, and pairs a second."""
  image, caption = np.divmod(pairs, len(encodings.retrieval_set.captions))
  # The last batch is filled with pair 0 and cut again.
  fill = -len(pairs) % batch_size
  image_row = np.pad(encodings.image_row_U[image], (0, fill), mode="edge")
  text_row = np.pad(caption, (0, fill), mode="edge")
  scores, started = [], None
  for start in range(0, len(pairs), batch_size):
    rows = slice(start, start + batch_size)
    score = programs.match(
      params,
      (encodings.text_tokens, encodings.text_valid),
      (encodings.image_tokens, encodings.image_valid),
      programs.place(text_row[rows].astype(np.int32)),
      programs.place(image_row[rows].astype(np.int32)),
    )
    scores.append(np.asarray(score, np.float32))
    started = started or time.perf_counter()
    tell("pairs", min(start + batch_size, len(pairs)), len(pairs))
  timed = len(image_row) - batch_size
  seconds = time.perf_counter() - started
  per_second = timed / seconds if timed else None
  return np.concatenate(scores)[: len(pairs)], per_second


def _rank_by_score(score_QA: np.ndarray, relevant_QA: np.ndarray) -> Ranking:
  top_QJ = ranking.best_candidates(score_QA, relevant_QA, count=SHOWN)
  return Ranking(
    rank_Q=ranking.ranks(score_QA, relevant_QA),
    top_QJ=top_QJ,
    top_score_QJ=np.take_along_axis(score_QA, top_QJ, axis=1),
  )


def _rank_by_fusion(
  score_QA: np.ndarray,
  relevant_QA: np.ndarray,
  candidate_QJ: np.ndarray,
  fused_QJ: np.ndarray,
) -> Ranking:
  fits_QJ = np.take_along_axis(relevant_QA, candidate_QJ, axis=1)
  order_QJ = np.lexsort((fits_QJ, -fused_QJ), axis=-1)
  shown_QJ = np.take_along_axis(candidate_QJ, order_QJ, axis=1)
  shown_score_QJ = np.take_along_axis(fused_QJ, order_QJ, axis=1)
  return Ranking(
    rank_Q=ranking.reranked_ranks(
      score_QA, relevant_QA, candidate_QJ, fused_QJ
    ),
    top_QJ=shown_QJ[:, :SHOWN],
    top_score_QJ=shown_score_QJ[:, :SHOWN],
  )


def report(
  encodings: Encodings, rankings: Rankings, *, protocol: Protocol
) -> dict[str, Any]:
  """What a result file says of one split: JSON-able.

  Keys: split, num_images, num_captions, protocol, metrics (`i2t_r1` ..
  `t2i_median_rank`; `mean_r1` of both directions; `r_mean` of all six R@k),
  chance (the same keys), timing, num_truncated_captions,
  num_unknown_captions, num_spelled_captions, num_alike_captions,
  num_bad_records, bad_records.
  """
  found = encodings.retrieval_set
  metrics, chance = {}, {}
  for direction, fits in (
    ("i2t", found.relevant_UZ),
    ("t2i", found.relevant_UZ.T),
  ):
    values, expected = ranking.summary(
      getattr(rankings, direction).rank_Q, fits.sum(1), fits.shape[1]
    )
    metrics |= {f"{direction}_{name}": v for name, v in values.items()}
    chance |= {f"{direction}_{name}": v for name, v in expected.items()}
  for table in (metrics, chance):
    shares = [v for name, v in table.items() if "median" not in name]
    table["mean_r1"] = (table["i2t_r1"] + table["t2i_r1"]) / 2
    table["r_mean"] = sum(shares) / len(shares)
  timing: dict[str, Any] = {"encode_seconds": round(encodings.seconds, 3)}
  facts = protocol.describe()
  fused, bank = rankings.fused, rankings.bank
  if bank is not None:
    timing["bank_seconds"] = round(bank.seconds, 3)
    if bank.retrieval_set.split == found.split:
      # A query's rank then depends on what else is asked.
      facts["querybank_is_this_split"] = True
  if fused is not None:
    timing["rerank_seconds"] = round(fused.seconds, 3)
    timing["num_pairs"] = len(fused.pairs)
    if fused.pairs_per_second is not None:
      timing["pairs_per_second"] = round(fused.pairs_per_second, 1)
  return {
    "split": found.split,
    "num_images": found.num_images,
    "num_captions": found.num_captions,
    "protocol": facts,
    "metrics": metrics,
    "chance": chance,
    "timing": timing,
    **encodings.caption_counts,
    "num_bad_records": len(found.bad),
    "bad_records": list(found.bad),
  }


def predictions(
  encodings: Encodings, rankings: Rankings
) -> dict[str, list[dict[str, Any]]]:
  """The best candidates of every query, both directions: JSON-able.

  A query holds its rank, one right answer (that of best cosine) and `top`; a
  re-ranked query lists scored candidates only.
  """
  found = encodings.retrieval_set
  names, texts = found.image_names, found.captions
  right_UZ = np.where(found.relevant_UZ, encodings.cosine_UZ, -np.inf)
  return {
    "i2t": _describe(
      rankings.i2t, names, texts, found.relevant_UZ, right_UZ.argmax(1)
    ),
    "t2i": _describe(
      rankings.t2i, texts, names, found.relevant_UZ.T, right_UZ.argmax(0)
    ),
  }


def _describe(
  found: Ranking,
  queries: tuple[str, ...],
  candidates: tuple[str, ...],
  relevant_QA: np.ndarray,
  right_Q: np.ndarray,
) -> list[dict[str, Any]]:
  return [
    {
      "query": query,
      "rank": int(found.rank_Q[q]),
      "right": candidates[right_Q[q]],
      "top": [
        {
          "id": candidates[a],
          "score": round(float(score), 6),
          "match": bool(relevant_QA[q, a]),
        }
        for a, score in zip(found.top_QJ[q], found.top_score_QJ[q], strict=True)
      ],
    }
    for q, query in enumerate(queries)
  ]


def evaluate(
  params: Params,
  config: config_lib.Config,
  tokenizer: tokenizers.Tokenizer,
  data_dir: str,
  split: str,
  *,
  protocol: Protocol = Protocol(),
  batch_size: int = 64,
  pair_batch_size: int = 256,
  mesh: jax.sharding.Mesh | None = None,
  on_progress: OnProgress | None = None,
) -> dict[str, Any]:
  """Reads, encodes and ranks one split by one protocol; see `report`."""
  check_protocol(config, protocol)
  encode_split = functools.partial(
    encode,
    config=config,
    tokenizer=tokenizer,
    batch_size=batch_size,
    mesh=mesh,
    on_progress=on_progress,
  )
  read = functools.partial(
    retrieval_sets.read, data_dir, captions=protocol.captions
  )
  encodings = encode_split(
    params,
    read(split, limit=protocol.limit),
    keep_tokens=protocol.fuses,
    views=protocol.views,
  )
  fused = bank = None
  if protocol.asks_bank:
    bank = encode_split(params, read(protocol.querybank))
  if protocol.fuses:
    fused = fuse(
      params,
      encodings,
      config=config,
      count=protocol.candidates,
      pair_batch_size=pair_batch_size,
      mesh=mesh,
      on_progress=on_progress,
    )
  rankings = rank(encodings, protocol=protocol, fused=fused, bank=bank)
  return report(encodings, rankings, protocol=protocol)
