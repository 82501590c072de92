import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glscl_jax import config as config_lib
from glscl_jax.config import ObjectiveConfig
from glscl_jax.models import fusion, heads, text, vision
from glscl_jax.systems import glscl, views
from glscl_jax.systems.views import Pass, Reads
from tests import random_pairs

SCL = ObjectiveConfig(mltc_image=0.0, mltc_text=0.0)


def test_glscl_reads_the_published_versions_and_passes():
  plan = glscl.make_plan(ObjectiveConfig())
  assert set(plan.image_versions) == {"full", "drop", "token", "itm"}
  assert set(plan.text_versions) == {"full", "mlm", "scl"}
  assert set(plan.passes) == {
    Pass("itm", "full"),
    Pass("full", "mlm"),
    Pass("drop", "full"),
    Pass("token", "full"),
    Pass("full", "scl"),
  }


def test_only_rows_that_losses_read_are_planned():
  plan = glscl.make_plan(ObjectiveConfig())
  rows = {
    fused: (set(plan.text_rows[fused]), set(plan.image_rows[fused]))
    for fused in plan.passes
  }
  assert rows == {
    Pass("itm", "full"): ({"class"}, {"class"}),
    Pass("full", "mlm"): ({"mlm"}, set()),
    Pass("drop", "full"): ({"class", "scl"}, {"class"}),
    Pass("token", "full"): (set(), {"token"}),
    Pass("full", "scl"): ({"class", "scl"}, {"class", "token"}),
  }


def test_scl_is_glscl_without_the_token_pass():
  plan = glscl.make_plan(SCL)
  assert "token" not in plan.image_versions
  assert len(plan.passes) == 4


def test_clean_targets_cost_one_more_pass():
  plan = glscl.make_plan(ObjectiveConfig(completion_targets="clean"))
  assert len(plan.passes) == 6
  assert plan.text_rows[Pass("full", "full")] == ("class", "scl")
  assert plan.image_rows[Pass("full", "full")] == ("class", "token")


def test_independent_text_dropout_costs_one_encoding_a_reader():
  plan = glscl.make_plan(ObjectiveConfig(share_text_dropout=False))
  # itc, itm, drop and token read T; T_mlm and T_40 are one each.
  assert len(plan.text_versions) == 6


@pytest.mark.parametrize(
  ("objective", "images", "texts", "passes"),
  [
    ("mlm", {"full"}, {"mlm"}, 1),
    ("itm", {"full", "itm"}, {"full"}, 1),
    ("itc", {"full"}, {"full"}, 0),
    ("mgsc_image", {"drop", "full"}, {"full", "scl"}, 2),
    ("mgsc_text", {"drop", "full"}, {"full", "scl"}, 2),
    ("mltc_image", {"token", "full"}, {"full", "scl"}, 2),
    ("mltc_text", {"drop", "full"}, {"full", "scl"}, 2),
  ],
)
def test_an_objective_alone_plans_only_what_it_reads(
  objective, images, texts, passes
):
  plan = glscl.make_plan(ObjectiveConfig(**random_pairs.only(objective)))
  assert set(plan.image_versions) == images
  assert set(plan.text_versions) == texts
  assert len(plan.passes) == passes


def test_the_plan_keeps_the_order_of_first_mention():
  first, second = Pass("b", "t"), Pass("a", "u")
  plan = views.make_plan(
    [
      Reads(fused=first, text_rows=("z",)),
      Reads(fused=second, image_rows=("y",)),
      Reads(fused=first, text_rows=("z", "x")),
    ],
    images=("q",),
    texts=(),
  )
  assert plan.passes == (first, second)
  assert plan.text_rows[first] == ("z", "x")
  assert plan.image_rows[first] == ()
  assert plan.image_versions == ("q", "b", "a")
  assert plan.text_versions == ("t", "u")


def count_calls(monkeypatch, owner, name, calls):
  """Records the shape of the first array of every call of a method."""
  original = getattr(owner, name)

  def counted(self, first, *rest, **options):
    calls.setdefault(f"{owner.__name__}.{name}", []).append(
      jax.tree.leaves(first)[0].shape
    )
    return original(self, first, *rest, **options)

  monkeypatch.setattr(owner, name, counted)


def calls_of_a_step(config, monkeypatch):
  """What the towers are called with in one loss, by method."""
  params = jax.eval_shape(
    functools.partial(glscl.init, config), jax.random.key(0)
  )
  calls = {}
  for owner, name in (
    (vision.VisionEncoder, "embed"),
    (vision.VisionEncoder, "encode"),
    (text.TextEncoder, "__call__"),
    (fusion.Fusion, "body"),
    (heads.VocabularyHead, "__call__"),
  ):
    count_calls(monkeypatch, owner, name, calls)
  jax.eval_shape(
    functools.partial(glscl.loss, config=config),
    params,
    random_pairs.batch(config),
    key=jax.random.key(0),
  )
  return calls


def test_every_version_is_encoded_once_and_equal_shapes_together(monkeypatch):
  config = random_pairs.config(batch_size=4)
  assert calls_of_a_step(config, monkeypatch) == {
    # One patch embedding for all versions of the image.
    "VisionEncoder.embed": [(4, 32, 32, 3)],
    # Full and token versions in one call; 3 of 16 patches stay in the other.
    "VisionEncoder.encode": [(8, 17, 64), (4, 4, 64)],
    # T, T_mlm and T_40.
    "TextEncoder.__call__": [(12, 10)],
    # Four passes at full length in one call, the drop pass in another.
    "Fusion.body": [(16, 10, 64), (4, 10, 64)],
    # Masked positions only.
    "VocabularyHead.__call__": [(4, 1, 64)],
  }


def test_false_images_of_the_data_set_are_encoded_for_half_of_the_batch(
  monkeypatch,
):
  config = random_pairs.config(
    batch_size=4,
    objectives=random_pairs.only("itm") | {"itm_negatives": "dataset"},
  )
  labels_B = np.array([1, 0, 0, 1], np.int32)
  original = random_pairs.batch

  def with_false_images(config):
    batch = original(config)
    return random_pairs.change(
      batch, itm_labels_B=labels_B, false_image_BYXC=batch.image_BYXC
    )

  monkeypatch.setattr(random_pairs, "batch", with_false_images)
  calls = calls_of_a_step(config, monkeypatch)
  assert calls["VisionEncoder.encode"] == [(4, 17, 64), (2, 17, 64)]


def test_base_costs_2_2_image_and_3_text_encodings(monkeypatch):
  # As docs/systems.md says; the drop version keeps 64 of 324 patches.
  config = config_lib.Config(
    model=config_lib.ModelConfig(
      vision=config_lib.VisionConfig(width=64, depth=1, patch_size=16),
      text=config_lib.TextConfig(width=64, depth=1, vocab_size=64),
      fusion=config_lib.FusionConfig(width=64, depth=1),
    ),
    data=config_lib.DataConfig(batch_size=4),
  )
  calls = calls_of_a_step(config, monkeypatch)
  image_tokens = sum(
    rows * length for rows, length, _ in calls["VisionEncoder.encode"]
  )
  assert image_tokens / (4 * 325) == pytest.approx(2.2)
  assert calls["TextEncoder.__call__"] == [(3 * 4, 50)]
  assert [rows for rows, _, _ in calls["Fusion.body"]] == [4 * 4, 4]
  assert calls["VocabularyHead.__call__"] == [(4, 7, 64)]


def test_joined_rows_stay_with_their_sample_and_come_back():
  items = [np.arange(6).reshape(3, 2) + 10 * i for i in range(4)]
  joined = views.stack_rows(items)
  assert joined.shape == (12, 2)
  # Sample 1 of all items lies together: rows 4 to 7.
  np.testing.assert_array_equal(joined[4:8], [item[1] for item in items])
  for item, back in zip(items, views.unstack_rows(joined, 4), strict=True):
    np.testing.assert_array_equal(item, back)


def test_groups_of_different_length_are_joined_part_by_part():
  items = [np.arange(2 * n).reshape(n, 2) + 100 * n for n in (4, 2, 0, 6)]
  joined = views.join_groups(items, 2)
  assert joined.shape == (12, 2)
  # The first half of all items is the first half.
  halves = [item[: len(item) // 2] for item in items]
  np.testing.assert_array_equal(joined[:6], np.concatenate(halves))
  parts = views.split_groups(joined, 2, [4, 2, 0, 6])
  for item, back in zip(items, parts, strict=True):
    np.testing.assert_array_equal(item, back)


def test_items_of_equal_shape_share_one_call():
  shapes = []

  def double(a, b):
    shapes.append((a.shape, b.shape))
    return 2 * a, b.sum(axis=1)

  rng = np.random.default_rng(0)
  items = {
    "p": (rng.normal(size=(3, 2)), rng.normal(size=(3, 5))),
    "q": (rng.normal(size=(3, 4)), rng.normal(size=(3, 5))),
    "r": (rng.normal(size=(3, 2)), rng.normal(size=(3, 5))),
  }
  results = views.batch_by_shape(double, items)
  assert shapes == [((6, 2), (6, 5)), ((3, 4), (3, 5))]
  assert list(results) == ["p", "q", "r"]
  for name, (a, b) in items.items():
    np.testing.assert_allclose(results[name][0], 2 * a, rtol=1e-6)
    np.testing.assert_allclose(results[name][1], b.sum(axis=1), rtol=1e-5)


def test_rows_are_found_again_by_name():
  indices = {
    "class": jnp.zeros((2, 1), jnp.int32),
    "mlm": jnp.array([[4, 5, 6], [1, 2, 3]]),
  }
  index_BQ, offsets = views.index_rows(("mlm", "class"), indices, 2)
  np.testing.assert_array_equal(index_BQ, [[4, 5, 6, 0], [1, 2, 3, 0]])
  rows = views.Rows(index_BQ[:, :, None], offsets)
  np.testing.assert_array_equal(rows["mlm"][:, :, 0], indices["mlm"])
  np.testing.assert_array_equal(rows["class"][:, :, 0], indices["class"])


def test_no_names_ask_for_no_rows():
  index_BQ, offsets = views.index_rows((), {}, 3)
  assert index_BQ.shape == (3, 0)
  assert offsets == {}
