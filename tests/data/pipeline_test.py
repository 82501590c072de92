from __future__ import annotations

import collections
import dataclasses
import io
import itertools
import json
import logging

import jax
import numpy as np
import pytest
from PIL import Image

from glscl_jax import config as config_lib
from glscl_jax import types
from glscl_jax.data import masking, pairs, pipeline, sources
from glscl_jax.data import tokenizer as tokenizer_lib
from glscl_jax.systems import glscl

NUM_RECORDS = 20
CAPTIONS = 2  # of each record
NUM_PAIRS = NUM_RECORDS * CAPTIONS
COLORS = ("red", "green", "blue", "white", "black")


def color_of(i):
  """A colour that names record i."""
  return (10 * i + 20, 250 - 10 * i, 100)


def encode(color, size=24):
  file = io.BytesIO()
  Image.new("RGB", (size, size), color).save(file, "PNG")
  return file.getvalue()


def make_record(i, *, image=None, captions=None):
  name = f"{COLORS[i % 5]} square {i}"
  return pairs.Record(
    id=f"record-{i}",
    split="train",
    image=encode(color_of(i)) if image is None else image,
    captions=(
      (f"{name} first", f"{name} second") if captions is None else captions
    ),
  )


def write(data_dir, records, *, vocab_texts=None):
  """A data directory as launch/prepare.py leaves it."""

  def finish(directory, manifest):
    del manifest
    texts = vocab_texts or [c for r in records for c in r.captions]
    tokenizer_lib.train_sentencepiece(
      texts, directory / "tokenizer.model", vocab_size=90
    )

  pairs.write(
    data_dir,
    splits={"train": lambda: iter(records)},
    source={"kind": "test"},
    finish=finish,
  )
  return data_dir


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
  records = [make_record(i) for i in range(NUM_RECORDS)]
  return write(tmp_path_factory.mktemp("data") / "squares", records)


@pytest.fixture(scope="module")
def tokenizer(data_dir):
  return tokenizer_lib.load(sources.tokenizer_path(data_dir))


@pytest.fixture
def config(data_dir, tokenizer):
  return config_lib.Config(
    model=config_lib.ModelConfig(
      vision=config_lib.VisionConfig(image_size=16, patch_size=4),
      text=config_lib.TextConfig(
        vocab_size=tokenizer.vocab_size, max_length=30
      ),
    ),
    data=config_lib.DataConfig(dir=str(data_dir), batch_size=8),
    objectives=config_lib.ObjectiveConfig(neg_group=4),
  )


def change(config, section, **values):
  part = dataclasses.replace(getattr(config, section), **values)
  return dataclasses.replace(config, **{section: part})


def change_batch(config, size, **data):
  """A batch size that no group divides: the groups are the batch."""
  return dataclasses.replace(
    config,
    data=dataclasses.replace(config.data, batch_size=size, **data),
    objectives=dataclasses.replace(
      config.objectives,
      neg_group=size,
      mltc_image_group=size,
      mltc_text_group=size,
    ),
  )


def take(config, tokenizer, number, *, state=None, **options):
  """`number` batches after `state`, and the iterator, closed."""
  iterator = pipeline.make_train_iterator(config, tokenizer, **options)
  if state is not None:
    iterator.set_state(state)
  batches = [next(iterator) for _ in range(number)]
  iterator.close()
  return batches, iterator


def assert_equal(batches, others):
  assert len(batches) == len(others)
  for batch, other in zip(batches, others, strict=True):
    assert batch.keys() == other.keys()
    for name, rows in batch.items():
      assert rows.dtype == other[name].dtype, name
      assert np.array_equal(rows, other[name]), name


def keys_of(batch, tokenizer):
  """The record and caption that each row shows, read from its text."""
  texts = [
    "".join(tokenizer.pieces(ids[valid][1:-1])).replace("\u2581", " ").split()
    for ids, valid in zip(
      batch["text_ids_BT"], batch["text_valid_BT"], strict=True
    )
  ]
  return [(int(text[2]), text[3]) for text in texts]


# --- what a batch is -------------------------------------------------------


def test_batches_have_the_fields_shapes_and_types_of_the_contract(
  config, tokenizer
):
  (batch,), _ = take(config, tokenizer, 1)
  shapes = {k: (v.shape, v.dtype.name) for k, v in batch.items()}
  assert shapes == {
    "image_BYXC": ((8, 16, 16, 3), "uint8"),
    "identity_BM": ((8, 1), "int32"),
    "text_ids_BT": ((8, 30), "int32"),
    "text_valid_BT": ((8, 30), "bool"),
    "mlm_ids_BT": ((8, 30), "int32"),
    "mlm_pos_BJ": ((8, 4), "int32"),
    "mlm_labels_BJ": ((8, 4), "int32"),
    "mlm_ok_BJ": ((8, 4), "bool"),
    "scl_ids_BT": ((8, 30), "int32"),
    "scl_pos_BJ": ((8, 11), "int32"),
    "scl_ok_BJ": ((8, 11), "bool"),
    "keep_idx_BI": ((8, 3), "int32"),
    "tok_idx_BI": ((8, 4), "int32"),
  }


def test_every_caption_stands_beside_its_own_image(config, tokenizer):
  config = change(config, "data", augment=config_lib.AugmentConfig(hflip="off"))
  batches, _ = take(config, tokenizer, 5)
  for batch in batches:
    for i, (record, _) in enumerate(keys_of(batch, tokenizer)):
      # The images are of one colour, which no crop changes.
      assert batch["image_BYXC"][i, 7, 7].tolist() == list(color_of(record))
      assert batch["identity_BM"][i].tolist() == [record]


def test_masks_of_a_batch_have_exact_counts(config, tokenizer):
  (batch,), _ = take(config, tokenizer, 1)
  num_real = batch["text_valid_BT"].sum(axis=1) - 2
  for i, number in enumerate(num_real):
    assert batch["mlm_ok_BJ"][i].sum() == masking.num_masked(number, 0.15)
    assert batch["scl_ok_BJ"][i].sum() == masking.num_masked(number, 0.4)
    assert (batch["scl_ids_BT"][i] == tokenizer.mask_id).sum() == (
      batch["scl_ok_BJ"][i].sum()
    )
  for kind in ("mlm", "scl"):
    ok = batch[f"{kind}_ok_BJ"]
    masked = np.take_along_axis(
      batch["text_ids_BT"], batch[f"{kind}_pos_BJ"], axis=1
    )
    if kind == "mlm":
      assert np.array_equal(masked[ok], batch["mlm_labels_BJ"][ok])
    assert not np.isin(masked[ok], list(tokenizer.special_ids)).any()
  # The two text masks are independent of each other.
  assert not np.array_equal(
    batch["mlm_pos_BJ"][:, 0], batch["scl_pos_BJ"][:, 0]
  )


GLSCL = config_lib.SYSTEM_OBJECTIVES["glscl"]
NO_OBJECTIVE = dict.fromkeys(config_lib.OBJECTIVES, 0.0)


@pytest.mark.parametrize(
  ("objective", "prefixes"),
  [
    ("mlm", {"mlm"}),
    ("itm", set()),
    ("itc", set()),
    ("mgsc_image", {"scl", "keep"}),
    ("mgsc_text", {"scl", "keep"}),
    ("mltc_text", {"scl", "keep"}),
    ("mltc_image", {"scl", "tok"}),
  ],
)
def test_only_masks_that_an_objective_reads_are_made(
  config, tokenizer, objective, prefixes
):
  config = change(config, "objectives", **(NO_OBJECTIVE | {objective: 1.0}))
  (batch,), _ = take(config, tokenizer, 1)
  assert {name.split("_")[0] for name in batch} == prefixes | {
    "identity",
    "image",
    "text",
  }


@pytest.mark.parametrize("targets", ["partner_masked", "clean"])
@pytest.mark.parametrize("objective", [*GLSCL, "all"])
def test_the_masks_made_are_those_of_the_versions_that_the_system_encodes(
  config, objective, targets
):
  weights = {name: float(objective in (name, "all")) for name in GLSCL}
  config = change(config, "objectives", completion_targets=targets, **weights)
  plan = glscl.make_plan(config.objectives)
  masks = {"drop": "keep", "token": "token", "mlm": "mlm", "scl": "scl"}
  versions = {*plan.image_versions, *plan.text_versions}
  assert pipeline.mask_kinds(config) == {
    masks[name] for name in versions & masks.keys()
  }


def with_maskvlm(config, *names, **data):
  """The same data for MaskVLM: 16 px, patches of 4, blocks of 8 px."""
  model = dataclasses.replace(config.model, match_features="product")
  return dataclasses.replace(
    config,
    system="maskvlm",
    model=model,
    masking=config_lib.MaskingConfig(image_block_size=8),
    objectives=config_lib.ObjectiveConfig(
      neg_group=4, **(NO_OBJECTIVE | dict.fromkeys(names, 1.0))
    ),
    data=dataclasses.replace(config.data, **data),
  )


@pytest.mark.parametrize(
  ("objective", "prefixes"),
  [("mlm", {"mlm"}), ("mim", {"block"}), ("itc", set()), ("itm", set())],
)
def test_only_masks_that_an_objective_of_maskvlm_reads_are_made(
  config, tokenizer, objective, prefixes
):
  (batch,), _ = take(with_maskvlm(config, objective), tokenizer, 1)
  assert {name.split("_")[0] for name in batch} == prefixes | {
    "identity",
    "image",
    "text",
  }


def test_hidden_blocks_are_keyed_by_the_pair(config, tokenizer):
  config = with_maskvlm(config, "mim", "mlm")
  (batch,), _ = take(config, tokenizer, 1)
  # Three of four blocks of 2 x 2 patches.
  assert batch["block_idx_BI"].shape == (8, 12)
  assert batch["block_idx_BI"].dtype == np.int32
  assert len({row.tobytes() for row in batch["block_idx_BI"]}) > 1
  alone, _ = take(with_maskvlm(config, "mim"), tokenizer, 1)
  blocks, _ = take(config, tokenizer, 2, process_index=1, process_count=2)
  np.testing.assert_array_equal(alone[0]["block_idx_BI"], batch["block_idx_BI"])
  np.testing.assert_array_equal(
    blocks[0]["block_idx_BI"], batch["block_idx_BI"][4:]
  )


def test_switching_an_objective_off_leaves_all_other_arrays(config, tokenizer):
  both, _ = take(config, tokenizer, 1)
  less, _ = take(change(config, "objectives", mlm=0.0), tokenizer, 1)
  for name, rows in less[0].items():
    assert np.array_equal(rows, both[0][name]), name


# --- order -----------------------------------------------------------------


def test_an_epoch_is_every_pair_once_in_a_new_order(config, tokenizer):
  batches, _ = take(config, tokenizer, 2 * NUM_PAIRS // 8)
  keys = [key for batch in batches for key in keys_of(batch, tokenizer)]
  epochs = keys[:NUM_PAIRS], keys[NUM_PAIRS:]
  whole = {(i, c) for i in range(NUM_RECORDS) for c in ("first", "second")}
  assert set(epochs[0]) == set(epochs[1]) == whole
  assert epochs[0] != epochs[1] and epochs[0] != sorted(epochs[0])


def test_a_pair_is_masked_and_cropped_anew_in_every_epoch(config, tokenizer):
  batches, _ = take(config, tokenizer, 6 * NUM_PAIRS // 8)
  seen = collections.defaultdict(set)
  for batch in batches:
    for i, key in enumerate(keys_of(batch, tokenizer)):
      seen[key].add(batch["scl_pos_BJ"][i].tobytes())
  assert len(seen) == NUM_PAIRS
  # Six draws; how many differ depends on the length of the text.
  assert np.mean([len(draws) for draws in seen.values()]) > 3


def test_two_runs_give_the_same_bytes_and_other_seeds_do_not(config, tokenizer):
  one, _ = take(config, tokenizer, 7)
  again, _ = take(config, tokenizer, 7)
  assert_equal(one, again)
  (other,), _ = take(change(config, "data", seed=1), tokenizer, 1)
  assert not np.array_equal(other["identity_BM"], one[0]["identity_BM"])


@pytest.mark.parametrize(
  "values", [{"num_threads": 4, "prefetch": 8}, {"prefetch": 1}]
)
def test_threads_and_prefetch_change_no_byte(config, tokenizer, values):
  one, _ = take(config, tokenizer, 7)
  other, _ = take(change(config, "data", **values), tokenizer, 7)
  assert_equal(one, other)


def test_worker_processes_change_no_byte_and_report_the_same(
  config, tokenizer, tmp_path
):
  records = [make_record(i) for i in range(10)]
  records[3] = make_record(3, image=b"not an image")
  texts = [c for i in range(NUM_RECORDS) for c in make_record(i).captions]
  bad_dir = write(tmp_path / "bad", records, vocab_texts=texts)
  config = change(config, "data", dir=str(bad_dir))
  threads, one = take(config, tokenizer, 6)
  workers, other = take(change(config, "data", num_workers=1), tokenizer, 6)
  assert_equal(threads, workers)
  assert one.report() == other.report()
  assert other.report()["bad_rows"] > 0


@pytest.mark.parametrize("process_count", [2, 4])
def test_blocks_of_all_processes_make_the_same_global_batch(
  config, tokenizer, process_count
):
  whole, _ = take(config, tokenizer, 6)
  blocks = [
    take(
      config,
      tokenizer,
      6,
      process_index=index,
      process_count=process_count,
    )[0]
    for index in range(process_count)
  ]
  joined = [
    {
      name: np.concatenate([block[step][name] for block in blocks])
      for name in whole[0]
    }
    for step in range(6)
  ]
  assert_equal(whole, joined)


# --- resume ----------------------------------------------------------------


@pytest.mark.parametrize("steps", [0, 1, 3, 5, 8])
def test_a_restored_iterator_gives_the_exact_next_batch(
  config, tokenizer, steps
):
  batches, _ = take(config, tokenizer, 10)
  _, stopped = take(config, tokenizer, steps)
  state = json.loads(json.dumps(stopped.get_state()))
  resumed, _ = take(config, tokenizer, 10 - steps, state=state)
  assert_equal(resumed, batches[steps:])


def test_the_state_is_tiny_and_the_same_in_every_process(config, tokenizer):
  states = [
    take(config, tokenizer, 3, process_index=i, process_count=2)[1].get_state()
    for i in range(2)
  ]
  assert states[0] == states[1]
  assert len(json.dumps(states[0])) < 50
  (after,), _ = take(config, tokenizer, 1, state=states[0])
  whole, _ = take(config, tokenizer, 4)
  assert_equal([after], whole[3:])


def test_an_iterator_can_be_set_back_while_it_runs(config, tokenizer):
  iterator = pipeline.make_train_iterator(config, tokenizer)
  batches = [next(iterator) for _ in range(4)]
  iterator.set_state({"step": 1})
  again = [next(iterator) for _ in range(3)]
  iterator.close()
  assert_equal(again, batches[1:])


# --- data-set negatives ----------------------------------------------------


@pytest.fixture
def by_length(config, tokenizer):
  """Batches of two lengths: half of the captions fit the shorter one."""
  source = sources.open_source(config.data.dir, "train")
  middle = int(np.median(source.count_tokens(tokenizer)))
  return change_batch(config, 2, text_lengths=(middle,))


def test_batches_by_length_cut_nothing(by_length, config, tokenizer):
  batches, iterator = take(by_length, tokenizer, 12)
  found = {batch["text_ids_BT"].shape[1] for batch in batches}
  assert found == {*by_length.data.text_lengths, 30}
  assert iterator.report()["truncated"] == 0
  whole = take(change_batch(config, 2), tokenizer, 40)[0]
  known = {tuple(ids[ids != tokenizer.pad_id]) for ids in rows_of(whole)}
  for ids in rows_of(batches):
    assert tuple(ids[ids != tokenizer.pad_id]) in known


def rows_of(batches):
  return [ids for batch in batches for ids in batch["text_ids_BT"]]


def test_batches_by_length_are_the_same_in_blocks_workers_and_resumed(
  by_length, tokenizer
):
  expected, _ = take(by_length, tokenizer, 6)
  blocks = [
    take(by_length, tokenizer, 6, process_index=i, process_count=2)[0]
    for i in range(2)
  ]
  joined = [
    {name: np.concatenate([a[name], b[name]]) for name in a}
    for a, b in zip(*blocks, strict=True)
  ]
  assert_equal(joined, expected)
  assert_equal(
    take(by_length, tokenizer, 3, state={"step": 3})[0], expected[3:]
  )
  workers = change(by_length, "data", num_workers=2)
  assert_equal(take(workers, tokenizer, 6)[0], expected)


@pytest.fixture
def dataset_config(config):
  return change(config, "objectives", itm_negatives="dataset")


def test_half_of_every_group_is_labelled_as_matching(dataset_config, tokenizer):
  batches, _ = take(dataset_config, tokenizer, 12)
  labels = np.stack([batch["itm_labels_B"] for batch in batches])
  assert labels.dtype == np.int32
  groups = labels.reshape(-1, 4)
  assert np.array_equal(groups.sum(axis=1), np.full(len(groups), 2))
  assert len({tuple(group) for group in groups.tolist()}) > 3


def test_an_odd_group_rounds_its_matching_half_down(dataset_config, tokenizer):
  config = change_batch(dataset_config, 5)
  (batch,), _ = take(config, tokenizer, 1)
  assert batch["itm_labels_B"].sum() == 2


def test_false_images_are_images_of_the_set(dataset_config, tokenizer):
  batches, _ = take(dataset_config, tokenizer, 8)
  colors = {
    tuple(image[7, 7].tolist())
    for batch in batches
    for image in batch["false_image_BYXC"]
  }
  assert len(colors) > 10
  assert colors <= {color_of(i) for i in range(NUM_RECORDS)}
  different = [
    np.any(batch["false_image_BYXC"][:, 7, 7] != batch["image_BYXC"][:, 7, 7])
    for batch in batches
  ]
  assert all(different)


def test_data_set_negatives_are_the_same_over_processes(
  dataset_config, tokenizer
):
  (whole,), _ = take(dataset_config, tokenizer, 1)
  halves = [
    take(dataset_config, tokenizer, 1, process_index=i, process_count=2)[0][0]
    for i in range(2)
  ]
  for name in ("itm_labels_B", "false_image_BYXC"):
    joined = np.concatenate([half[name] for half in halves])
    assert np.array_equal(joined, whole[name])


# --- records that cannot be used -------------------------------------------


class ListSource:
  """Records in memory, for damage that an ingest would refuse."""

  name = "list/train"
  schema = None  # images alone

  def __init__(self, records):
    images = [record.image for record in records]
    self._examples = [
      sources.Example(
        id=record.id,
        image=record.image,
        captions=record.captions,
        image_id=images.index(record.image),
      )
      for record in records
    ]

  def __len__(self):
    return len(self._examples)

  def __getitem__(self, index):
    return self._examples[index]

  def count_captions(self):
    return np.array([len(example.captions) for example in self._examples])


def without_masks(config):
  return change(config, "objectives", **(NO_OBJECTIVE | {"itc": 1.0}))


@pytest.mark.parametrize(
  ("identity", "same"),
  [("image", {(2, 7)}), ("caption", {(2, 7), (4, 9)})],
)
def test_records_of_one_image_or_one_first_caption_show_the_same(
  config, tokenizer, identity, same
):
  records = [make_record(i) for i in range(NUM_RECORDS)]
  records[7] = make_record(7, image=records[2].image)
  records[9] = make_record(9, captions=records[4].captions[:1])
  config = change(
    config,
    "data",
    identity=identity,
    augment=config_lib.AugmentConfig(hflip="off"),
  )
  batches, _ = take(config, tokenizer, 10, source=ListSource(records))
  ids_of = {}
  for batch in batches:
    for i, (name, _) in enumerate(keys_of(batch, tokenizer)):
      color = tuple(batch["image_BYXC"][i, 7, 7].tolist())
      record = 9 if color == color_of(9) else name
      # A record's second caption has the ids of its first one.
      ids = batch["identity_BM"][i].tolist()
      assert ids_of.setdefault(record, ids) == ids
  assert len(ids_of) == NUM_RECORDS
  found = {
    (a, b)
    for a, b in itertools.combinations(sorted(ids_of), 2)
    if any(x == y for x, y in zip(ids_of[a], ids_of[b], strict=True))
  }
  assert found == same


def test_a_blank_first_caption_names_nothing():
  def ids(number, *captions):
    example = sources.Example(
      id="", image=b"", captions=captions, image_id=number
    )
    return pipeline.identity(example, "caption").tolist()

  assert ids(1, "  ", "red square")[1] == ids(2, "red square")[1]
  assert ids(1, "", "red square")[1] != ids(2, "", "blue square")[1]


def make_damaged():
  records = [make_record(i) for i in range(NUM_RECORDS)]
  records[3] = make_record(3, image=encode((1, 2, 3))[:40])
  records[5] = make_record(5, captions=("  ", "red square 5 second"))
  records[7] = make_record(7, captions=())
  return ListSource(records)


def test_bad_records_are_replaced_counted_and_named(config, tokenizer, caplog):
  config = change(config, "data", max_bad_share=0.5)
  source = make_damaged()
  with caplog.at_level(logging.WARNING):
    batches, iterator = take(config, tokenizer, 20, source=source)
  keys = [key for batch in batches for key in keys_of(batch, tokenizer)]
  assert len(keys) == 160
  assert not {3, 7} & {record for record, _ in keys}
  assert (5, "second") in keys and (5, "first") not in keys
  report = iterator.report()
  assert sorted(report["bad_records"]) == [
    "record-3: unreadable image",
    "record-3: unreadable image",
    "record-5: empty caption",
    "record-7: empty caption",
  ]
  # 39 pairs, 4 of them bad; 160 rows are a little over four epochs, and a
  # replacement may meet another bad record.
  assert report["rows"] == 160 and 16 <= report["bad_rows"] <= 20
  warnings = [r.getMessage() for r in caplog.records]
  assert len(warnings) == 4
  assert any("record-7 of list/train: empty caption" in w for w in warnings)


def test_replacements_are_the_same_in_every_run(config, tokenizer):
  config = change(config, "data", max_bad_share=0.5)
  one, _ = take(config, tokenizer, 6, source=make_damaged())
  resumed, _ = take(
    config, tokenizer, 3, source=make_damaged(), state={"step": 3}
  )
  assert_equal(one[3:], resumed)


def test_too_many_bad_rows_fail_the_run_with_their_names(config, tokenizer):
  config = change_batch(without_masks(config), 200, max_bad_share=0.001)
  iterator = pipeline.make_train_iterator(
    config, tokenizer, source=make_damaged()
  )
  for _ in range(4):  # too few rows to judge
    next(iterator)
  with pytest.raises(pipeline.BadDataError, match="record-3: unreadable") as e:
    next(iterator)
  iterator.close()
  assert "of 1000 rows" in str(e.value) and "list/train" in str(e.value)
  assert "max_bad_share is 0.001" in str(e.value)


def test_a_share_within_the_limit_does_not_fail(config, tokenizer):
  config = change_batch(without_masks(config), 200, max_bad_share=0.12)
  _, iterator = take(config, tokenizer, 6, source=make_damaged())
  assert iterator.report()["bad_rows"] > 100


def test_with_a_limit_of_zero_the_first_bad_row_fails(config, tokenizer):
  config = change(config, "data", max_bad_share=0.0)
  with pytest.raises(pipeline.BadDataError, match="max_bad_share is 0.0"):
    take(config, tokenizer, 6, source=make_damaged())


def test_a_set_of_nothing_but_bad_records_fails_at_once(config, tokenizer):
  source = ListSource([make_record(i, image=b"") for i in range(5)])
  with pytest.raises(pipeline.BadDataError, match="record-.: unreadable"):
    take(config, tokenizer, 1, source=source)


def test_captions_past_the_limit_are_cut_and_counted(config, tokenizer):
  records = [make_record(i) for i in range(NUM_RECORDS)]
  records[0] = make_record(0, captions=("red square " * 20,))
  source = ListSource(records)
  config = change_batch(config, NUM_PAIRS - 1)
  (batch,), iterator = take(config, tokenizer, 1, source=source)
  assert iterator.report()["truncated"] == 1
  full = batch["text_valid_BT"].all(axis=1)
  assert batch["text_ids_BT"][full][0, -1] == tokenizer.end_id


def test_one_record_is_enough_to_train_on(config, tokenizer):
  batches, _ = take(config, tokenizer, 2, source=ListSource([make_record(0)]))
  assert {k for b in batches for k in keys_of(b, tokenizer)} == {
    (0, "first"),
    (0, "second"),
  }


# --- errors at the start ---------------------------------------------------


@pytest.mark.parametrize(
  ("mesh_shape", "process_count", "message"),
  [
    ({"data": 3, "fsdp": 1, "tensor": 1}, 1, "by the 3 shards"),
    ({"data": 4, "fsdp": 4, "tensor": 1}, 1, "by the 16 shards"),
    ({"data": 1, "fsdp": 1, "tensor": 1}, 3, "by the 3 processes"),
  ],
)
def test_a_batch_that_does_not_divide_is_refused(
  config, mesh_shape, process_count, message
):
  with pytest.raises(config_lib.ConfigError, match=message) as e:
    pipeline.check_batch(config, mesh_shape, process_count)
  assert "config.data.batch_size 8" in str(e.value)


def test_the_tensor_axis_does_not_split_the_batch(config):
  pipeline.check_batch(config, {"data": 4, "fsdp": 2, "tensor": 3}, 8)


def test_a_data_directory_must_be_named_and_exist(config, tokenizer, tmp_path):
  with pytest.raises(config_lib.ConfigError, match="config.data.dir is empty"):
    take(change(config, "data", dir=""), tokenizer, 1)
  missing = change(config, "data", dir=str(tmp_path / "missing"))
  with pytest.raises(pairs.DataError, match="missing: no such data directory"):
    take(missing, tokenizer, 1)
  split = change(config, "data", train_split="training")
  with pytest.raises(pairs.DataError, match="no split 'training'"):
    take(split, tokenizer, 1)


def test_a_tokenizer_of_another_vocabulary_is_refused(config, tokenizer):
  text = dataclasses.replace(config.model.text, vocab_size=50)
  config = change(config, "model", text=text)
  with pytest.raises(config_lib.ConfigError, match="vocab_size"):
    take(config, tokenizer, 1)


# --- onto the devices ------------------------------------------------------


def test_rows_become_global_arrays_split_over_data_and_fsdp(config, tokenizer):
  (local,), _ = take(config, tokenizer, 1)
  mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"))
  batch = pipeline.global_batch(local, mesh)
  assert isinstance(batch, types.Batch)
  assert batch.image_BYXC.sharding.shard_shape((8, 16, 16, 3)) == (2, 16, 16, 3)
  for name, rows in local.items():
    assert np.array_equal(getattr(batch, name), rows), name
  assert batch.itm_labels_B is None


def test_one_process_holds_the_whole_batch():
  mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"))
  assert pipeline.process_block(mesh, batch_size=16) == (0, 1)


@pytest.mark.parametrize(
  ("spans", "block"),
  [
    ([(0, 4), (4, 8)], (0, 2)),
    ([(12, 16), (8, 12)], (1, 2)),
    ([(8, 12), (8, 12)], (2, 4)),  # the same rows on two devices
  ],
)
def test_a_process_holds_one_block_of_the_batch(spans, block):
  assert pipeline._block(spans, 16) == block


@pytest.mark.parametrize("spans", [[(0, 4), (8, 12)], [(4, 8), (8, 12)]])
def test_rows_that_are_not_one_block_are_refused(spans):
  with pytest.raises(config_lib.ConfigError, match="not one block"):
    pipeline._block(spans, 16)
