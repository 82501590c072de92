"""How a split becomes unique images, unique captions and relevance."""

import numpy as np
import pytest

from glscl_jax.data import pairs, retrieval_set, transforms
from tests import tiny
from tests.data import tiny_regions


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  """Six records: a repeated picture, a repeated text, two bad ones."""
  rows = [
    tiny.record("test", 0, ("cat", "a cat sits")),
    tiny.record("test", 1, ("dog",)),
    tiny.record("test", 2, ("  cat ",)),  # another drawing of it
    tiny.record("test", 3, ("hound", "dog"), seed=1),  # the picture of 1
    pairs.Record(
      id="test-4",
      split="test",
      image=tiny.png(4)[:60],
      captions=("cut off", "dog"),
    ),
    tiny.record("test", 5, ("", " ")),
  ]
  return tiny.write_data(
    tmp_path_factory.mktemp("retrieval_set") / "data", {"test": rows}
  )


def as_sets(found):
  """Image name -> its captions."""
  return {
    name: {found.captions[j] for j in np.flatnonzero(found.relevant_UZ[i])}
    for i, name in enumerate(found.image_names)
  }


def load(found, batch_size):
  return list(
    retrieval_set.image_batches(found, batch_size=batch_size, image_size=16)
  )


def test_equal_pictures_and_equal_texts_are_one(data_dir):
  found = as_sets(retrieval_set.read(data_dir, "test", captions="all"))
  # Records come in the order of the file, and either may stand for the two.
  both = found.pop("test-1" if "test-1" in found else "test-3")
  assert both == {"dog", "hound"}
  assert found == {
    "test-0": {"cat", "a cat sits"},
    "test-2": {"cat"},
    "test-4": {"cut off", "dog"},
  }


def test_first_takes_one_caption_a_record(data_dir):
  found = retrieval_set.read(data_dir, "test", captions="first")
  assert set(found.captions) == {"cat", "dog", "hound", "cut off"}
  assert found.relevant_UZ.sum() == 5


def test_a_limit_counts_images_and_keeps_all_their_captions(data_dir):
  whole = as_sets(retrieval_set.read(data_dir, "test", captions="all"))
  for limit in (1, 2, 3):
    part = retrieval_set.read(data_dir, "test", captions="all", limit=limit)
    assert part.num_images == limit
    assert as_sets(part).items() <= whole.items()


def test_a_record_without_caption_is_counted_and_named(data_dir):
  found = retrieval_set.read(data_dir, "test")
  assert found.bad == ("test-5: no caption",)


@pytest.mark.parametrize("batch_size", (1, 3, 64))
def test_each_image_is_decoded_once_in_batches_of_one_size(
  data_dir, batch_size, monkeypatch
):
  found = retrieval_set.read(data_dir, "test")
  decoded = []
  decode = transforms.decode
  monkeypatch.setattr(
    transforms, "decode", lambda data: decoded.append(data) or decode(data)
  )
  batches = load(found, batch_size)
  assert len(decoded) == len(set(decoded)) == found.num_images == 4
  assert {batch.visual.image_BYXC.shape for batch in batches} == {
    (batch_size, 16, 16, 3)
  }
  assert sum(batch.ok_B.sum() for batch in batches) == 3
  images = np.concatenate([batch.visual.image_BYXC for batch in batches])
  for i, record in enumerate(found.record_U):
    if found.image_names[i] != "test-4":
      expected = transforms.resize(decode(found.source[record].image), size=16)
      np.testing.assert_array_equal(images[i], expected)


def test_an_undecodable_image_is_masked_named_and_left_out(data_dir):
  found = retrieval_set.read(data_dir, "test")
  (batch,) = load(found, 4)
  row = found.image_names.index("test-4")
  assert not batch.ok_B[row] and batch.ok_B.sum() == 3
  assert not batch.visual.image_BYXC[row].any()
  (reason,) = batch.bad
  assert reason.startswith("test-4: ")
  kept = retrieval_set.keep_images(found, batch.ok_B, batch.bad)
  assert "test-4" not in kept.image_names
  assert set(kept.captions) == {"cat", "dog", "hound"}  # its own one is gone
  assert kept.relevant_UZ.shape == (3, 3) and kept.relevant_UZ.any(0).all()
  assert kept.bad == (*found.bad, reason)


def test_no_decodable_image_is_an_error(data_dir):
  found = retrieval_set.read(data_dir, "test")
  with pytest.raises(retrieval_set.RetrievalSetError, match="none of its 4"):
    retrieval_set.keep_images(found, np.zeros(4, bool), ("x: broken",) * 4)


def test_an_unknown_split_names_those_there(data_dir):
  with pytest.raises(pairs.DataError, match=r"no split 'val'.*\['test'\]"):
    retrieval_set.read(data_dir, "val")


def test_an_unknown_caption_choice_is_refused(data_dir):
  with pytest.raises(retrieval_set.RetrievalSetError, match="captions='some'"):
    retrieval_set.read(data_dir, "test", captions="some")


def test_regions_without_images_are_said(tmp_path):
  records = [tiny_regions.make_record(number) for number in range(2)]
  made = tiny_regions.write(tmp_path / "r", records)
  found = retrieval_set.read(made, "train")
  with pytest.raises(
    retrieval_set.RetrievalSetError, match="'train': regions without images"
  ):
    load(found, 2)
