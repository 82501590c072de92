"""The published step in PyTorch; runs where PyTorch is installed."""

import dataclasses
import io

import jax
import numpy as np
import pytest
from PIL import Image

from glscl_jax.data import pairs
from tests import random_pairs

torch = pytest.importorskip("torch")

from glscl_jax.train import torch_baseline  # noqa: E402

CONFIG = random_pairs.config(depth=2, batch_size=4)


def test_the_model_has_as_many_parameters_as_ours():
  # Ours leaves out the stream of the last layer that nobody reads, and types
  # of tokens stand apart there.
  ours = random_pairs.abstract_params(CONFIG)
  count = sum(x.size for x in jax.tree.leaves(ours))
  model = torch_baseline.Model(CONFIG.model)
  found = sum(p.numel() for p in model.parameters())
  assert found == pytest.approx(count, rel=0.01)


def test_every_objective_encodes_what_it_reads_by_itself(monkeypatch):
  calls = {"encode_image": 0, "encode_text": 0, "fuse": 0}
  for name in calls:
    original = getattr(torch_baseline.Model, name)

    def count(self, *arguments, name=name, original=original, **options):
      calls[name] += 1
      return original(self, *arguments, **options)

    monkeypatch.setattr(torch_baseline.Model, name, count)
  timing = torch_baseline.time_steps(
    CONFIG,
    {
      name: np.array(array)
      for name, array in vars(random_pairs.batch(CONFIG)).items()
      if array is not None
    },
    precision="float32",
    num_steps=2,
    num_warm=0,
  )
  assert {n: c // 2 for n, c in calls.items()} == {
    "encode_image": 6,
    "encode_text": 6,
    "fuse": 5,
  }
  assert len(timing.seconds) == 2 and np.isfinite(timing.loss)


def test_images_come_as_normalised_numbers_of_the_recipe_size(tmp_path):
  def encode(image):
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()

  rng = np.random.default_rng(0)
  images = [
    Image.fromarray(rng.integers(0, 255, (40, 60, 3), np.uint8))
    for _ in range(3)
  ]
  pairs.write(
    tmp_path / "data",
    splits={
      "train": lambda: (
        pairs.Record(
          id=str(i), split="train", image=encode(image), captions=("a",)
        )
        for i, image in enumerate(images)
      )
    },
    source={"kind": "test"},
    finish=lambda directory, manifest: None,
  )
  # The largest crop of this ratio is the image.
  augment = dataclasses.replace(
    CONFIG.data.augment, crop_scale=(1.0, 1.0), crop_ratio=(1.5, 1.5)
  )
  data = dataclasses.replace(
    CONFIG.data, dir=str(tmp_path / "data"), augment=augment
  )
  config = dataclasses.replace(CONFIG, data=data)
  pictures = torch_baseline.Pictures(config)
  assert len(pictures) == 3
  size = config.model.vision.image_size
  mirrored = 0
  for picture, image in zip(pictures, images, strict=True):
    small = image.resize((size, size), Image.Resampling.BICUBIC)
    unit_YXC = (np.asarray(small) / 255 - config.data.mean) / config.data.std
    expected = unit_YXC.transpose(2, 0, 1)
    flip = not np.allclose(picture, expected, atol=1e-5)
    mirrored += flip
    np.testing.assert_allclose(
      picture, expected[:, :, ::-1] if flip else expected, atol=1e-5
    )
  assert 0 < mirrored < 3
  rate = torch_baseline.time_images(config, num_images=20, num_workers=1)
  assert 1 < rate < 1e6
