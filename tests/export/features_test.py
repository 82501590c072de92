"""A trained image encoder as a source of features."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from glscl_jax import config as config_lib
from glscl_jax.data import sources
from glscl_jax.export import features
from glscl_jax.export import weights as weights_lib
from glscl_jax.systems import registry
from glscl_jax.types import Visual
from launch import prepare
from tests import tiny
from tests.data import tiny_emoji


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  data_dir = tiny.write_names(
    tmp_path_factory.mktemp("features") / "d", "train"
  )
  config = tiny.config(data_dir)
  return weights_lib.Weights(
    config=config,
    params=tiny.params(config),
    tokenizer_path=data_dir / "tokenizer.model",
    step=7,
    metrics={},
    lineage={"data_sha256": "d"},
  )


@pytest.fixture(scope="module")
def export(model, tmp_path_factory):
  path = tmp_path_factory.mktemp("export") / "e"
  weights_lib.save_export(path, model)
  return path


def test_features_are_class_states_whatever_the_batch(model, export):
  encoder = features.open_encoder(export, batch_size=4)
  size, config = encoder.size, model.config
  images = np.random.default_rng(0).integers(
    0, 256, (6, size, size, 3), np.uint8
  )
  states = registry.find(config).encode_visual(
    model.params, Visual(image_BYXC=images), config=config
  )
  found = encoder.encode(images)
  assert found.shape == (6, encoder.width)
  np.testing.assert_allclose(found, states[:, 0], rtol=1e-4, atol=1e-5)
  assert np.array_equal(encoder.encode(images[:1])[0], found[0])


def test_the_encoder_says_what_it_is(model, export):
  encoder = features.open_encoder(export)
  assert encoder.sha256 == weights_lib.params_sha256(model.params)
  assert encoder.about == {
    "system": model.config.system,
    "step": 7,
    "lineage": {"data_sha256": "d"},
  }


def test_a_system_without_images_has_no_encoder(model, tmp_path, monkeypatch):
  cmal = dataclasses.replace(model, config=config_lib.cmal_defaults())
  monkeypatch.setattr(weights_lib, "open_weights", lambda path: cmal)
  with pytest.raises(weights_lib.WeightsError, match="has no image encoder"):
    features.open_encoder(tmp_path)


def test_the_command_makes_scenes(export, tmp_path, capsys):
  tiny_npm = tiny_emoji.write(tmp_path / "npm")
  emoji_dir = tmp_path / "emoji"
  prepare.prepare.prepare_emoji(
    emoji_dir,
    cache=tiny_npm.cache,
    size=24,
    num_processes=1,
    vocabulary=prepare.prepare.Vocabulary(size=60),
    studios=tiny_npm.studios,
    texts=(tiny_npm.names, tiny_npm.keywords),
  )
  arguments = [
    "launch/prepare.py",
    "--source=scenes",
    f"--input={emoji_dir}",
    f"--encoder={export}",
    f"--output={tmp_path / 'scenes'}",
    "--num_train=3",
    "--num_held_out=2",
    "--scene_size=48",
    "--tokenizer_type=word",
    "--vocab_size=60",
  ]
  assert prepare.main(arguments) == 0
  assert "3 pairs in train" in capsys.readouterr().out
  source = sources.open_source(tmp_path / "scenes", "train")
  encoder = features.open_encoder(export)
  assert source.schema.width == encoder.width
  assert source[0].regions.feature_RP.std() > 0
