from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from glscl_jax.data import masking

MASK = 999
PLAIN = np.arange(4, 999, dtype=np.int32)
START, PAD, END = 0, 1, 2


def make_text(num_real: int, *, length: int = 50):
  """Ids 100, 101, .. between the specials, then pads."""
  ids_T = np.full(length, PAD, np.int32)
  ids_T[: num_real + 2] = [START, *range(100, 100 + num_real), END]
  real_T = np.zeros(length, bool)
  real_T[1 : num_real + 1] = True
  return ids_T, real_T


def mask_mlm(ids_T, real_T, *, seed=0, rate=0.15, **options):
  return masking.mask_tokens(
    np.random.default_rng(seed),
    ids_T,
    real_T,
    rate=rate,
    mask_id=MASK,
    plain_ids_V=PLAIN,
    **options,
  )


def mask_scl(ids_T, real_T, *, seed=0, **options):
  return masking.mask_completion(
    np.random.default_rng(seed),
    ids_T,
    real_T,
    rate=0.4,
    mask_id=MASK,
    **options,
  )


@pytest.mark.parametrize(
  ("num_patches", "kept"),
  [(16, 3), (196, 39), (324, 64), (576, 115), (100, 20), (400, 80)],
)
def test_patch_drop_keeps_the_listed_count(num_patches, kept):
  keep = masking.drop_patches(
    np.random.default_rng(0), num_patches, drop_ratio=0.8
  )
  assert len(set(keep.tolist())) == len(keep) == kept
  assert keep.min() >= 0 and keep.max() < num_patches
  assert keep.dtype == np.int32


def test_drop_ratio_zero_keeps_every_patch():
  keep = masking.drop_patches(np.random.default_rng(0), 16, drop_ratio=0.0)
  assert sorted(keep.tolist()) == list(range(16))


def test_patch_drop_keeps_the_smallest_noise_in_noise_order():
  keep = masking.drop_patches(np.random.default_rng(3), 16, drop_ratio=0.5)
  noise = np.random.default_rng(3).random(16)
  assert np.array_equal(keep, np.argsort(noise)[:8])


@pytest.mark.parametrize(
  ("num_patches", "hidden"), [(16, 4), (196, 58), (324, 97), (576, 172)]
)
def test_patch_token_hides_the_listed_count(num_patches, hidden):
  index = masking.token_patches(
    np.random.default_rng(0), num_patches, ratio=0.3
  )
  assert len(set(index.tolist())) == len(index) == hidden
  assert index.min() >= 0 and index.max() < num_patches


def test_every_patch_is_hidden_equally_often():
  rng = np.random.default_rng(0)
  count = np.zeros(16)
  for _ in range(2000):
    count[masking.token_patches(rng, 16, ratio=0.3)] += 1
  # 500 expected; the standard deviation is 19.
  assert np.all(abs(count - 500) < 90)


def block_patches(image_size, patch_size, *, seed=0, block_size=32, ratio=0.6):
  return masking.block_patches(
    np.random.default_rng(seed),
    image_size,
    patch_size,
    block_size=block_size,
    ratio=ratio,
  )


@pytest.mark.parametrize(
  ("image_size", "blocks", "patches"),
  [(64, 3, 12), (224, 30, 120), (256, 39, 156), (288, 49, 196), (384, 87, 348)],
)
def test_blocks_hide_the_listed_counts(image_size, blocks, patches):
  index = block_patches(image_size, 16)
  assert index.dtype == np.int32
  assert len(set(index.tolist())) == len(index) == patches
  count = masking.num_blocks(image_size, block_size=32, ratio=0.6)
  assert count == blocks
  assert patches == masking.num_block_patches(
    image_size, 16, block_size=32, ratio=0.6
  )


@pytest.mark.parametrize(
  ("image_size", "patch_size", "block_size"),
  [(64, 16, 32), (64, 8, 32), (64, 32, 32), (144, 18, 36)],
)
def test_a_hidden_block_hides_all_its_patches(
  image_size, patch_size, block_size
):
  grid, scale = image_size // patch_size, block_size // patch_size
  for seed in range(20):
    index = block_patches(
      image_size, patch_size, seed=seed, block_size=block_size
    )
    hidden = np.zeros((grid, grid), bool)
    hidden[np.divmod(index, grid)] = True
    side = grid // scale
    blocks = hidden.reshape(side, scale, side, scale).transpose(0, 2, 1, 3)
    shares = blocks.reshape(side * side, -1).mean(axis=1)
    assert set(shares) <= {0.0, 1.0}
    assert shares.sum() == masking.num_blocks(
      image_size, block_size=block_size, ratio=0.6
    )
    assert np.array_equal(index, np.sort(index))


def test_every_block_is_hidden_equally_often():
  count = np.zeros(16)
  for seed in range(2000):
    count[block_patches(64, 16, seed=seed)] += 1
  # 1500 of 2000 expected; the standard deviation is 19.
  assert np.all(abs(count - 1500) < 90)


@pytest.mark.parametrize(
  ("ratio", "count"), [(0.0, 0), (0.55, 55), (0.551, 56)]
)
def test_rounding_errors_hide_no_further_block(ratio, count):
  # .55 * 100 is a little more than 55.
  assert masking.num_blocks(320, block_size=32, ratio=ratio) == count


@pytest.mark.parametrize(
  ("num_real", "low", "high"),
  [(5, 1, 2), (8, 1, 2), (10, 2, 3), (20, 3, 6), (30, 5, 9), (48, 7, 14)],
)
def test_mlm_labels_the_listed_count(num_real, low, high):
  text = make_text(num_real)
  assert mask_mlm(*text).ok_J.sum() == low
  assert mask_mlm(*text, rate=0.3).ok_J.sum() == high


def test_mlm_slots_are_those_of_a_full_text():
  assert masking.mlm_slots(50, rate=0.15) == 7
  assert masking.mlm_slots(50, rate=0.3) == 14
  assert masking.mlm_slots(3, rate=0.15) == 1


@pytest.mark.parametrize(
  ("num_real", "masked"),
  [
    (1, 1),
    (2, 1),
    (3, 1),
    (5, 2),
    (8, 3),
    (10, 4),
    (20, 8),
    (30, 12),
    (48, 19),
  ],
)
def test_completion_masks_the_listed_count(num_real, masked):
  ids_T, real_T = make_text(num_real)
  found = mask_scl(ids_T, real_T)
  assert found.ok_J.sum() == masked == (found.ids_T == MASK).sum()
  assert len(found.ok_J) == masking.completion_slots(50, rate=0.4) == 19


@pytest.mark.parametrize("num_real", [0, 1, 2, 7, 48])
@pytest.mark.parametrize(
  "options",
  [
    {"mask": mask_mlm},
    {"mask": mask_mlm, "scheme": "all"},
    {"mask": mask_mlm, "padded_draw": True},
    {"mask": mask_mlm, "word_T": np.arange(50) // 3},
    {"mask": mask_scl},
    {"mask": mask_scl, "with_replacement": True},
  ],
)
def test_only_real_tokens_are_masked_and_labels_are_the_originals(
  num_real, options
):
  options = dict(options)
  mask = options.pop("mask")
  ids_T, real_T = make_text(num_real)
  for seed in range(30):
    found = mask(ids_T, real_T, seed=seed, **options)
    chosen = found.pos_J[found.ok_J]
    assert len(set(chosen.tolist())) == len(chosen)
    assert real_T[chosen].all()
    assert np.array_equal(found.labels_J[found.ok_J], ids_T[chosen])
    assert not found.pos_J[~found.ok_J].any()
    assert not found.labels_J[~found.ok_J].any()
    untouched = np.ones(50, bool)
    untouched[chosen] = False
    assert np.array_equal(found.ids_T[untouched], ids_T[untouched])
  assert ids_T[0] == START and MASK not in ids_T  # the input is not changed


@pytest.mark.parametrize("num_real", [0, 1, 2])
def test_very_short_texts_mask_one_token_or_none(num_real):
  text = make_text(num_real)
  assert mask_mlm(*text).ok_J.sum() == min(num_real, 1)
  assert mask_scl(*text).ok_J.sum() == min(num_real, 1)


@pytest.mark.parametrize("mask", [mask_mlm, mask_scl])
@pytest.mark.parametrize("num_real", [1, 9, 41])
def test_longer_padding_leaves_the_mask_alone(mask, num_real):
  short, long = (
    mask(*make_text(num_real, length=length), seed=5) for length in (50, 57)
  )
  assert np.array_equal(short.pos_J[short.ok_J], long.pos_J[long.ok_J])
  assert np.array_equal(short.ids_T, long.ids_T[:50])


def test_scheme_801010_has_these_shares():
  ids_T, real_T = make_text(48)
  counts = dict.fromkeys(("mask", "same", "random"), 0)
  for seed in range(600):
    found = mask_mlm(ids_T, real_T, seed=seed, rate=0.3)
    written = found.ids_T[found.pos_J]
    counts["mask"] += (written == MASK).sum()
    counts["same"] += (written == found.labels_J).sum()
    counts["random"] += ((written != MASK) & (written != found.labels_J)).sum()
  total = 600 * 14  # standard deviation of a share: at most .0044
  assert counts["mask"] / total == pytest.approx(0.8, abs=0.02)
  assert counts["same"] / total == pytest.approx(0.1, abs=0.015)
  assert counts["random"] / total == pytest.approx(0.1, abs=0.015)


def test_random_replacements_are_plain_ids_only():
  ids_T, real_T = make_text(48)
  plain = np.array([500, 501], np.int32)
  written = set()
  for seed in range(200):
    found = masking.mask_tokens(
      np.random.default_rng(seed),
      ids_T,
      real_T,
      rate=0.15,
      mask_id=MASK,
      plain_ids_V=plain,
    )
    changed = found.ids_T != ids_T
    written |= set(found.ids_T[changed].tolist())
  assert written == {MASK, 500, 501}


def test_whole_words_are_masked_whole_up_to_the_count():
  ids_T, real_T = make_text(30)
  word_T = np.where(real_T, (np.arange(50) - 1) // 3, -1)
  for seed in range(50):
    found = mask_mlm(ids_T, real_T, seed=seed, word_T=word_T, scheme="all")
    chosen = set(found.pos_J[found.ok_J].tolist())
    words = {int(word_T[p]) for p in chosen}
    assert chosen == {p for p in range(50) if int(word_T[p]) in words}
    # 5 tokens are asked for; two words of three cover them.
    assert len(words) == 2


def test_one_word_that_fills_the_text_fits_the_slots():
  ids_T, real_T = make_text(48)
  found = mask_mlm(ids_T, real_T, word_T=np.where(real_T, 0, -1))
  assert found.ok_J.sum() == len(found.ok_J) == 48


def test_the_published_draw_over_padding_often_finds_nothing():
  empty = {}
  for num_real in (6, 10, 20):
    ids_T, real_T = make_text(num_real)
    empty[num_real] = np.mean(
      [
        not mask_mlm(ids_T, real_T, seed=s, padded_draw=True).ok_J.any()
        for s in range(1500)
      ]
    )
  # 33%, 14% and 1% by the hypergeometric distribution; deviation .012.
  assert empty[6] == pytest.approx(0.33, abs=0.04)
  assert empty[10] == pytest.approx(0.14, abs=0.03)
  assert empty[20] == pytest.approx(0.012, abs=0.01)
  assert masking.mlm_slots(50, rate=0.15, padded_draw=True) == 8


def test_the_published_draw_with_replacement_masks_less():
  ids_T, real_T = make_text(10)
  shares = [
    mask_scl(ids_T, real_T, seed=s, with_replacement=True).ok_J.mean() * 20
    for s in range(1500)
  ]
  # 5 draws of 10: 10 (1 - .9 ** 5) = 4.095 distinct ones.
  assert np.mean(shares) == pytest.approx(4.095, abs=0.08)
  assert max(shares) == 5


def test_streams_of_a_sample_differ_and_repeat():
  def draw(*key):
    return masking.sample_rng(*key).integers(2**62)

  keys = [
    (0, 0, 0, "mlm"),
    (0, 0, 0, "drop"),
    (0, 0, 1, "mlm"),
    (0, 1, 0, "mlm"),
    (1, 0, 0, "mlm"),
  ]
  assert len({draw(*key) for key in keys}) == len(keys)
  assert draw(3, 2, 1, "mlm") == draw(3, 2, 1, "mlm")


def test_masks_do_not_depend_on_the_hash_seed():
  program = (
    "from glscl_jax.data import masking;"
    "print(masking.sample_rng(0, 1, 2, 'mlm').integers(2**62))"
  )
  outputs = {
    subprocess.run(
      [sys.executable, "-c", program],
      env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
      capture_output=True,
      text=True,
      check=True,
    ).stdout
    for seed in ("1", "2")
  }
  assert outputs == {f"{masking.sample_rng(0, 1, 2, 'mlm').integers(2**62)}\n"}


# Around anchors.


def mask_amc(ids_T, real_T, words=(), rest=(), *, seed=0, **options):
  rest_T = np.zeros(len(ids_T), bool)
  rest_T[list(rest)] = True
  defaults = {"rate": 0.15, "max_anchors": 4}
  return masking.mask_around_anchors(
    np.random.default_rng(seed),
    ids_T,
    real_T,
    np.array(words, np.int32),
    rest_T,
    mask_id=MASK,
    plain_ids_V=PLAIN,
    **{**defaults, **options},
  )


@pytest.mark.parametrize(
  ("num_real", "anchors", "rest", "others"),
  [
    (20, (3, 7), (8,), 3),
    (30, (), (), 5),
    (5, (2,), (), 1),
    (4, (2,), (3,), 0),
  ],
)
def test_anchors_and_a_share_of_the_other_words_are_targets(
  num_real, anchors, rest, others
):
  ids_T, real_T = make_text(num_real)
  for seed in range(20):
    found = mask_amc(ids_T, real_T, anchors, rest, seed=seed)
    targets = found.pos_J[found.ok_J].tolist()
    assert set(anchors) | set(rest) <= set(targets)
    assert len(targets) == len(anchors) + len(rest) + others
    assert targets == sorted(set(targets))
    assert found.labels_J[found.ok_J].tolist() == ids_T[targets].tolist()
    # Anchors are swapped, not masked; what else their words have is masked.
    assert (found.ids_T[list(anchors)] == ids_T[list(anchors)]).all()
    assert (found.ids_T[list(rest)] == MASK).all()
    still = np.ones(50, bool)
    still[targets] = False
    assert (found.ids_T[still] == ids_T[still]).all()
    assert real_T[targets].all()


def test_other_words_around_anchors_are_replaced_80_10_10():
  ids_T, real_T = make_text(48)
  counts = dict.fromkeys(("mask", "same", "random"), 0)
  for seed in range(600):
    found = mask_amc(ids_T, real_T, (5,), (6,), seed=seed, rate=0.3)
    others = [p for p in found.pos_J[found.ok_J] if p not in (5, 6)]
    written, labels = found.ids_T[others], ids_T[others]
    counts["mask"] += (written == MASK).sum()
    counts["same"] += (written == labels).sum()
    counts["random"] += ((written != MASK) & (written != labels)).sum()
  total = sum(counts.values())
  assert total == 600 * 14
  assert counts["mask"] / total == pytest.approx(0.8, abs=0.02)
  assert counts["same"] / total == pytest.approx(0.1, abs=0.015)


@pytest.mark.parametrize(("num_real", "targets"), [(0, []), (1, [1]), (2, [1])])
def test_a_text_without_a_target_has_its_first_token_masked(num_real, targets):
  ids_T, real_T = make_text(num_real)
  found = mask_amc(ids_T, real_T)
  assert found.pos_J[found.ok_J].tolist() == targets
  assert np.flatnonzero(found.ids_T == MASK).tolist() == targets


def test_anchors_are_masked_where_nothing_is_swapped():
  ids_T, real_T = make_text(20)
  found = mask_amc(ids_T, real_T, (3, 7), anchors="hide")
  assert (found.ids_T[[3, 7]] == MASK).all()
  assert {3, 7} <= set(found.pos_J[found.ok_J].tolist())


def test_anchors_that_are_shown_are_neither_masked_nor_asked():
  ids_T, real_T = make_text(20)
  for seed in range(20):
    found = mask_amc(ids_T, real_T, (3, 7), (8,), seed=seed, anchors="show")
    targets = found.pos_J[found.ok_J].tolist()
    assert len(targets) == 3 and not {3, 7, 8} & set(targets)
    assert np.array_equal(found.ids_T[[3, 7, 8]], ids_T[[3, 7, 8]])
  # One other word is a target; without other words nothing is.
  short = make_text(3)
  found = mask_amc(*short, (1,), (2,), anchors="show")
  assert found.pos_J[found.ok_J].tolist() == [3]
  assert not mask_amc(*short, (1,), (2, 3), anchors="show").ok_J.any()


def test_the_slots_around_anchors_hold_the_longest_text():
  ids_T, real_T = make_text(48)
  rest = range(10, 40)  # of few words with many pieces
  found = mask_amc(ids_T, real_T, (9, 41, 43, 45), rest)
  slots = masking.anchor_slots(50, rate=0.15, max_anchors=4)
  assert len(found.ok_J) == slots == 8 + 7
  # All are masked; as many as there may be anchors are targets.
  assert (found.ids_T[list(rest)] == MASK).all()
  assert found.ok_J.sum() == 4 + 4 + 2
  assert {10, 11, 12, 13} <= set(found.pos_J[found.ok_J].tolist())
  # Nothing but other words.
  assert mask_amc(ids_T, real_T).ok_J.sum() == 7


def test_longer_padding_leaves_the_mask_around_anchors_alone():
  short, long = (
    mask_amc(*make_text(30, length=length), (3, 9), (4, 5), seed=5)
    for length in (50, 57)
  )
  assert np.array_equal(short.pos_J[short.ok_J], long.pos_J[long.ok_J])
  assert np.array_equal(short.ids_T, long.ids_T[:50])


# Regions.


def mask_regions(count, anchors=(), *, size=36, seed=0, **options):
  return masking.mask_regions(
    np.random.default_rng(seed),
    np.arange(size) < count,
    np.array(anchors, np.int32),
    **{"rate": 0.25, "hide_anchors": False, **options},
  )


def test_each_region_of_no_anchor_is_hidden_with_the_rate():
  hidden = np.zeros(36)
  for seed in range(2000):
    found = mask_regions(30, (2, 5), seed=seed)
    hidden += found.hidden_R
    asked = found.pos_J[found.ok_J].tolist()
    assert asked == sorted({2, 5, *np.flatnonzero(found.hidden_R).tolist()})
    assert not found.pos_J[~found.ok_J].any()
  assert not hidden[[2, 5]].any() and not hidden[30:].any()
  others = np.delete(hidden[:30], [2, 5])
  # 500 expected; the standard deviation is 19.
  assert np.all(abs(others - 500) < 90)


@pytest.mark.parametrize(
  ("count", "anchors", "hidden"),
  [(0, (), 0), (1, (), 1), (4, (), 1), (4, (1,), 0)],
)
def test_one_region_is_hidden_where_nothing_else_is_asked(
  count, anchors, hidden
):
  seen = set()
  for seed in range(40):
    found = mask_regions(count, anchors, seed=seed, rate=0.0)
    assert found.hidden_R.sum() == hidden
    assert found.ok_J.sum() == hidden + len(anchors)
    seen.update(np.flatnonzero(found.hidden_R).tolist())
  assert seen == (set(range(count)) if hidden else set())


def test_anchored_regions_are_hidden_where_nothing_is_swapped():
  found = mask_regions(6, (1, 4), rate=0.0, hide_anchors=True)
  assert np.flatnonzero(found.hidden_R).tolist() == [1, 4]
  assert found.pos_J[found.ok_J].tolist() == [1, 4]


def test_longer_padding_leaves_the_region_mask_alone():
  for seed in range(10):
    short = mask_regions(30, (2,), seed=seed)
    long = mask_regions(30, (2,), seed=seed, size=43)
    assert np.array_equal(short.hidden_R, long.hidden_R[:36])
    assert np.array_equal(short.pos_J, long.pos_J[:36])
