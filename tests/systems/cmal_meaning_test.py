"""What must not leak, what must not matter, and who gets a gradient."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math

import jax
import numpy as np
import pytest

from glscl_jax import config as config_lib
from glscl_jax import sharding
from glscl_jax.models.cmal import CMAL
from glscl_jax.systems import cmal, registry, views
from glscl_jax.train import optimizer
from tests import random_pairs, random_regions

EVERY = config_lib.SYSTEM_OBJECTIVES["cmal"]
CONFIG = random_regions.config(*EVERY, objectives={"amc_pair": 1.0})
BATCH = random_regions.batch(CONFIG)
PARAMS = random_pairs.spread_params(CONFIG)
KEY = jax.random.key(5)
SIZE, T, R = len(BATCH.text_ids_BT), 10, 6
ROWS = np.arange(SIZE)


def run(batch, *, params=PARAMS, config=CONFIG, key=KEY):
  """Gradients, and losses as floats."""
  gradients, metrics = random_pairs.gradient_function(config)(
    params, batch, key
  )
  return gradients, {name: float(metrics[name]) for name in metrics}


@pytest.fixture(scope="module")
def normal():
  return run(BATCH)


def change(batch=BATCH, **changes):
  """A batch after `changes`, functions of copies of its arrays."""
  arrays = {name: getattr(batch, name).copy() for name in changes}
  for name, function in changes.items():
    arrays[name] = function(arrays[name])
  return random_pairs.change(batch, **arrays)


@functools.cache
def state_function(config):
  """Compiled (params, batch) -> states of each objective's pass."""

  @jax.jit
  def compute(params, batch):
    def method(model):
      active = config.objectives.active
      return cmal.run_passes(model, batch, config, KEY, active).states

    return CMAL(config.model).apply({"params": params}, method=method)

  return compute


def states(batch=BATCH, *, config=CONFIG, params=PARAMS):
  return jax.tree.map(np.asarray, state_function(config)(params, batch))


# --- what must not leak -----------------------------------------------------


def test_the_feature_of_a_hidden_region_reaches_nobody_but_targets():
  def loud(region_BRP):
    region_BRP[BATCH.hidden_region_BR] += 5.0
    return region_BRP

  assert BATCH.hidden_region_BR.any(axis=1).all()
  before, after = states(), states(change(region_BRP=loud))
  for name in ("amc", "mrc", "mrfr"):
    np.testing.assert_array_equal(before[name], after[name])
  for name in ("mlm", "wrc"):
    assert np.abs(before[name] - after[name]).max() > 1e-3


def test_a_hidden_region_is_the_mask_vector_beside_swapped_ones_too():
  # Any two hidden regions are alike but for their boxes, whatever they show.
  box_BR7 = np.broadcast_to(BATCH.box_BR7[:1, :1], BATCH.box_BR7.shape)
  batch = random_pairs.change(BATCH, box_BR7=box_BR7)

  @jax.jit
  def entering(params, batch):
    def method(model):
      item = cmal.find_pass("amc", CONFIG)
      return cmal.embed(model, batch, (item,), CONFIG)[item][2]

    return CMAL(CONFIG.model).apply({"params": params}, method=method)

  y_BRD = np.asarray(entering(PARAMS, batch))
  hidden = y_BRD[BATCH.hidden_region_BR]
  assert len(hidden) >= SIZE
  np.testing.assert_allclose(hidden, hidden[:1].repeat(len(hidden), 0))
  kept = y_BRD[BATCH.region_valid_BR & ~BATCH.hidden_region_BR]
  assert np.abs(kept[:, None] - hidden[:1]).max(axis=2).min() > 1e-2


def test_the_original_of_a_masked_word_reaches_amc_only_as_label():
  masked = BATCH.amc_ids_BT != BATCH.text_ids_BT
  assert masked.sum(axis=1).max() == 1

  def other(text_ids_BT):
    text_ids_BT[masked] = 50
    return text_ids_BT

  _, before = run(BATCH)
  _, after = run(change(text_ids_BT=other))
  for name in ("amc", "mlm"):
    assert after[name] == pytest.approx(before[name], rel=1e-6)
  assert abs(after["wrc"] - before["wrc"]) > 1e-4


@pytest.mark.parametrize("swap", ["text", "image", "none"])
def test_what_a_slot_shows_is_not_asked_for(swap):
  config = random_regions.config("amc", "mrc", masking={"swap": swap})
  batch = random_regions.batch(config)
  words, places = (
    ask(batch, config) for ask in (cmal.asked_words, cmal.asked_regions)
  )
  sizes = batch.anchor_ok_BA.sum(), batch.hidden_region_BR.sum()
  anchors = sizes[0]
  masked = np.sum(batch.amc_ok_BJ) - anchors
  assert np.sum(words.ok_BJ) == masked + anchors * (swap != "image")
  hidden = np.sum(batch.amc_region_ok_BJ) - anchors
  assert np.sum(places.ok_BJ) == hidden + anchors * (swap != "text")
  if swap == "none":
    # The batch hides the same slots.
    assert np.all(batch.amc_ids_BT[ROWS, batch.amc_pos_BJ[:, 0]] == 63)
    assert sizes[1] == anchors + hidden


def test_places_stay_when_contents_are_swapped():
  # With all contents alike nothing moves: what is left are the places.
  same = dict(
    text_ids_BT=lambda a: np.full_like(a, 7),
    amc_ids_BT=lambda a: np.full_like(a, 7),
    region_BRP=lambda a: np.zeros_like(a),
    hidden_region_BR=lambda a: np.zeros_like(a),
  )
  config = random_regions.config("amc", "wrc")
  params = {name: PARAMS[name] for name in random_pairs.abstract_params(config)}
  table = params["text"]["word_embedding"].copy()
  content = np.linspace(-1, 1, 64, dtype=np.float32)
  table[7] = content / content.std()
  # A feature of zeros becomes the same vector as the word.
  region = params["region"] | {
    "feature_norm": {
      "scale": np.zeros(64, np.float32),
      "bias": table[7],
    }
  }
  params = params | {
    "text": params["text"] | {"word_embedding": table},
    "region": region,
  }
  found = states(change(**same), config=config, params=params)
  np.testing.assert_allclose(found["amc"], found["wrc"], atol=1e-5)


def test_background_is_in_the_softmax_and_never_asked_for():
  def background(region_class_BR):
    region_class_BR[0] = 0
    return region_class_BR

  asked = cmal.asked_classes(change(region_class_BR=background), CONFIG)
  assert not np.any(asked.ok_BJ[0]) and np.any(asked.ok_BJ[1:])
  assert PARAMS["region_head"]["fc2"]["kernel"].shape == (64, 21)
  last = cmal.asked_classes(
    change(region_class_BR=lambda a: np.full_like(a, 20)), CONFIG
  )
  assert np.all(np.asarray(last.labels_BJ)[last.ok_BJ] == 20)
  assert np.sum(last.ok_BJ) == np.sum(BATCH.amc_region_ok_BJ)


def test_features_are_asked_of_regions_of_no_class_too(normal):
  _, losses = run(change(region_class_BR=np.zeros_like))
  assert losses["mrc"] == 0
  assert losses["mrfr"] == pytest.approx(normal[1]["mrfr"], rel=1e-6) != 0


# --- what must not matter ---------------------------------------------------


def test_padding_of_texts_and_regions_does_not_matter(normal):
  """The layout is fixed: text, its padding, regions, their padding."""
  text = dataclasses.replace(CONFIG.model.text, max_length=T + 7)
  region = dataclasses.replace(CONFIG.model.region, number=R + 5)
  longer = dataclasses.replace(
    CONFIG, model=dataclasses.replace(CONFIG.model, text=text, region=region)
  )

  def pad(array, count, value):
    width = ((0, 0), (0, count), *((0, 0),) * (array.ndim - 2))
    return np.pad(array, width, constant_values=value)

  columns = {
    name: pad(getattr(BATCH, name), count, value)
    for name, count, value in (
      ("text_ids_BT", 7, 9),
      ("amc_ids_BT", 7, 9),
      ("mlm_ids_BT", 7, 9),
      ("text_valid_BT", 7, False),
      ("region_BRP", 5, 3.0),
      ("box_BR7", 5, 0.5),
      ("region_valid_BR", 5, False),
      ("region_class_BR", 5, 3),
      ("hidden_region_BR", 5, False),
    )
  }
  _, losses = run(random_pairs.change(BATCH, **columns), config=longer)
  for name, value in normal[1].items():
    assert losses[name] == pytest.approx(value, rel=1e-5, abs=1e-5), name


def test_padding_gets_exactly_no_gradient(normal):
  text = normal[0]["text"]
  norms = np.linalg.norm(text["word_embedding"], axis=1)
  # The head reads the whole table: what padding adds is looked for elsewhere.
  places = np.linalg.norm(text["position_embedding"], axis=1)
  used = BATCH.text_valid_BT.any(axis=0)
  np.testing.assert_array_equal(places[:T] > 0, used)
  assert np.all(places[T:] == 0) and np.all(norms > 0)
  config = random_regions.config("itm")
  params = {n: PARAMS[n] for n in random_pairs.abstract_params(config)}
  gradients, _ = run(BATCH, params=params, config=config)
  table = np.linalg.norm(gradients["text"]["word_embedding"], axis=1)
  seen = np.unique(BATCH.text_ids_BT[BATCH.text_valid_BT])
  np.testing.assert_array_equal(np.flatnonzero(table), seen)


def test_the_order_of_the_batch_does_not_matter(normal):
  order = np.random.default_rng(0).permutation(SIZE)
  _, losses = run(jax.tree.map(lambda a: a[order], BATCH))
  # ITM draws its pairs by position in the batch.
  for name in EVERY:
    if name != "itm":
      assert losses[name] == pytest.approx(normal[1][name], rel=1e-5), name


def test_slots_that_hold_nothing_do_not_matter(normal):
  batch = BATCH
  for index, ok in (
    ("anchor_pos_BA", "anchor_ok_BA"),
    ("anchor_region_BA", "anchor_ok_BA"),
    ("amc_pos_BJ", "amc_ok_BJ"),
    ("amc_region_BJ", "amc_region_ok_BJ"),
    ("pair_pos_BA", "pair_ok_BA"),
    ("pair_region_BA", "pair_ok_BA"),
  ):
    there = getattr(BATCH, ok)
    assert not there.all()
    batch = change(batch, **{index: lambda a, ok=there: np.where(ok, a, 2)})
  gradients, losses = run(batch)
  assert losses == pytest.approx(normal[1], rel=1e-6)
  assert random_pairs.difference(gradients, normal[0]) < 1e-5


def test_unrolled_layers_and_kept_activations_give_the_same_losses():
  usual = random_regions.config(depth=2, dropout=0.0)
  other = random_regions.config(depth=2, scan=False, remat="full")
  params = random_pairs.spread_params(usual)
  expected, found = (
    random_pairs.loss_function(config)(params, BATCH, KEY).metrics
    for config in (usual, other)
  )
  for name, value in expected.items():
    np.testing.assert_allclose(found[name], value, rtol=2e-5, err_msg=name)


def test_bfloat16_products_change_losses_by_less_than_two_percent():
  usual = random_regions.config()
  params = random_pairs.spread_params(usual, spread=0.02)
  half = random_regions.config(compute_dtype="bfloat16")
  exact, output = (
    random_pairs.loss_function(config)(params, BATCH, KEY)
    for config in (usual, half)
  )
  assert float(output.loss) == pytest.approx(float(exact.loss), rel=0.02)
  assert {m.dtype.name for m in output.metrics.values()} == {"float32"}


# --- degenerate input -------------------------------------------------------


def fully_padded(batch):
  def blank(valid):
    valid[2] = False
    return valid

  return change(batch, text_valid_BT=blank, region_valid_BR=blank)


DEGENERATE = {
  "no anchor": lambda: random_regions.batch(CONFIG, num_anchors=(0,) * SIZE),
  "nothing to tell": lambda: change(
    **{
      name: np.zeros_like
      for name in (
        "anchor_ok_BA",
        "amc_ok_BJ",
        "amc_region_ok_BJ",
        "pair_ok_BA",
        "mlm_ok_BJ",
      )
    }
  ),
  "one sample": lambda: jax.tree.map(lambda a: a[:1], BATCH),
  "a row of padding": lambda: fully_padded(BATCH),
  "all alike": lambda: jax.tree.map(
    lambda a: np.repeat(a[:1], SIZE, axis=0), BATCH
  ),
}


@pytest.mark.parametrize("kind", DEGENERATE)
def test_degenerate_batches_have_finite_losses_and_gradients(kind):
  gradients, losses = run(DEGENERATE[kind]())
  assert all(map(math.isfinite, losses.values()))
  assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradients))
  if kind == "nothing to tell":
    assert {n for n in EVERY if losses[n]} == {"itm"}
    assert losses["anchors_per_sample"] == 0
  if kind == "no anchor":
    assert losses["wrc"] == 0 and losses["amc"] > 0


def test_samples_without_anchors_do_not_dilute_the_others():
  some = random_regions.batch(CONFIG, num_anchors=(2, 0, 0, 0, 0, 0, 0, 0))
  one = jax.tree.map(lambda a: a[:1], some)
  (_, all_losses), (_, losses) = run(some), run(one)
  assert all_losses["wrc"] == pytest.approx(losses["wrc"], rel=1e-5)
  assert all_losses["anchors_per_sample"] == 2 / SIZE


# --- pairs of ITM -----------------------------------------------------------


def pairs_shown(identity_B, key, *, shared, group):
  """(text, regions, label, counts) of each pair of ITM."""
  size = len(identity_B)
  number = np.arange(size, dtype=np.float32)
  x, y = (np.broadcast_to(number[:, None, None], (size, n, 1)) for n in (4, 3))
  valid_x, valid_y = (
    np.arange(n)[None] <= (number[:, None] % n) for n in (4, 3)
  )
  batch = random_pairs.change(
    random_regions.batch(CONFIG, size=size), identity_BM=identity_B[:, None]
  )
  (xs, text_valid, ys, region_valid), judged = cmal.judge(
    (x, valid_x, y, valid_y), batch, shared=shared, group=group, key=key
  )
  # Validity travels with what it is of.
  np.testing.assert_array_equal(np.sum(text_valid, axis=1), xs[:, 0, 0] % 4 + 1)
  np.testing.assert_array_equal(
    np.sum(region_valid, axis=1), ys[:, 0, 0] % 3 + 1
  )
  texts, regions = (np.asarray(a[:, 0, 0], int) for a in (xs, ys))
  if shared:
    texts, regions = (
      np.asarray(views.join_groups([ROWS[:size], a], size // group))
      for a in (texts, regions)
    )
  return texts, regions, np.asarray(judged.labels_A), np.asarray(judged.ok_A)


# Two groups of four; the second shows one image only.
IDS = np.array([0, 1, 2, 1, 3, 3, 3, 3], np.int32)


@pytest.mark.parametrize("shared", [False, True])
def test_half_of_each_group_is_shown_others_regions(shared, key):
  for i in range(5):
    texts, regions, labels, ok = pairs_shown(
      IDS, jax.random.fold_in(key, i), shared=shared, group=4
    )
    true, false = ok & (labels == 1), ok & (labels == 0)
    np.testing.assert_array_equal(texts[true], regions[true])
    assert np.all(IDS[texts[false]] != IDS[regions[false]])
    np.testing.assert_array_equal(texts // 4, regions // 4)
    # Two of four keep theirs; all of the second group, which find no other.
    assert [sum(true & (texts // 4 == g)) for g in (0, 1)] == [2, 4]
    assert [sum(false & (texts // 4 == g)) for g in (0, 1)] == [2, 0]
    assert len(set(texts[ok])) == ok.sum()


@pytest.mark.parametrize("group", [1, 3, 5])
def test_of_an_odd_group_one_more_keeps_its_regions(group, key):
  for shared in (False, True):
    _, _, labels, ok = pairs_shown(
      np.arange(group, dtype=np.int32), key, shared=shared, group=group
    )
    assert np.sum(ok & (labels == 1)) == (group + 1) // 2
    assert np.sum(ok & (labels == 0)) == group // 2


def test_itm_is_the_same_beside_objectives_that_share_its_pass():
  alone, beside = random_regions.config("itm"), random_regions.config()
  params = random_pairs.spread_params(beside)
  own = {name: params[name] for name in random_pairs.abstract_params(alone)}
  found, expected = (
    random_pairs.loss_function(config)(p, BATCH, KEY).metrics
    for config, p in ((beside, params), (alone, own))
  )
  for name in ("itm", "itm_accuracy"):
    np.testing.assert_allclose(found[name], expected[name], rtol=1e-5)


# --- one objective a step ---------------------------------------------------

SAMPLE = random_regions.config(
  objectives={"amc": 3.0, "wrc": 2.0, "itm": 1.0, "task_mix": "sample"}
)


def test_objectives_are_drawn_by_weight():
  keys = jax.random.split(jax.random.key(0), 6000)
  drawn = jax.vmap(lambda k: cmal.draw_task(SAMPLE, k))(keys)
  counts = collections.Counter(np.asarray(drawn).tolist())
  active = SAMPLE.objectives.active
  for number, name in enumerate(active):
    share = getattr(SAMPLE.objectives, name) / 6
    assert counts[number] / 6000 == pytest.approx(share, abs=0.03), name


def test_a_step_has_the_loss_of_what_it_drew_and_no_other_number():
  params = random_pairs.spread_params(SAMPLE)
  together = random_regions.config()
  _, all_losses = run(BATCH, params=params, config=together)
  seen = set()
  for seed in range(12):
    key = jax.random.key(seed)
    gradients, losses = run(BATCH, params=params, config=SAMPLE, key=key)
    (drawn,) = [n for n in ("amc", "wrc", "itm") if losses[n] == losses[n]]
    seen.add(drawn)
    assert losses["loss"] == losses[drawn]
    if drawn != "itm":  # whose pairs follow the key
      assert losses[drawn] == pytest.approx(all_losses[drawn], rel=1e-5)
    for name, value in losses.items():
      belongs = name.startswith(drawn) or name in ("loss", "anchors_per_sample")
      assert math.isnan(value) != belongs, name
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(gradients))
    moved = np.any(np.asarray(gradients["word_head"]["bias"]) != 0)
    assert moved == (drawn == "amc")
  assert seen == {"amc", "wrc", "itm"}


# --- who gets a gradient ----------------------------------------------------

EXTRA = {
  "amc": {"word_head", "region_head", "region/mask_feature"},
  "wrc": {"temperature"},
  "itm": {"pooler", "match_head"},
  "mlm": {"word_head"},
  "mrc": {"region_head", "region/mask_feature"},
  "mrfr": {"feature_head", "region/mask_feature"},
}
EVERYWHERE = {
  "encoder",
  *(
    f"text/{name}"
    for name in (
      "word_embedding",
      "position_embedding",
      "type_embedding",
      "norm",
    )
  ),
  *(
    f"region/{name}"
    for name in ("feature", "feature_norm", "box", "box_norm", "norm")
  ),
}


def norms_of(gradients):
  """The length of each parameter's gradient, by name."""
  return {
    sharding.path_name(path): float(np.linalg.norm(leaf))
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients)
  }


def still(norms):
  """Parameters that do not move.

  A key bias moves all logits of a row alike: its gradient is zero on paper.
  """
  return [
    name
    for name, norm in norms.items()
    if not norm > 0 and not name.endswith("key/bias")
  ]


def part_of(name):
  """`region/norm` or `encoder`."""
  pieces = name.split("/")
  return "/".join(pieces[: 2 if pieces[0] in ("region", "text") else 1])


def test_all_objectives_together_train_every_parameter(normal):
  assert not still(norms_of(normal[0]))


@pytest.mark.parametrize("objective", EVERY)
def test_an_objective_alone_trains_what_it_reads_and_has_nothing_else(
  objective,
):
  config = random_regions.config(objective)
  gradients, losses = run(
    BATCH, params=random_pairs.spread_params(config), config=config
  )
  norms = norms_of(gradients)
  assert {part_of(name) for name in norms} == EVERYWHERE | EXTRA[objective]
  assert not still(norms)
  assert set(losses) & set(config_lib.OBJECTIVES) == {objective}
  for rules in (
    sharding.PARAM_RULES,
    optimizer.LR_RULES,
    optimizer.DECAY_RULES,
    optimizer.MUON_RULES,
  ):
    for name in norms:
      sharding.match_one(name, rules)


def test_blocks_of_each_side_alone_are_trained_too():
  config = random_regions.config(unimodal_layers=(1, 1))
  gradients, _ = run(
    BATCH, params=random_pairs.spread_params(config), config=config
  )
  norms = norms_of(gradients)
  parts = {part_of(name) for name in norms}
  for side in ("text", "region"):
    assert {f"{side}/blocks", f"{side}/first_norm"} <= parts
  assert not still(norms)


def test_the_head_of_words_is_the_table_of_words():
  # A word that stands in no text gets a gradient by the softmax alone.
  config = random_regions.config("mlm", masking={"swap": "none"})
  gradients, _ = run(
    BATCH, params=random_pairs.spread_params(config), config=config
  )
  table = np.asarray(gradients["text"]["word_embedding"])
  absent = np.setdiff1d(np.arange(64), [*BATCH.mlm_ids_BT.ravel()])
  assert len(absent) and np.all(np.linalg.norm(table[absent], axis=1) > 0)


def test_without_anchors_in_the_batch_uniter_runs():
  config = random_regions.config("itm", "mlm", "mrc", masking={"swap": "none"})
  batch = random_pairs.change(
    random_regions.batch(config),
    **dict.fromkeys(
      (
        "anchor_pos_BA",
        "anchor_region_BA",
        "anchor_ok_BA",
        "amc_ids_BT",
        "amc_pos_BJ",
        "amc_labels_BJ",
        "amc_ok_BJ",
        "pair_pos_BA",
        "pair_region_BA",
        "pair_ok_BA",
      )
    ),
  )
  _, losses = run(
    batch, params=random_pairs.spread_params(config), config=config
  )
  assert set(losses) == {
    "loss",
    "itm",
    "itm_accuracy",
    "mlm",
    "mlm_accuracy",
    "mrc",
    "mrc_hidden_accuracy",
  }
  assert all(map(math.isfinite, losses.values()))


# --- evaluation -------------------------------------------------------------


def test_evaluation_scores_what_training_judges():
  # The own pairs of ITM, from the scores that retrieval ranks by.
  config = random_regions.config("itm", unimodal_layers=(1, 1))
  params, batch = random_pairs.spread_params(config), BATCH
  system = registry.find(config)

  @jax.jit
  def compute(params, batch):
    visual = system.see(batch)
    x_BTD = system.encode_text(
      params, batch.text_ids_BT, batch.text_valid_BT, config=config
    )
    y_BRD = system.encode_visual(params, visual, config=config)
    states = x_BTD, batch.text_valid_BT, y_BRD, visual.valid
    return system.match_scores(params, *states, config=config)

  # A batch of equal identities has no false pair: ITM is of all own ones.
  alone = change(identity_BM=np.zeros_like)
  loss = random_pairs.loss_function(config)(params, alone, KEY)
  scores = np.asarray(compute(params, batch))
  expected = np.mean(np.log1p(np.exp(-scores)))
  assert float(loss.metrics["itm"]) == pytest.approx(expected, rel=1e-4)


def test_dropout_follows_the_key_and_is_off_in_evaluation():
  config = random_regions.config("wrc", dropout=0.5)
  params = random_pairs.spread_params(config)
  go = random_pairs.loss_function(config)
  first = float(go(params, BATCH, KEY).loss)
  assert first == float(go(params, BATCH, KEY).loss)
  assert first != float(go(params, BATCH, jax.random.key(6)).loss)
