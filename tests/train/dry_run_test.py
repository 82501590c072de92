"""A dry run succeeds where a start gets as far, and fails where it fails."""

from __future__ import annotations

import dataclasses
import io
import re
import shutil
import types

import jax
import numpy as np
import pytest

from glscl_jax import config as config_lib
from glscl_jax import errors
from glscl_jax.data import pipeline
from glscl_jax.train import checkpoint, dry_run, loop
from glscl_jax.train import state as state_lib
from tests import random_pairs, tiny


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  data = tiny.write_names(tmp_path_factory.mktemp("data") / "names", "train")
  config = tiny.config(data)
  return dataclasses.replace(
    config,
    model=dataclasses.replace(config.model, joint_width=36),
    objectives=config_lib.ObjectiveConfig(
      **random_pairs.only("itc"),
      neg_group=8,
      mltc_image_group=8,
      mltc_text_group=8,
    ),
  )


def save_zeros(workdir, config, *, step, tokenizer=""):
  """Makes a work dir with one checkpoint."""
  inputs = loop.open_inputs(config)
  inputs.iterator.close()
  checkpointer = checkpoint.Checkpointer(
    workdir,
    config=config,
    tokenizer_sha256=tokenizer or inputs.tokenizer.sha256,
    lineage={**inputs.data_facts, "init_from": None},
  )
  state = jax.tree.map(
    lambda x: np.zeros(x.shape, x.dtype),
    state_lib.abstract_state(config, inputs.mesh),
  )
  checkpointer.save(step, state, data_state={"step": step})
  checkpointer.close()
  return workdir


@pytest.fixture(scope="module")
def saved(config, tmp_path_factory):
  """A work dir with step 3."""
  return save_zeros(tmp_path_factory.mktemp("saved"), config, step=3)


def change_init_from(config, path):
  train = dataclasses.replace(config.train, init_from=str(path))
  return dataclasses.replace(config, train=train)


def contents(folder):
  return {
    path: path.stat().st_mtime_ns
    for path in folder.rglob("*")
    if path.is_file()
  }


def reasons(config, workdir):
  """Why a dry run and why a start fails."""
  found = []
  for run in (
    lambda: dry_run.dry_run(config, workdir, say=lambda text: None),
    lambda: loop.train(config, workdir, stream=io.StringIO()),
  ):
    with pytest.raises(errors.UserError) as error:
      run()
    found.append(str(error.value))
  return found


def test_a_dry_run_reads_the_checkpoint_and_touches_nothing(config, saved):
  before, said = contents(saved), []
  config = dataclasses.replace(config, mesh=config_lib.MeshConfig(fsdp=8))
  dry_run.dry_run(config, saved, say=said.append)
  assert f"a start would continue after step 3 of {saved}" in said
  assert contents(saved) == before
  (warning,) = (text for text in said if text.startswith("warning: "))
  assert "it does not divide a size of image_projection/fc2/kernel" in warning


def test_micro_batches_leave_fewer_activations(config):
  inputs = loop.open_inputs(config)
  batch = pipeline.global_batch(next(inputs.iterator), inputs.mesh)
  inputs.iterator.close()
  abstract = state_lib.abstract_state(config, inputs.mesh)

  def activations(number):
    train = dataclasses.replace(config.train, accumulate=number)
    changed = dataclasses.replace(config, train=train)
    return dry_run.estimate_memory(changed, abstract, batch, inputs.mesh)

  whole, half = activations(1), activations(2)
  assert whole.keys() == half.keys()
  smaller = [name for name in whole if half[name] < whole[name]]
  assert len(smaller) == 1 and half[smaller[0]] < 0.6 * whole[smaller[0]]


def test_a_dry_run_of_several_lengths_shows_the_longest(config, tmp_path):
  longest = config.model.text.max_length
  data = dataclasses.replace(config.data, text_lengths=(4,))
  told = []
  dry_run.dry_run(
    dataclasses.replace(config, data=data), tmp_path / "work", say=told.append
  )
  whole = []
  dry_run.dry_run(config, tmp_path / "work", say=whole.append)
  assert f"FLOPs and memory are those of {longest} tokens" in "\n".join(told)

  def line(lines, word):
    return next(text for text in lines if word in text)

  for word in ("model FLOPs", "memory a device"):
    assert line(told, word) == line(whole, word)


def test_a_dry_run_warns_of_what_the_machine_and_the_data_cannot_give(config):
  inputs = types.SimpleNamespace(
    mesh=types.SimpleNamespace(size=2),
    iterator=types.SimpleNamespace(num_pairs=config.data.batch_size),
  )
  assert not dry_run.find_excess(config, {"parameters": 2.0**20}, inputs)
  inputs.iterator.num_pairs -= 1
  memory, batch = dry_run.find_excess(config, {"parameters": 2.0**60}, inputs)
  assert memory.startswith("this needs about 2,199,023,255,552 MiB, the")
  assert f"more than the {config.data.batch_size - 1} training pairs" in batch


def test_a_start_warns_of_captions_that_are_cut_and_of_idle_validation(config):
  inputs = loop.open_inputs(config)
  inputs.iterator.close()
  assert not loop.find_oversights(config, inputs)
  text = dataclasses.replace(config.model.text, max_length=3)
  changed = dataclasses.replace(
    config,
    model=dataclasses.replace(config.model, text=text),
    train=dataclasses.replace(config.train, eval_splits=("val",)),
  )
  idle, cut = loop.find_oversights(changed, inputs)
  assert "train.eval_every is 0" in idle
  assert "training captions looked at have more than 3 tokens" in cut


@pytest.mark.parametrize(
  "name", ["data/metadata", "metrics/metrics", "state/manifest.ocdbt"]
)
def test_a_damaged_checkpoint_fails_a_dry_run_as_it_fails_a_start(
  config, saved, tmp_path, name
):
  workdir = shutil.copytree(saved, tmp_path / "work")
  (workdir / "checkpoints" / "3" / name).write_bytes(b"")
  # Arrays are read at once: any of them may be the first that fails.
  dry, real = (
    re.sub(r'reading ".*\)\. If', "reading one). If", reason)
    for reason in reasons(config, workdir)
  )
  assert dry == real
  assert "checkpoints/3: cannot be read" in dry


@pytest.mark.parametrize("place", ["file", "file/below", "work"])
def test_a_work_dir_that_cannot_be_written_is_named(config, tmp_path, place):
  (tmp_path / "file").touch()
  (tmp_path / "work").mkdir()
  (tmp_path / "work" / "checkpoints").touch()
  dry, real = reasons(config, tmp_path / place)
  assert dry == real
  in_the_way = tmp_path / ("work/checkpoints" if place == "work" else "file")
  assert f"{in_the_way} is not a folder that can be written" in dry


def test_weights_of_another_tokenizer_start_neither_run(config, tmp_path):
  other = save_zeros(tmp_path / "other", config, step=1, tokenizer="0" * 64)
  dry, real = reasons(change_init_from(config, other), tmp_path / "work")
  assert dry == real
  here = loop.open_inputs(config).tokenizer.sha256
  for part in (f"{other} was trained", "0" * 12, here[:12], "data.tokenizer"):
    assert part in dry


def test_a_run_that_continues_keeps_the_init_from_it_began_with(
  config, tmp_path
):
  began = change_init_from(config, "there")
  workdir = save_zeros(tmp_path / "work", began, step=began.train.num_steps)
  moved, said, stream = change_init_from(config, "moved"), [], io.StringIO()
  dry_run.dry_run(moved, workdir, say=said.append)
  loop.train(moved, workdir, stream=stream)
  for text in ("\n".join(said), stream.getvalue()):
    assert f"'moved' now, but {workdir} began with 'there'" in text
  stored = config_lib.from_json((workdir / "config.json").read_text())
  assert stored == began
