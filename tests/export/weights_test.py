"""Exported weights come back bit for bit, or not at all."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from glscl_jax.data import tokenizer
from glscl_jax.export import weights as weights_lib
from glscl_jax.models import pretrained
from glscl_jax.systems import glscl
from glscl_jax.train import checkpoint
from tests import tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  data_dir = tiny.write_names(tmp_path_factory.mktemp("weights") / "d", "train")
  config = tiny.config(data_dir)
  return weights_lib.Weights(
    config=config,
    params=tiny.params(config),
    tokenizer_path=data_dir / "tokenizer.model",
    step=7,
    metrics={"validation": {"eval/mean_r1": 0.25}},
    lineage={"tokenizer_sha256": "t", "data_sha256": "d", "init_from": None},
  )


@pytest.fixture
def export(model, tmp_path):
  weights_lib.save_export(tmp_path / "export", model)
  return tmp_path / "export"


def same(a, b):
  return jax.tree.structure(a) == jax.tree.structure(b) and all(
    x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
  )


def test_a_round_trip_is_bit_equal(model, export):
  found = weights_lib.load_export(export)
  assert same(found.params, model.params)
  assert found.config == model.config
  assert found.step == 7
  assert found.metrics == model.metrics
  assert found.lineage == model.lineage
  assert found.tokenizer_path.read_bytes() == model.tokenizer_path.read_bytes()


def test_published_arrays_become_an_export_that_init_from_reads(
  model, tmp_path
):
  """As docs/systems.md says, under Published weights."""
  np.savez(tmp_path / "scl.npz", **pretrained.to_scl(model.params))
  like = jax.eval_shape(lambda: glscl.init(model.config, jax.random.key(0)))
  with np.load(tmp_path / "scl.npz") as arrays:
    params = pretrained.from_scl(arrays, like)
  lineage = {
    "tokenizer_sha256": tokenizer.load(model.tokenizer_path).sha256,
    "init_from": None,
  }
  weights_lib.save_export(
    tmp_path / "scl",
    dataclasses.replace(
      model, params=params, step=0, metrics={}, lineage=lineage
    ),
  )
  found, found_lineage = weights_lib.read_params(str(tmp_path / "scl"))
  assert same(found, model.params)
  assert found_lineage == lineage


def test_names_are_paths_joined_by_dots_and_scalars_stay_scalars(export):
  flat = safetensors.numpy.load_file(export / weights_lib.MODEL)
  assert flat["temperature.value"].shape == ()
  assert any(name.startswith("vision.") for name in flat)


def test_the_manifest_names_the_hash_of_every_other_file(export):
  manifest = json.loads((export / "manifest.json").read_text())
  there = {path.name for path in export.iterdir()} - {"manifest.json"}
  assert manifest["files"].keys() == there
  assert all(len(e["sha256"]) == 64 for e in manifest["files"].values())
  assert manifest["step"] == 7


def test_an_export_is_the_same_bytes_every_time(model, export, tmp_path):
  weights_lib.save_export(tmp_path / "again", model)
  for path in export.iterdir():
    assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


@pytest.mark.parametrize(
  "name", ["model.safetensors", "config.json", "tokenizer.model"]
)
def test_one_flipped_bit_is_found(export, name):
  data = bytearray((export / name).read_bytes())
  data[len(data) // 2] ^= 1
  (export / name).write_bytes(bytes(data))
  with pytest.raises(weights_lib.WeightsError, match=f"{name} is damaged"):
    weights_lib.load_export(export)


def test_a_cut_file_is_named_with_both_sizes(export):
  path = export / "model.safetensors"
  path.write_bytes(path.read_bytes()[:-10])
  with pytest.raises(weights_lib.WeightsError, match="bytes, the manifest"):
    weights_lib.load_export(export)


def test_a_missing_file_is_named(export):
  (export / "config.json").unlink()
  with pytest.raises(weights_lib.WeightsError, match="config.json is missing"):
    weights_lib.load_export(export)


def test_an_unreadable_manifest_is_named(export):
  (export / "manifest.json").write_text("{")
  with pytest.raises(weights_lib.WeightsError, match="not the manifest"):
    weights_lib.load_export(export)


def test_names_and_shapes_are_compared_with_the_configuration(model):
  flat = dict(weights_lib.name_arrays(model.params))
  flat["extra"] = flat.pop("temperature.value")
  name = next(name for name in flat if flat[name].ndim == 2)
  flat[name] = flat[name][1:]
  with pytest.raises(weights_lib.WeightsError) as error:
    weights_lib.check_parameters(flat, model.config, where="here")
  text = str(error.value)
  assert "temperature.value: missing" in text
  assert "extra: unexpected" in text
  assert f"{name}: shape" in text


def test_parameters_that_are_not_finite_are_not_exported(model, tmp_path):
  params = jax.tree.map(np.copy, model.params)
  params["vision"]["class_embedding"][0] = np.nan
  broken = dataclasses.replace(model, params=params)
  with pytest.raises(weights_lib.WeightsError, match="vision.class_embedding"):
    weights_lib.save_export(tmp_path / "export", broken)
  assert not list(tmp_path.iterdir())


def test_an_export_replaces_an_export_and_nothing_else(model, export, tmp_path):
  later = dataclasses.replace(model, step=8)
  weights_lib.save_export(export, later)
  assert weights_lib.load_export(export).step == 8
  other = tmp_path / "thesis"
  other.mkdir()
  (other / "chapter.txt").write_text("mine")
  with pytest.raises(weights_lib.WeightsError, match="is no export"):
    weights_lib.save_export(other, model)
  assert (other / "chapter.txt").read_text() == "mine"


def test_results_beside_an_export_survive_the_next_export(model, tmp_path):
  export = tmp_path / "export"
  weights_lib.save_export(export, model)
  (export / "eval" / "retrieval").mkdir(parents=True)
  (export / "eval" / "retrieval" / "metrics.json").write_text("measured")
  (export / "report.html").write_text("page")
  weights_lib.save_export(export, dataclasses.replace(model, step=8))
  assert weights_lib.load_export(export).step == 8
  assert (export / "eval/retrieval/metrics.json").read_text() == "measured"
  assert (export / "report.html").read_text() == "page"
  # Whoever may read one of its files may read all.
  modes = {path.stat().st_mode for path in export.iterdir() if path.is_file()}
  assert len(modes) == 1


def test_weights_name_their_data_unless_another_is_chosen(model):
  assert model.data_dir("") == model.config.data.dir
  assert model.data_dir("other") == "other"
  # Named relative to a folder that this process is not in.
  away = dataclasses.replace(
    model,
    config=dataclasses.replace(
      model.config, data=dataclasses.replace(model.config.data, dir="not/here")
    ),
  )
  assert away.data_dir("") == "not/here"
  told = dataclasses.replace(away, lineage={"data_dir": "/there"})
  assert told.data_dir("") == "/there"
  data = dataclasses.replace(model.config.data, dir="")
  unnamed = dataclasses.replace(
    model, config=dataclasses.replace(model.config, data=data)
  )
  assert unnamed.data_dir("other") == "other"
  with pytest.raises(weights_lib.WeightsError, match="--data=DIR"):
    unnamed.data_dir("")


def make_workdir(model, root, *, steps=(7,), scores=None):
  """A work dir as the training leaves it, with parameters alone."""
  config = dataclasses.replace(
    model.config,
    train=dataclasses.replace(model.config.train, keep_last=5),
  )
  digest = tokenizer.load(model.tokenizer_path).sha256
  writer = checkpoint.Checkpointer(
    root,
    config=config,
    tokenizer_sha256=digest,
    lineage={"data_sha256": "d", "init_from": None},
  )
  for step in steps:
    params = jax.tree.map(lambda x, step=step: x + step, model.params)
    writer.save(
      step,
      {"params": params},
      data_state={},
      metrics=scores and {checkpoint.BEST_METRIC: scores[step]},
    )
  writer.close()
  name = f"tokenizer{model.tokenizer_path.suffix}"
  (root / name).write_bytes(model.tokenizer_path.read_bytes())
  return root


def test_a_work_dir_opens_at_its_best_step_or_else_the_latest(model, tmp_path):
  plain = make_workdir(model, tmp_path / "plain", steps=(1, 2))
  assert weights_lib.open_weights(plain).step == 2
  assert weights_lib.open_weights(plain, step="1").step == 1
  with pytest.raises(checkpoint.CheckpointError, match="validated"):
    weights_lib.open_weights(plain, step="best")
  scored = make_workdir(
    model, tmp_path / "scored", steps=(1, 2), scores={1: 0.9, 2: 0.1}
  )
  found = weights_lib.open_weights(scored)
  assert found.step == 1
  assert found.metrics == {checkpoint.BEST_METRIC: 0.9}
  expected = jax.tree.map(lambda x: x + 1, model.params)
  assert same(jax.tree.map(np.asarray, found.params), expected)


def test_a_work_dir_and_its_export_hold_the_same_weights(model, tmp_path):
  workdir = make_workdir(model, tmp_path / "run")
  opened = weights_lib.open_weights(workdir)
  weights_lib.save_export(tmp_path / "export", opened)
  found = weights_lib.open_weights(tmp_path / "export")
  assert weights_lib.params_sha256(found.params) == weights_lib.params_sha256(
    opened.params
  )
  assert found.lineage == opened.lineage
  params, lineage = weights_lib.read_params(str(tmp_path / "export"))
  assert same(params, found.params) and lineage == found.lineage
  params, lineage = weights_lib.read_params(str(workdir))
  assert lineage == opened.lineage


def test_another_tokenizer_in_the_work_dir_is_refused(model, tmp_path):
  workdir = make_workdir(model, tmp_path / "run")
  tokenizer.train_sentencepiece(
    ["another text altogether", "with other words"] * 4,
    workdir / "tokenizer.model",
    40,
  )
  with pytest.raises(weights_lib.WeightsError, match="was trained with"):
    weights_lib.open_weights(workdir)


def test_an_export_has_one_step(export):
  assert weights_lib.open_weights(export, step="7").step == 7
  with pytest.raises(weights_lib.WeightsError, match="it has no step 'best'"):
    weights_lib.open_weights(export, step="best")


def test_a_directory_that_is_neither_says_so(tmp_path):
  with pytest.raises(weights_lib.WeightsError, match="neither a work dir"):
    weights_lib.open_weights(tmp_path)


def test_the_fingerprint_sees_values_shapes_and_names(model):
  flat = weights_lib.name_arrays(model.params)
  first = weights_lib.params_sha256(model.params)
  assert weights_lib.params_sha256(weights_lib.unflatten(flat)) == first
  name = next(name for name in flat if flat[name].ndim == 2)
  for changed in (
    flat | {name: np.nextafter(flat[name], np.float32(9))},
    flat | {name: flat[name].reshape(1, *flat[name].shape)},
    {("renamed" if key == name else key): flat[key] for key in flat},
  ):
    tree = weights_lib.unflatten(changed)
    assert weights_lib.params_sha256(tree) != first
