"""Captions word by word: beam search, and greedy as its smallest case.

Each step takes the 2 S best of all continuations of the S live captions, by
the sum of log-probabilities. Those among the first S of them that end are
finished, with the score sum / length^alpha; the S best others live on. A
search is over where S are finished and the best live one, ended at the length
limit, could not beat the worst of them, or at the limit, where live ones are
scored as they are. The end counts as a token, the start does not.

Greedy is a beam of one with alpha 0. With another alpha a beam of one goes on
behind an end, since a longer caption may score higher.

Shape letters beside those of types.py: S live captions of an image, J = 2 S of
their continuations, L tokens of a caption, A = B S.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from glscl_jax import errors

NONE = -jnp.inf  # log-probability and score of a caption that is not there

# (last tokens (A,), what is kept) to (logits of the next ones (A, V), what is
# kept); `take(rows_A)` of what is kept gives that of some captions.
Extend = Callable[[jax.Array, Any], tuple[jax.Array, Any]]


class DecodingError(errors.UserError):
  """Options that fit no search; the message names the one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """How captions are searched; lengths are in tokens with the end."""

  beam: int = 5  # S; 6 in open_clip, 3 in BLIP [choice]
  max_tokens: int = 30  # [choice]
  min_tokens: int = 5  # before them no end [choice]
  length_power: float = 1.0  # alpha [choice]

  def __post_init__(self):
    for name in ("beam", "max_tokens", "min_tokens"):
      if getattr(self, name) < 1:
        raise DecodingError(
          f"{name} must be positive, is {getattr(self, name)}"
        )
    if self.min_tokens > self.max_tokens:
      raise DecodingError(
        f"min_tokens {self.min_tokens} is more than max_tokens "
        f"{self.max_tokens}"
      )
    # The bound on live captions holds for these only.
    if not self.length_power >= 0:
      raise DecodingError(
        f"length_power must not be negative, is {self.length_power}"
      )


def greedy(options: Options) -> Options:
  """The most likely token at each step, with the lengths of `options`."""
  return dataclasses.replace(options, beam=1, length_power=0.0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Captions:
  """Tokens without the start; behind the length they are 0."""

  ids_BL: jax.Array  # int32
  length_B: jax.Array  # int32
  score_B: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _State:
  count: jax.Array  # tokens of live captions
  live_ids_BSL: jax.Array
  live_sum_BS: jax.Array  # best first; NONE: not there
  token_A: jax.Array  # their last tokens
  parent_A: jax.Array  # whose past is theirs
  ended_ids_BSL: jax.Array
  ended_length_BS: jax.Array
  ended_score_BS: jax.Array  # best first; NONE: not there
  over_B: jax.Array
  past: Any


def search(
  logits_BV: jax.Array,
  past: Any,
  extend: Extend,
  *,
  end_id: int,
  never_ids: tuple[int, ...],
  options: Options,
) -> Captions:
  """The best caption of each image.

  Args:
    logits_BV: of the first token.
    past: what is kept of the start; see `Extend`.
    extend: gives the logits after one more token. The captions of an image lie
      side by side.
    end_id: the token that ends a caption.
    never_ids: tokens that no caption holds.
    options: how it is searched.
  """
  batch, num_ids = logits_BV.shape
  beam, length = options.beam, options.max_tokens
  choose = functools.partial(
    _choose, end_id=end_id, never_ids=never_ids, options=options
  )
  empty_BSL = jnp.zeros((batch, beam, length), jnp.int32)
  none_BS = jnp.full((batch, beam), NONE, jnp.float32)
  own_A = jnp.repeat(jnp.arange(batch, dtype=jnp.int32), beam)
  state = _State(
    count=jnp.int32(0),
    live_ids_BSL=empty_BSL,
    live_sum_BS=none_BS.at[:, 0].set(0.0),
    token_A=own_A,
    parent_A=own_A,
    ended_ids_BSL=empty_BSL,
    ended_length_BS=jnp.zeros((batch, beam), jnp.int32),
    ended_score_BS=none_BS,
    over_B=jnp.zeros(batch, bool),
    past=past.take(own_A),
  )
  shape = batch, beam, num_ids
  state = choose(state, jnp.broadcast_to(logits_BV[:, None], shape))

  def goes_on(state: _State) -> jax.Array:
    return (state.count < length) & ~jnp.all(state.over_B)

  def step(state: _State) -> _State:
    logits_AV, past = extend(state.token_A, state.past.take(state.parent_A))
    state = dataclasses.replace(state, past=past)
    return choose(state, logits_AV.reshape(shape))

  return _best(jax.lax.while_loop(goes_on, step, state), options)


def _choose(
  state: _State,
  logits_BSV: jax.Array,
  *,
  end_id: int,
  never_ids: tuple[int, ...],
  options: Options,
) -> _State:
  """One more token for each live caption, by the logits after their last."""
  batch, beam, num_ids = logits_BSV.shape
  count = state.count + 1
  id_V = jnp.arange(num_ids)
  barred_V = jnp.isin(id_V, jnp.array(never_ids, jnp.int32))
  barred_V |= (id_V == end_id) & (count < options.min_tokens)
  log_p_BSV = jax.nn.log_softmax(logits_BSV.astype(jnp.float32))
  log_p_BSV = jnp.where(barred_V[None, None], NONE, log_p_BSV)
  sum_BSV = state.live_sum_BS[:, :, None] + log_p_BSV
  sum_BJ, index_BJ = jax.lax.top_k(sum_BSV.reshape(batch, -1), 2 * beam)
  parent_BJ, token_BJ = index_BJ // num_ids, index_BJ % num_ids
  ids_BJL = _rows(state.live_ids_BSL, parent_BJ)
  ids_BJL = ids_BJL.at[:, :, state.count].set(token_BJ)
  ends_BJ = token_BJ == end_id

  counts_BS = ends_BJ[:, :beam] & ~state.over_B[:, None]
  score_BS = sum_BJ[:, :beam] / _penalty(count, options)
  score_BJ = jnp.concatenate(
    [state.ended_score_BS, jnp.where(counts_BS, score_BS, NONE)], axis=1
  )
  ended_score_BS, kept_BS = jax.lax.top_k(score_BJ, beam)
  ended_length_BJ = jnp.concatenate(
    [state.ended_length_BS, jnp.full((batch, beam), count)], axis=1
  )
  ended_ids_BJL = jnp.concatenate(
    [state.ended_ids_BSL, ids_BJL[:, :beam]], axis=1
  )

  live_sum_BS, live_BS = jax.lax.top_k(jnp.where(ends_BJ, NONE, sum_BJ), beam)
  bound_B = live_sum_BS[:, 0] / _penalty(options.max_tokens, options)
  full_B = ended_score_BS[:, -1] > NONE
  parent_BS = jnp.take_along_axis(parent_BJ, live_BS, axis=1)
  parent_BS += beam * jnp.arange(batch, dtype=jnp.int32)[:, None]
  return _State(
    count=count,
    live_ids_BSL=_rows(ids_BJL, live_BS),
    live_sum_BS=live_sum_BS,
    token_A=jnp.take_along_axis(token_BJ, live_BS, axis=1).reshape(-1),
    parent_A=parent_BS.reshape(-1),
    ended_ids_BSL=_rows(ended_ids_BJL, kept_BS),
    ended_length_BS=jnp.take_along_axis(ended_length_BJ, kept_BS, axis=1),
    ended_score_BS=ended_score_BS,
    over_B=state.over_B | (full_B & (bound_B <= ended_score_BS[:, -1])),
    past=state.past,
  )


def _best(state: _State, options: Options) -> Captions:
  """The best finished one; at the limit live ones may be better."""
  live_BS = state.live_sum_BS / _penalty(state.count, options)
  live_BS = jnp.where(state.over_B[:, None], NONE, live_BS)
  score_BJ = jnp.concatenate([state.ended_score_BS, live_BS], axis=1)
  best_B1 = jnp.argmax(score_BJ, axis=1)[:, None]
  ids_BJL = jnp.concatenate([state.ended_ids_BSL, state.live_ids_BSL], axis=1)
  live_length_BS = jnp.full(state.ended_length_BS.shape, state.count)
  length_BJ = jnp.concatenate([state.ended_length_BS, live_length_BS], axis=1)
  return Captions(
    ids_BL=_rows(ids_BJL, best_B1)[:, 0],
    length_B=jnp.take_along_axis(length_BJ, best_B1, axis=1)[:, 0],
    score_B=jnp.take_along_axis(score_BJ, best_B1, axis=1)[:, 0],
  )


def _rows(ids_BJL: jax.Array, index_BS: jax.Array) -> jax.Array:
  """Some captions of each image, (B, S, L)."""
  return jnp.take_along_axis(ids_BJL, index_BS[:, :, None], axis=1)


def _penalty(count: jax.Array | int, options: Options) -> jax.Array:
  """What the sum over `count` tokens is divided by."""
  return jnp.asarray(count, jnp.float32) ** options.length_power
