"""Small region sets, and data directories of them, made on the spot."""

from __future__ import annotations

import numpy as np

from glscl_jax.data import pairs, regions, tokenizer

CLASSES = ("dog", "red apple,apple", "person", "knife", "t-shirt,tee shirt")
WIDTH = 6


def make(classes, *, confidence=None, seed=0, width=WIDTH):
  """Regions of the given classes (numbers from 1), confident in order."""
  rng = np.random.default_rng(seed)
  count = len(classes)
  if confidence is None:
    confidence = np.linspace(0.9, 0.5, count)
  corner_R2 = rng.random((count, 2)) / 2
  return regions.Regions(
    feature_RP=rng.normal(size=(count, width)).astype(np.float16),
    box_R4=np.concatenate(
      [corner_R2, corner_R2 + rng.random((count, 2)) / 2], axis=1
    ).astype(np.float32),
    class_R=np.array(classes, np.int32),
    confidence_R=np.array(confidence, np.float32),
  )


def make_record(number, *, captions=("a dog", "two red apples"), split="train"):
  return pairs.Record(
    id=f"{split}-{number}",
    split=split,
    captions=captions,
    regions=make([1, 2, 2, 3][: 1 + number % 4], seed=number),
  )


def write(data_dir, records, *, images=False, classes=CLASSES):
  """A data directory; its tokenizer knows the captions of all splits."""
  splits = dict.fromkeys(record.split for record in records)

  def finish(directory, manifest):
    del manifest
    tokenizer.train_sentencepiece(
      [caption for record in records for caption in record.captions],
      directory / "tokenizer.model",
      vocab_size=60,
      model_type="word",
    )

  pairs.write(
    data_dir,
    splits={
      split: lambda split=split: (r for r in records if r.split == split)
      for split in splits
    },
    source={"kind": "test"},
    finish=finish,
    schema=regions.Schema(width=WIDTH, classes=classes, images=images),
  )
  return data_dir
