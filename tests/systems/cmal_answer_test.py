"""What CMAL says of anchors, beside its NumPy version in float64."""

from __future__ import annotations

import numpy as np
import pytest

from glscl_jax.systems import cmal
from tests import random_pairs, random_regions
from tests.systems import cmal_reference_test as reference

T = reference.T


def answer(config, batch):
  params = random_pairs.spread_params(config)
  return params, cmal.answer(params, batch, config=config)


@pytest.mark.parametrize("swap", ["both", "none"])
def test_words_classes_and_cosines_are_those_of_the_reference(swap):
  config = reference.make_config(swap)
  batch = random_regions.batch(config)
  params, found = answer(config, batch)
  own = reference.Reference(params, batch, swap)
  table = own.p["text"]["word_embedding"]
  sides = ("text", "image") if swap == "both" else ()
  for b in range(reference.SIZE):
    states = own.run(
      b, own.words(b, batch.amc_ids_BT[b]), own.regions(b, hide=True), sides
    )
    logits = own.head("word_head", states[:T]) @ table.T
    logits += own.p["word_head"]["bias"]
    classes = own.head("region_head", states[T:])
    classes = reference.dense(own.p["region_head"]["fc2"], classes)
    for slots, expected in ((found.words, logits), (found.classes, classes)):
      ok = np.asarray(slots.ok_BJ[b])
      np.testing.assert_allclose(
        slots.logits_BJV[b][ok], expected[slots.index_BJ[b][ok]], atol=2e-3
      )
    clean = own.run(b, own.words(b, batch.text_ids_BT[b]), own.regions(b))
    clean /= np.linalg.norm(clean, axis=1, keepdims=True)
    valid = np.outer(batch.text_valid_BT[b], batch.region_valid_BR[b])
    cosine = np.asarray(found.cosine_BTR[b])
    np.testing.assert_allclose(
      cosine[valid], (clean[:T] @ clean[T:].T)[valid], atol=1e-4
    )
    assert (cosine[~valid] < -1e29).all()


def test_anchors_are_marked_among_the_slots():
  config = reference.make_config()
  batch = random_regions.batch(config, num_anchors=(0, 1, 2, 3))
  _, found = answer(config, batch)
  for slots in (found.words, found.classes):
    assert slots.anchor_BJ.sum(axis=1).tolist() == [0, 1, 2, 3]
    # One word and one region besides, by tests/random_regions.py.
    assert slots.ok_BJ.sum(axis=1).tolist() == [1, 2, 3, 4]
  at = found.words.index_BJ[3][found.words.anchor_BJ[3]]
  assert at.tolist() == batch.anchor_pos_BA[3][:3].tolist()


@pytest.mark.parametrize(
  ("names", "options", "fields"),
  [
    (("itm",), {}, set()),
    (("wrc", "itm"), {}, {"cosine_BTR"}),
    (("amc",), {}, {"words", "classes"}),
    (("amc",), {"amc_pair": 1.0}, {"words", "classes", "cosine_BTR"}),
    (("mlm",), {}, {"words"}),
    (("mrc", "mrfr"), {}, {"classes"}),
  ],
)
def test_only_what_an_objective_trains_is_answered(names, options, fields):
  config = random_regions.config(*names, objectives=options)
  assert cmal.answered(config) == fields
  if fields:
    _, found = answer(config, random_regions.batch(config))
    given = ("words", "classes", "cosine_BTR")
    assert {n for n in given if getattr(found, n) is not None} == fields


def test_masked_words_of_uniter_have_no_anchors():
  config = random_regions.config("mlm", "mrc", masking={"swap": "none"})
  batch = random_regions.batch(config)
  _, found = answer(config, batch)
  assert found.words.ok_BJ.tolist() == batch.mlm_ok_BJ.tolist()
  assert not found.words.anchor_BJ.any()
