"""CMAL (2410.12595): what words and regions that name the same tell of another.

    AMC   swap the contents of anchors; say which word, which class was there
    WRC   a word's state is near those of the regions it names
    ITM   do text and regions belong together?           (docs/systems.md)

Words and regions pass one stack of blocks, [text; regions], each at its fixed
slot. A slot is a content and a place; only contents are swapped or hidden. MLM,
MRC and MRFR swap one side alone; with `masking.swap` none there is no swap and
ITM, MLM and MRC are UNITER (1909.11740).

`objectives.task_mix`: a step computes one objective, drawn by weight, or all.
Weights of 0 remove passes and parameters.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from glscl_jax.config import Config
from glscl_jax.models import cmal, layers
from glscl_jax.models.cmal import CMAL
from glscl_jax.objectives import (
  anchors,
  masked_lm,
  masked_regression,
  matching,
)
from glscl_jax.systems import encoders, inputs, terms, views
from glscl_jax.systems.answers import Answers, Slots
from glscl_jax.types import Batch, Params, Visual

# By masking.swap: the sides whose slots of anchors get the other's content.
SWAPPED = {
  "both": ("text", "image"),
  "text": ("text",),
  "image": ("image",),
  "none": (),
}


@dataclasses.dataclass(frozen=True)
class Pass:
  """A fused pass: contents of text and regions, and the sides swapped.

  Texts: full (T), mlm (T masked), amc (T masked around the anchors). Regions:
  full, hidden (some of them).
  """

  text: str
  regions: str
  swapped: tuple[str, ...] = ()


CLEAN = Pass("full", "full")


def find_pass(name: str, config: Config) -> Pass:
  """The pass that an objective reads."""
  sides = SWAPPED[config.masking.swap]
  only = {side: (side,) * (side in sides) for side in ("text", "image")}
  return {
    "amc": Pass("amc", "hidden", sides),
    "mlm": Pass("amc" if only["text"] else "mlm", "full", only["text"]),
    "mrc": Pass("full", "hidden", only["image"]),
    "mrfr": Pass("full", "hidden", only["image"]),
    "wrc": CLEAN,
    "itm": CLEAN,
  }[name]


# What enters the blocks: text states, their validity, region states, theirs.
Fused = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def embed(
  model: CMAL, batch: Batch, passes: tuple[Pass, ...], config: Config
) -> dict[Pass, Fused]:
  """The states that enter each pass; words and regions are embedded once."""
  valid_BT, valid_BR = batch.text_valid_BT, batch.region_valid_BR
  place_BTD = model.text.places(valid_BT)
  place_BRD = model.region.places(batch.box_BR7, model.region_type())
  content_BRD = model.region.contents(batch.region_BRP)
  ids = {
    "full": batch.text_ids_BT,
    "mlm": batch.mlm_ids_BT,
    "amc": batch.amc_ids_BT,
  }

  def text_content(version: str) -> jax.Array:
    words_BTD = model.text.contents(ids[version])
    return model.text.encode(words_BTD, place_BTD, valid_BT)

  def region_content(version: str) -> jax.Array:
    kept_BRD = content_BRD
    if version == "hidden":
      hidden_11D = model.region.hidden_content()[None, None]
      kept_BRD = jnp.where(
        batch.hidden_region_BR[:, :, None], hidden_11D, content_BRD
      )
    return model.region.encode(kept_BRD, place_BRD, valid_BR)

  texts = {name: text_content(name) for name in _distinct(passes, "text")}
  regions = {
    name: region_content(name) for name in _distinct(passes, "regions")
  }
  found = {}
  for item in passes:
    text_BTD, region_BRD = texts[item.text], regions[item.regions]
    if item.swapped:
      text_BTD, region_BRD = cmal.swap(
        text_BTD,
        region_BRD,
        batch.anchor_pos_BA,
        batch.anchor_region_BA,
        batch.anchor_ok_BA,
        sides=item.swapped,
        rescale=config.masking.swap_rescale,
      )
    found[item] = (
      model.text.embed(text_BTD, place_BTD),
      valid_BT,
      model.region.embed(region_BRD, place_BRD),
      valid_BR,
    )
  return found


def _distinct(passes: tuple[Pass, ...], side: str) -> tuple[str, ...]:
  """Versions of a side, in the order of first mention."""
  return tuple(dict.fromkeys(getattr(item, side) for item in passes))


def fuse(
  model: CMAL, runs: Mapping[Pass | str, Fused], num_groups: int
) -> dict[Pass | str, jax.Array]:
  """States (B, T + R, D) after all blocks, in one call for all runs."""
  lengths = [run[0].shape[0] for run in runs.values()]
  columns = [
    views.join_groups(column, num_groups)
    for column in zip(*runs.values(), strict=True)
  ]
  x_BTD, text_valid_BT, y_BRD, region_valid_BR = columns
  states_BLD = model.encoder(
    jnp.concatenate([x_BTD, y_BRD], axis=1),
    jnp.concatenate([text_valid_BT, region_valid_BR], axis=1),
  )
  parts = views.split_groups(states_BLD, num_groups, lengths)
  return dict(zip(runs, parts, strict=True))


@dataclasses.dataclass(frozen=True)
class Judged:
  """The pairs of ITM: labels (1: own regions), and which count."""

  labels_A: jax.Array
  ok_A: jax.Array


def judge(
  own: Fused, batch: Batch, *, shared: bool, group: int, key: jax.Array
) -> tuple[Fused, Judged]:
  """What ITM runs, and its pairs: half of each group is shown others' regions.

  Where other objectives read the own pairs anyway (`shared`), only the false
  ones are run: of each group `own` comes first in the pairs then. Otherwise
  all, mixed.
  A text for which the group holds nothing else is shown its own.
  """
  label_key, draw_key = jax.random.split(key)
  x_BTD, valid_BT, y_BRD, valid_BR = own
  labels_B = matching.half_labels(
    label_key, x_BTD.shape[0], group, round_up=True
  )
  index_B, found_B = matching.random_negatives(
    batch.identity_BM, draw_key, group
  )
  labels_B = jnp.where(found_B, labels_B, 1)
  take = functools.partial(matching.take_from_group, group=group)
  if not shared:
    in_group_B = jnp.arange(len(labels_B), dtype=jnp.int32) % group
    shown_B = jnp.where(labels_B == 1, in_group_B, index_B)
    run = x_BTD, valid_BT, take(y_BRD, shown_B), take(valid_BR, shown_B)
    return run, Judged(labels_B, jnp.ones_like(found_B))
  rows_J = matching.false_rows(labels_B, group)
  shown_J = take(index_B, rows_J)
  run = (
    take(x_BTD, rows_J),
    take(valid_BT, rows_J),
    take(y_BRD, shown_J),
    take(valid_BR, shown_J),
  )
  num_groups = x_BTD.shape[0] // group
  labels_A = views.join_groups(
    [jnp.ones_like(labels_B), jnp.zeros_like(rows_J)], num_groups
  )
  # Rows are as many whatever was found: the last ones may be true pairs.
  ok_A = views.join_groups(
    [labels_B == 1, take(labels_B, rows_J) == 0], num_groups
  )
  return run, Judged(labels_A, ok_A)


@dataclasses.dataclass(frozen=True)
class Context:
  """What an objective may read."""

  model: CMAL
  batch: Batch
  states: Mapping[str, jax.Array]  # of each objective, (B, T + R, D)
  judged: Judged | None
  config: Config


@dataclasses.dataclass(frozen=True)
class Asked:
  """Slots that carry a label."""

  index_BJ: jax.Array
  labels_BJ: jax.Array
  ok_BJ: jax.Array
  anchor_BJ: jax.Array | None  # which of them are anchors; None: none is


def _ask(
  index_BJ: jax.Array,
  labels_BJ: jax.Array,
  ok_BJ: jax.Array,
  anchor_index_BA: jax.Array | None,
  anchor_ok_BA: jax.Array | None,
  *,
  shown: bool,
) -> Asked:
  """`shown`: anchors hold what they would be asked for, and are not asked."""
  if anchor_ok_BA is None:
    return Asked(index_BJ, labels_BJ, ok_BJ, None)
  same_BJA = index_BJ[:, :, None] == anchor_index_BA[:, None, :]
  anchor_BJ = jnp.any(same_BJA & anchor_ok_BA[:, None, :], axis=2)
  if shown:
    return Asked(index_BJ, labels_BJ, ok_BJ & ~anchor_BJ, None)
  return Asked(index_BJ, labels_BJ, ok_BJ, anchor_BJ)


def _shown(side: str, config: Config) -> bool:
  """Whether anchors of a side keep their own content, neither swapped nor hid.

  Without a swap the batch hides them.
  """
  sides = SWAPPED[config.masking.swap]
  return bool(sides) and side not in sides


def asked_words(batch: Batch, config: Config) -> Asked:
  """Anchors' words that a region has replaced, and masked words."""
  return _ask(
    batch.amc_pos_BJ,
    batch.amc_labels_BJ,
    batch.amc_ok_BJ,
    batch.anchor_pos_BA,
    batch.anchor_ok_BA,
    shown=_shown("text", config),
  )


def asked_regions(batch: Batch, config: Config) -> Asked:
  """Anchors' regions that a word has replaced, and hidden regions."""
  classes_BJ = jnp.take_along_axis(
    batch.region_class_BR, batch.amc_region_BJ, axis=1
  )
  return _ask(
    batch.amc_region_BJ,
    classes_BJ,
    batch.amc_region_ok_BJ,
    batch.anchor_region_BA,
    batch.anchor_ok_BA,
    shown=_shown("image", config),
  )


def asked_classes(batch: Batch, config: Config) -> Asked:
  """Of `asked_regions` those of a class: the background, 0, is no target."""
  asked = asked_regions(batch, config)
  return dataclasses.replace(asked, ok_BJ=asked.ok_BJ & (asked.labels_BJ > 0))


def _word_logits(context: Context, states_BLD, index_BJ) -> jax.Array:
  return context.model.word_logits(layers.take_rows(states_BLD, index_BJ))


def _region_rows(context: Context, states_BLD, index_BJ) -> jax.Array:
  """States at the slots of regions, which stand behind the text."""
  length = context.batch.text_ids_BT.shape[1]
  return layers.take_rows(states_BLD, index_BJ + length)


def _classify(
  name: str, logits_BJV: jax.Array, asked: Asked, other: str
) -> terms.Term:
  """Cross-entropy, and accuracies of anchors and of other slots."""
  loss = masked_lm.masked_cross_entropy(
    logits_BJV, asked.labels_BJ, asked.ok_BJ
  )
  kinds = {other: asked.ok_BJ}
  if asked.anchor_BJ is not None:
    kinds = {
      "anchor": asked.ok_BJ & asked.anchor_BJ,
      other: asked.ok_BJ & ~asked.anchor_BJ,
    }
  return terms.Term(
    (terms.Mean(loss, terms.count(asked.ok_BJ)),),
    {
      f"{name}_{kind}_accuracy": terms.Mean(
        masked_lm.accuracy(logits_BJV, asked.labels_BJ, ok_BJ),
        terms.count(ok_BJ),
      )
      for kind, ok_BJ in kinds.items()
    },
  )


def _words(context: Context, name: str, prefix: str) -> terms.Term:
  asked = asked_words(context.batch, context.config)
  logits_BJV = _word_logits(context, context.states[name], asked.index_BJ)
  return _classify(prefix, logits_BJV, asked, "masked")


def _regions(context: Context, name: str, prefix: str) -> terms.Term:
  asked = asked_classes(context.batch, context.config)
  rows_BJD = _region_rows(context, context.states[name], asked.index_BJ)
  return _classify(prefix, context.model.region_head(rows_BJD), asked, "hidden")


def _amc(context: Context) -> terms.Term:
  """AMC = CE(vocab(H), words) + CE(class(H), classes), both sides completed."""
  words = _words(context, "amc", "amc_word")
  regions = _regions(context, "amc", "amc_region")
  (of_words,), (of_regions,) = words.summands, regions.summands
  metrics = {"amc_words": of_words, "amc_regions": of_regions}
  summands, weight = (of_words, of_regions), context.config.objectives.amc_pair
  if weight > 0:
    of_pairs = _amc_pair(context)
    metrics["amc_pair"] = of_pairs
    summands += (terms.Mean(weight * of_pairs.value, of_pairs.count),)
  return terms.Term(summands, metrics | words.metrics | regions.metrics)


def _amc_pair(context: Context) -> terms.Mean:
  """InfoNCE of the anchors' states, words against regions, by groups."""
  batch, states_BLD = context.batch, context.states["amc"]
  group = min(context.config.objectives.amc_pair_group, states_BLD.shape[0])
  loss = anchors.pair_contrast(
    layers.take_rows(states_BLD, batch.anchor_pos_BA),
    _region_rows(context, states_BLD, batch.anchor_region_BA),
    batch.anchor_ok_BA,
    jnp.take_along_axis(batch.region_class_BR, batch.anchor_region_BA, axis=1),
    context.model.temperature(),
    group=group,
    block=context.config.objectives.contrast_block,
  )
  return terms.Mean(loss, float(states_BLD.shape[0] // group))


def _mlm(context: Context) -> terms.Term:
  """MLM = CE(vocab(H), words): regions are complete."""
  if find_pass("mlm", context.config).swapped:
    return _words(context, "mlm", "mlm")
  batch = context.batch
  return terms.mlm(
    _word_logits(context, context.states["mlm"], batch.mlm_pos_BJ), batch
  )


def _mrc(context: Context) -> terms.Term:
  """MRC = CE(class(H), classes): the text is complete."""
  return _regions(context, "mrc", "mrc")


def _mrfr(context: Context) -> terms.Term:
  """MRFR = mean over values of (feature(H) - f)^2: the text is complete.

  Regions of no class have a feature too.
  """
  asked = asked_regions(context.batch, context.config)
  rows_BJD = _region_rows(context, context.states["mrfr"], asked.index_BJ)
  loss = masked_regression.masked_regression(
    context.model.region_features(rows_BJD),
    context.batch.region_BRP,
    asked.index_BJ,
    asked.ok_BJ,
    loss="l2",
    patch_norm=False,
  )
  return terms.Term((terms.Mean(loss, terms.count(asked.ok_BJ)),), {})


def _cosines(context: Context) -> jax.Array:
  """Of each token with each region of its sample, (B, T, R)."""
  batch, states_BLD = context.batch, context.states["wrc"]
  length = batch.text_ids_BT.shape[1]
  return anchors.cells(
    states_BLD[:, :length],
    states_BLD[:, length:],
    batch.text_valid_BT,
    batch.region_valid_BR,
  )


def _pairs_there(batch: Batch) -> jax.Array:
  """(B, A) bool: the pairs of WRC without padding."""
  take = functools.partial(jnp.take_along_axis, axis=1)
  return (
    batch.pair_ok_BA
    & take(batch.text_valid_BT, batch.pair_pos_BA)
    & take(batch.region_valid_BR, batch.pair_region_BA)
  )


def _wrc(context: Context) -> terms.Term:
  """WRC: in each sample a softmax over all tokens and regions, tau learned."""
  batch, cosine_BTR = context.batch, _cosines(context)
  pairs = batch.pair_pos_BA, batch.pair_region_BA, batch.pair_ok_BA
  temperature = context.model.temperature()
  # From validity alone: counting costs no pass (`train/accumulate.py`).
  there_BA = _pairs_there(batch)
  loss = anchors.word_region_contrast(cosine_BTR, temperature, *pairs)
  return terms.Term(
    (terms.Mean(loss, terms.count(jnp.any(there_BA, axis=1))),),
    {
      "wrc_accuracy": terms.Mean(
        anchors.accuracy(cosine_BTR, *pairs), terms.count(there_BA)
      ),
      "wrc_temperature": terms.whole(temperature),
    },
  )


def _itm(context: Context) -> terms.Term:
  """ITM = CE(Linear(tanh pool(H_0)), own regions?)."""
  logits_A2 = context.model.match_logits(context.states["itm"][:, 0])
  return terms.itm(logits_A2, context.judged.labels_A, context.judged.ok_A)


LOCAL: dict[str, Callable[[Context], terms.Term]] = {
  "amc": _amc,
  "wrc": _wrc,
  "itm": _itm,
  "mlm": _mlm,
  "mrc": _mrc,
  "mrfr": _mrfr,
}


def run_passes(
  model: CMAL,
  batch: Batch,
  config: Config,
  key: jax.Array,
  tasks: tuple[str, ...],
) -> Context:
  """The passes that `tasks` read, each once."""
  read = {name: find_pass(name, config) for name in tasks}
  fused = embed(model, batch, tuple(dict.fromkeys(read.values())), config)
  batch_size = batch.text_ids_BT.shape[0]
  judged, num_groups = None, batch_size
  shared = any(item == CLEAN for name, item in read.items() if name != "itm")
  runs = {item: fused[item] for name, item in read.items() if name != "itm"}
  if "itm" in tasks:
    group = min(config.objectives.neg_group, batch_size)
    runs["itm"], judged = judge(
      fused[CLEAN], batch, shared=shared, group=group, key=key
    )
    num_groups = batch_size // group if shared else batch_size
  found = fuse(model, runs, num_groups)
  states = {name: found[read[name]] for name in tasks if name != "itm"}
  if "itm" in tasks:
    own = [found[CLEAN]] if shared else []
    states["itm"] = views.join_groups([*own, found["itm"]], num_groups)
  return Context(model, batch, states, judged, config)


def _parts(
  model: CMAL,
  batch: Batch,
  config: Config,
  key: jax.Array,
  tasks: tuple[str, ...],
) -> terms.Parts:
  """Some of the objectives."""
  context = run_passes(model, batch, config, key, tasks)
  found = {name: LOCAL[name](context) for name in tasks}
  return terms.Parts(local=found, features={})


def _split_key(key: jax.Array) -> jax.Array:
  """Keys of dropout, of false images, of the objective."""
  return jax.random.split(key, 3)


def _is_drawn(config: Config) -> bool:
  """Whether a step computes one of several objectives."""
  drawn = config.objectives.task_mix == "sample"
  return drawn and len(config.objectives.active) > 1


def parts(
  params: Params,
  batch: Batch,
  *,
  config: Config,
  key: jax.Array,
  step: jax.Array | int | None = None,
) -> terms.Parts:
  """The passes of the objective drawn for this step, or of all.

  Args:
    params: as made by `init`.
    batch: with the masks that the active objectives need.
    config: the run's; `train.seed` is not read here.
    key: the objective, dropout and false images of this step.
    step: not read here.

  Returns:
    The terms of the other objectives are NaN: they have not been computed.
  """
  del step
  dropout_key, draw_key, task_key = _split_key(key)

  def compute(params: Params, batch: Batch, *, tasks: tuple[str, ...]):
    return CMAL(config.model).apply(
      {"params": params},
      batch,
      config,
      draw_key,
      tasks,
      method=_parts,
      rngs={"dropout": dropout_key},
    )

  active = config.objectives.active
  if _is_drawn(config):
    found = _one_of(
      [functools.partial(compute, tasks=(name,)) for name in active],
      draw_task(config, task_key),
      params,
      batch,
    )
  else:
    found = compute(params, batch, tasks=active)
  if batch.anchor_ok_BA is None:
    return found
  number_B = jnp.sum(batch.anchor_ok_BA, axis=1, dtype=jnp.float32)
  mean = terms.Mean(jnp.mean(number_B), float(len(number_B)))
  return dataclasses.replace(found, extra={"anchors_per_sample": mean})


def draw_task(config: Config, key: jax.Array) -> jax.Array:
  """The number of the active objective of a step, drawn by weight."""
  active = config.objectives.active
  weights = [getattr(config.objectives, name) for name in active]
  return jax.random.categorical(key, jnp.log(jnp.array(weights)))


def weights(config: Config, key: jax.Array) -> dict[str, jax.Array | float]:
  """1 of the objective drawn for this step, or shares of all by weight."""
  own = terms.weights(config, key)
  if not _is_drawn(config):
    return {name: weight / sum(own.values()) for name, weight in own.items()}
  drawn = draw_task(config, _split_key(key)[2])
  return {name: (drawn == i).astype(float) for i, name in enumerate(own)}


def _one_of(
  computations: list[Callable[..., terms.Parts]],
  number: jax.Array,
  *operands: Params | Batch,
) -> terms.Parts:
  """Runs one; the means that only others have are NaN, and count nothing."""
  shapes: dict[str, terms.Term] = {}
  for compute in computations:
    shapes |= jax.eval_shape(compute, *operands).local
  nothing = terms.Mean(jnp.full((), jnp.nan, jnp.float32), jnp.zeros(()))
  missing = jax.tree.map(
    lambda mean: nothing,
    shapes,
    is_leaf=lambda node: isinstance(node, terms.Mean),
  )

  def complete(compute: Callable[..., terms.Parts]):
    def run(*operands: Params | Batch) -> terms.Parts:
      found = jax.tree.map(jnp.float32, compute(*operands).local)
      return terms.Parts(local=missing | found, features={})

    return run

  return jax.lax.switch(number, [complete(c) for c in computations], *operands)


loss = terms.make_loss(parts, weights=weights)


def init(config: Config, key: jax.Array) -> Params:
  """Parameters of everything the active objectives read, float32."""
  return CMAL(config.model).init(
    {"params": key},
    inputs.example_batch(config),
    config,
    key,
    config.objectives.active,
    method=_parts,
  )["params"]


_apply = functools.partial(encoders.apply, CMAL)


def encode_text(
  params: Params,
  text_ids_BT: jax.Array,
  text_valid_BT: jax.Array,
  *,
  config: Config,
) -> jax.Array:
  """The slots of complete texts as they enter the blocks, (B, T, D)."""

  def method(model: CMAL) -> jax.Array:
    place_BTD = model.text.places(text_valid_BT)
    words_BTD = model.text.contents(text_ids_BT)
    content_BTD = model.text.encode(words_BTD, place_BTD, text_valid_BT)
    return model.text.embed(content_BTD, place_BTD)

  return _apply(params, config, method)


def encode_visual(
  params: Params, visual: Visual, *, config: Config
) -> jax.Array:
  """The slots of all regions as they enter the blocks, (B, R, D)."""

  def method(model: CMAL) -> jax.Array:
    place_BRD = model.region.places(visual.box_BR7, model.region_type())
    content_BRD = model.region.encode(
      model.region.contents(visual.region_BRP),
      place_BRD,
      visual.region_valid_BR,
    )
    return model.region.embed(content_BRD, place_BRD)

  return _apply(params, config, method)


def match_scores(
  params: Params,
  x_BTD: jax.Array,
  text_valid_BT: jax.Array,
  y_BRD: jax.Array,
  region_valid_BR: jax.Array,
  *,
  config: Config,
) -> jax.Array:
  """ITM logit difference (match - no match) of pairs of states, (B,)."""

  def method(model: CMAL) -> jax.Array:
    pair = x_BTD, text_valid_BT, y_BRD, region_valid_BR
    states_BLD = fuse(model, {"pair": pair}, x_BTD.shape[0])["pair"]
    return model.match_logits(states_BLD[:, 0])

  logits_B2 = _apply(params, config, method)
  return logits_B2[:, 1] - logits_B2[:, 0]


def _answering(config: Config) -> dict[str, str]:
  """Which objective's pass answers each field of Answers that is trained."""
  weight, active = config.objectives, config.objectives.active
  found = {}
  for field, names in (("words", ("amc", "mlm")), ("classes", ("amc", "mrc"))):
    trained = [name for name in names if name in active]
    if trained:
      found[field] = trained[0]
  if "wrc" in active or ("amc" in active and weight.amc_pair > 0):
    found["cosine_BTR"] = "wrc"
  return found


def answered(config: Config) -> frozenset[str]:
  """The fields of Answers that an active objective trains."""
  return frozenset(_answering(config))


def answer(params: Params, batch: Batch, *, config: Config) -> Answers:
  """What the model says at swapped and masked slots, and its similarities.

  Words are those of AMC's pass, without AMC of MLM's; classes of AMC's or
  MRC's. Similarities are those of complete inputs.

  Args:
    params: as made by `init`.
    batch: with the masks that the active objectives need.
    config: the run's.
  """
  source = _answering(config)

  def method(model: CMAL) -> Answers:
    tasks = tuple(dict.fromkeys(source.values()))
    # ITM alone would draw.
    context = run_passes(model, batch, config, jax.random.key(0), tasks)
    words = classes = cosine_BTR = None
    if "words" in source:
      words = _word_slots(context, source["words"])
    if "classes" in source:
      asked = asked_classes(batch, config)
      states_BLD = context.states[source["classes"]]
      rows_BJD = _region_rows(context, states_BLD, asked.index_BJ)
      classes = _slots(asked, model.region_head(rows_BJD))
    if "cosine_BTR" in source:
      cosine_BTR = _cosines(context)
    return Answers(words=words, classes=classes, cosine_BTR=cosine_BTR)

  return _apply(params, config, method)


def _word_slots(context: Context, name: str) -> Slots:
  batch, config = context.batch, context.config
  if name == "amc" or find_pass(name, config).swapped:
    asked = asked_words(batch, config)
  else:
    asked = Asked(batch.mlm_pos_BJ, batch.mlm_labels_BJ, batch.mlm_ok_BJ, None)
  return _slots(
    asked, _word_logits(context, context.states[name], asked.index_BJ)
  )


def _slots(asked: Asked, logits_BJV: jax.Array) -> Slots:
  anchor_BJ = asked.anchor_BJ
  return Slots(
    index_BJ=asked.index_BJ,
    labels_BJ=asked.labels_BJ,
    ok_BJ=asked.ok_BJ,
    anchor_BJ=(
      jnp.zeros_like(asked.ok_BJ)
      if anchor_BJ is None
      else anchor_BJ & asked.ok_BJ
    ),
    logits_BJV=logits_BJV,
  )


def describe_inputs(config: Config) -> dict[str, str]:
  """Regions and words before they are fused, for the report."""
  region, text = config.model.region, config.model.text
  blocks = [
    f", {depth} blocks of their own" if depth else ""
    for depth in config.model.unimodal_layers
  ]
  return {
    "Regions": f"at most {region.number} of an image, of "
    f"{region.feature_width:,} values and a box, {region.num_classes:,} classes"
    + blocks[0],
    "Words": f"{text.vocab_size:,} pieces, at most {text.max_length} tokens, "
    f"width {text.width}{blocks[1]}",
  }
