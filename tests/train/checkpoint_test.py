"""What is kept, what is refused, and what comes back."""

from __future__ import annotations

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glscl_jax import config as config_lib
from glscl_jax import sharding
from glscl_jax.train import checkpoint
from glscl_jax.train import state as state_lib

LINEAGE = {"data_sha256": "d" * 64, "init_from": None}


def change(config, **sections):
  """A config with e.g. train={"num_steps": 3} replaced."""
  return dataclasses.replace(
    config,
    **{
      name: dataclasses.replace(getattr(config, name), **values)
      for name, values in sections.items()
    },
  )


CONFIG = change(
  config_lib.Config(
    model=config_lib.ModelConfig(
      vision=config_lib.VisionConfig(
        image_size=16, patch_size=4, width=64, depth=1
      ),
      text=config_lib.TextConfig(
        vocab_size=32, max_length=6, num_positions=8, width=64, depth=1
      ),
      joint_width=16,
    ),
    # Contrastive only: few arrays, and no fusion layers to build.
    objectives=config_lib.ObjectiveConfig(
      **{name: float(name == "itc") for name in config_lib.OBJECTIVES}
    ),
    data=config_lib.DataConfig(batch_size=16),
  ),
  train={"keep_last": 2, "keep_best": 1},
)


@pytest.fixture(scope="module")
def abstract():
  """The state on a mesh of 8 x 1 x 1."""
  return state_lib.abstract_state(CONFIG, sharding.make_mesh(CONFIG.mesh))


@pytest.fixture(scope="module")
def state(abstract):
  """A state of random numbers; a real one would cost a compilation."""
  rng = np.random.default_rng(0)

  def draw(leaf):
    array = np.asarray(rng.normal(size=leaf.shape) * 100).astype(leaf.dtype)
    return jax.device_put(array, leaf.sharding)

  return jax.tree.map(draw, abstract)


def open_checkpointer(workdir, config=CONFIG, tokenizer="t" * 64, **lineage):
  return checkpoint.Checkpointer(
    workdir,
    config=config,
    tokenizer_sha256=tokenizer,
    lineage=LINEAGE | lineage,
  )


def save_steps(workdir, state, scores, config=CONFIG):
  """Saves step 1, 2, ..; None is a step without validation."""
  checkpointer = open_checkpointer(workdir, config)
  for step, score in enumerate(scores, 1):
    checkpointer.save(
      step,
      state,
      data_state={"step": step},
      metrics=None if score is None else {checkpoint.BEST_METRIC: score},
    )
  checkpointer.close()


@pytest.fixture(scope="module")
def saved(tmp_path_factory, state):
  """A work dir with the steps 2 (best), 4 and 5 of five."""
  workdir = tmp_path_factory.mktemp("saved")
  save_steps(workdir, state, [0.1, 0.7, 0.3, None, None])
  return workdir


def assert_equal(found, expected):
  expected = checkpoint.flatten(expected)
  found = checkpoint.flatten(found)
  assert found.keys() == expected.keys()
  for name, array in expected.items():
    np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_a_state_comes_back_bit_equal_on_another_mesh(saved, state):
  mesh = sharding.make_mesh(config_lib.MeshConfig(data=2, fsdp=2, tensor=2))
  wanted = state_lib.abstract_state(CONFIG, mesh)
  checkpointer = open_checkpointer(saved)
  restored = checkpointer.restore(wanted)
  checkpointer.close()
  assert (restored.step, restored.data_state) == (5, {"step": 5})
  assert_equal(restored.state, state)
  for name, leaf in checkpoint.flatten(restored.state).items():
    assert leaf.sharding == checkpoint.flatten(wanted)[name].sharding, name


def test_a_new_work_dir_has_nothing_to_restore(tmp_path, abstract):
  checkpointer = open_checkpointer(tmp_path)
  assert checkpointer.restore(abstract) is None
  checkpointer.close()
  assert checkpoint.list_steps(tmp_path) == []


def test_the_last_steps_and_the_best_are_kept(saved):
  assert checkpoint.list_steps(saved) == [2, 4, 5]
  assert checkpoint.find_step(saved, "best") == 2
  assert checkpoint.find_step(saved, "auto") == 2
  assert checkpoint.find_step(saved, "latest") == 5
  assert json.loads((saved / "best.json").read_text()) == {
    "step": 2,
    checkpoint.BEST_METRIC: 0.7,
  }
  assert sorted(path.name for path in (saved / "checkpoints").iterdir()) == [
    "2",
    "4",
    "5",
  ]


def test_without_validation_no_step_is_the_best(tmp_path, state):
  save_steps(tmp_path, state, [None, None, None])
  assert checkpoint.list_steps(tmp_path) == [2, 3]
  assert not (tmp_path / "best.json").exists()
  with pytest.raises(checkpoint.CheckpointError, match="was validated"):
    checkpoint.find_step(tmp_path, "best")
  assert checkpoint.find_step(tmp_path, "auto") == 3


def test_a_step_that_is_not_there_is_answered_with_those_that_are(saved):
  with pytest.raises(checkpoint.CheckpointError, match=r"\[2, 4, 5\]"):
    checkpoint.find_step(saved, 3)


def test_a_donated_state_does_not_change_what_is_being_saved(tmp_path, state):
  add = jax.jit(lambda x: x + 1, donate_argnums=0)
  tree = {"params": jax.tree.map(jnp.copy, state.params["text"])}
  checkpointer = open_checkpointer(tmp_path)
  checkpointer.save(1, tree, data_state={})
  for _ in range(3):
    tree = jax.tree.map(add, tree)
  wanted = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
  )
  checkpointer.wait()
  restored = checkpointer.restore(wanted).state
  checkpointer.close()
  assert_equal(restored["params"], state.params["text"])


def test_another_configuration_is_refused_with_the_keys_that_differ(saved):
  other = change(
    CONFIG, train={"num_steps": 7, "log_every": 3}, data={"seed": 4}
  )
  with pytest.raises(checkpoint.CheckpointError) as error:
    open_checkpointer(saved, other)
  text = str(error.value)
  assert "train.num_steps: 100000 there, 7 now" in text
  assert "data.seed: 0 there, 4 now" in text
  assert "log_every" not in text and "--workdir" in text


def test_keys_that_change_no_result_may_differ(saved):
  other = change(
    CONFIG,
    train={
      "log_every": 3,
      "save_every": 9,
      "keep_last": 3,
      "eval_every": 5,
      "init_from": "moved",
    },
    data={"num_workers": 1, "prefetch": 9, "dir": "elsewhere"},
    mesh={"fsdp": 2},
  )
  open_checkpointer(saved, other).close()
  assert checkpoint.list_steps(saved) == [2, 4, 5]


def test_every_free_key_is_a_key():
  tree = json.loads(config_lib.to_json(CONFIG))
  for key in checkpoint.FREE_KEYS:
    section, name = key.split(".")
    assert name in tree[section], key


def forget(workdir, *keys):
  """Takes keys out of the stored configuration, as an older version's."""
  path = workdir / "checkpoints" / "5" / "meta" / "metadata"
  meta = json.loads(path.read_text())
  for key in keys:
    section, _, name = key.rpartition(".")
    del (meta["config"][section] if section else meta["config"])[name]
  path.write_text(json.dumps(meta))


def test_keys_that_a_stored_configuration_lacks_are_named(
  saved, tmp_path, caplog
):
  workdir = shutil.copytree(saved, tmp_path / "work")
  forget(workdir, "optimizer.muon_rms", "masking")
  assert checkpoint.restore_params(workdir).config == CONFIG
  (message,) = caplog.messages
  assert "checkpoints/5: its configuration lacks keys" in message
  assert "optimizer.muon_rms = 0.2" in message and "masking = {" in message
  caplog.clear()
  open_checkpointer(workdir).close()
  assert "optimizer.muon_rms = 0.2" in caplog.messages[0]


def test_a_key_that_is_not_stored_counts_as_its_default(saved, tmp_path):
  workdir = shutil.copytree(saved, tmp_path / "work")
  forget(workdir, "optimizer.muon_rms")
  with pytest.raises(
    checkpoint.CheckpointError,
    match=r"optimizer.muon_rms: 0.2 there, 0.3 now",
  ):
    open_checkpointer(workdir, change(CONFIG, optimizer={"muon_rms": 0.3}))


def test_another_tokenizer_is_refused(saved):
  with pytest.raises(checkpoint.CheckpointError, match="another tokenizer"):
    open_checkpointer(saved, tokenizer="0" * 64)


def test_other_training_data_are_refused(saved):
  with pytest.raises(checkpoint.CheckpointError, match="other training data"):
    open_checkpointer(saved, data_sha256="0" * 64)


@pytest.mark.parametrize(
  ("step", "picked"),
  [("best", True), ("auto", True), (2, True), ("latest", False), (4, False)],
)
def test_the_lineage_says_whether_validation_picked_the_step(
  saved, step, picked
):
  assert (
    checkpoint.restore_params(saved, step=step).lineage["picked_as_best"]
    == picked
  )


@pytest.mark.parametrize(("step", "number"), [("best", 2), ("latest", 5)])
def test_parameters_are_read_alone_with_their_lineage(
  saved, state, step, number
):
  config, params, found, metrics, lineage = checkpoint.restore_params(
    saved, step=step
  )
  assert (config, found) == (CONFIG, number)
  assert metrics == ({checkpoint.BEST_METRIC: 0.7} if step == "best" else {})
  assert lineage["data_sha256"] == "d" * 64
  assert lineage["tokenizer_sha256"] == "t" * 64
  assert lineage["step"] == number
  assert_equal(params, state.params)


def test_arrays_of_another_shape_are_named(tmp_path, state, abstract):
  kernel = state.params["vision"]["patch_kernel"]
  vision = state.params["vision"] | {"patch_kernel": kernel[:, :32]}
  params = state.params | {"vision": vision}
  save_steps(tmp_path, dataclasses.replace(state, params=params), [None])
  checkpointer = open_checkpointer(tmp_path)
  for read in (
    lambda: checkpoint.restore_params(tmp_path),
    lambda: checkpointer.restore(abstract),
  ):
    with pytest.raises(
      checkpoint.CheckpointError,
      match=r"vision/patch_kernel: \(48, 32\) stored, \(48, 64\) asked for",
    ):
      read()
  checkpointer.close()


@pytest.mark.parametrize(
  "name",
  ["meta/metadata", "data/metadata", "state/_METADATA", "state/manifest.ocdbt"],
)
def test_a_damaged_checkpoint_is_named(saved, tmp_path, abstract, name):
  workdir = shutil.copytree(saved, tmp_path / "work")
  (workdir / "checkpoints" / "5" / name).write_bytes(b"")
  with pytest.raises(
    checkpoint.CheckpointError, match=r"checkpoints/5: cannot be read"
  ):
    open_checkpointer(workdir).close()
    checkpoint.restore(workdir, abstract)


def test_what_a_kill_left_half_written_is_neither_seen_nor_kept(
  saved, tmp_path, state
):
  save_steps(tmp_path, state, [None])
  half = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp"
  (half / "state").mkdir(parents=True)
  assert checkpoint.list_steps(tmp_path) == [1]
  open_checkpointer(tmp_path).close()
  assert not half.exists()
