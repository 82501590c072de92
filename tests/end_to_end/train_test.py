"""The train command as a user meets it: start, dry run, stop, continue."""

from __future__ import annotations

import json
import os
import pathlib
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glscl_jax import config as config_lib
from glscl_jax.train import checkpoint, loop, state
from launch import train as launcher

ROOT = pathlib.Path(launcher.__file__).parents[1]
NUM_STEPS = 60  # of the recipe


def read_metrics(workdir):
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


def read_config(trained) -> config_lib.Config:
  return config_lib.from_json((trained.workdir / "config.json").read_text())


def test_a_run_ends_with_everything_in_its_work_dir(trained):
  names = {path.name.split(".out.")[0] for path in trained.workdir.iterdir()}
  assert names == {
    "best.json",
    "checkpoints",
    "config.json",
    "events",
    "log-0.txt",
    "metrics.jsonl",
    "tokenizer.model",
  }
  assert checkpoint.list_steps(trained.workdir)[-2:] == [
    NUM_STEPS - 3,
    NUM_STEPS,
  ]
  assert read_config(trained).train.num_steps == NUM_STEPS
  assert f'"num_steps": {NUM_STEPS}' in trained.output
  assert (
    f"finished at step {NUM_STEPS}; {NUM_STEPS} steps in this call, time: train"
    in trained.output
  )


def test_the_loss_falls_and_every_step_is_written_once(trained):
  lines = read_metrics(trained.workdir)
  assert [line["step"] for line in lines] == list(range(1, NUM_STEPS + 1))
  losses = [line["loss"] for line in lines]
  assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
  assert all(line["samples_per_second"] > 0 for line in lines)
  assert all(line["mfu"] > 0 for line in lines)


def test_validation_picks_the_best_checkpoint(trained):
  scores = {
    line["step"]: line[checkpoint.BEST_METRIC]
    for line in read_metrics(trained.workdir)
    if checkpoint.BEST_METRIC in line
  }
  assert scores.keys() == {NUM_STEPS // 2, NUM_STEPS}
  best = max(scores, key=lambda step: (scores[step], step))
  assert checkpoint.find_step(trained.workdir, "best") == best
  found = checkpoint.restore_params(trained.workdir, step="best")
  assert found.metrics[checkpoint.BEST_METRIC] == scores[best]
  recalls = [
    found.metrics[f"eval/val/{direction}_r1"] for direction in ("i2t", "t2i")
  ]
  assert found.metrics[checkpoint.BEST_METRIC] == pytest.approx(
    np.mean(recalls)
  )


def test_the_lineage_says_where_the_parameters_come_from(trained):
  lineage = checkpoint.restore_params(trained.workdir).lineage
  assert lineage["train_split"] == "train" and lineage["train_records"] == 18
  assert lineage["data_dir"] == str(trained.project.data)
  assert lineage["init_from"] is None and lineage["step"] == NUM_STEPS


def test_a_finished_run_has_nothing_left_to_do(trained, start):
  before = checkpoint.list_steps(trained.workdir)
  said = start(trained.workdir, *trained.flags).finish()
  assert f"finished at step {NUM_STEPS}; 0 steps in this call" in said
  assert checkpoint.list_steps(trained.workdir) == before
  assert len(read_metrics(trained.workdir)) == NUM_STEPS


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_saves_and_says_that_the_same_command_continues(
  start, tmp_path, number
):
  workdir = tmp_path / "work"
  process = start(workdir)
  process.wait_for_line(" step 4/")
  os.kill(process.process.pid, number)
  said = process.finish(code=128 + number)
  step = checkpoint.list_steps(workdir)[-1]
  assert 4 <= step < NUM_STEPS
  assert f"stopped by {number.name} after step {step}, which is saved" in said
  assert "the same command continues from there" in said
  assert read_metrics(workdir)[-1]["step"] == step


def test_parameters_that_are_not_finite_end_the_run_with_advice(
  project, start, tmp_path
):
  workdir = tmp_path / "work"
  config = config_lib.from_config_dict(
    launcher.parse(project.command(workdir)).config
  )
  inputs = loop.open_inputs(config)
  broken = jax.tree.map(
    lambda x: (
      np.full(x.shape, np.nan, x.dtype)
      if jnp.issubdtype(x.dtype, jnp.floating)
      else np.zeros(x.shape, x.dtype)
    ),
    state.abstract_state(config, inputs.mesh),
  )
  checkpointer = checkpoint.Checkpointer(
    workdir,
    config=config,
    tokenizer_sha256=inputs.tokenizer.sha256,
    lineage={**inputs.data_facts, "init_from": None},
  )
  checkpointer.save(0, broken, data_state={"step": 0})
  checkpointer.close()

  said = start(workdir).finish(code=2)
  assert "error: step 10: 10 steps had a loss or gradient" in said
  assert "optimizer.max_skips = 10" in said and "Traceback" not in said
  assert "in another --workdir with --config.train.init_from=" in said
  assert read_metrics(workdir)[-1]["loss"] is None


def test_init_from_another_work_dir_is_loaded_and_reported(trained, tmp_path):
  result = trained.project.run(
    tmp_path / "work",
    "--dry_run",
    f"--config.train.init_from={trained.workdir}/checkpoints/{NUM_STEPS}",
    "--config.model.joint_width=32",
  )
  assert result.code == 0, result.err
  assert "of another shape, new here: image_projection" in result.out


def test_a_dry_run_shows_all_and_touches_nothing(project, tmp_path):
  workdir = tmp_path / "work"
  objectives = [
    f"--config.objectives.{name}=1.0"
    for name in config_lib.SYSTEM_OBJECTIVES["glscl"]
  ]
  result = project.run(workdir, "--dry_run", *objectives)
  assert result.code == 0, result.err
  for part in (
    '"batch_size": 8',
    "vision/patch_kernel",
    "total",
    "model FLOPs a sample",
    "MiB optimizer state",
    "image_BYXC        uint8   (8, 16, 16, 3)",
    "a start would reach its first step",
  ):
    assert part in result.out, part
  assert not workdir.exists()


def test_the_script_itself_runs_and_reports_mistakes_without_a_trace(
  project, tmp_path
):
  command = project.command(tmp_path, "--config.train.sead=1")
  done = subprocess.run(
    [sys.executable, *command],
    cwd=ROOT,
    env={**os.environ, "PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 2
  assert done.stderr.strip() == (
    "error: config.train.sead: unknown key; did you mean config.train.seed?"
  )


def test_a_value_that_is_none_by_default_can_be_set_by_a_flag(
  project, tmp_path
):
  flags = ("--config.optimizer.clip_norm=1.5", "--config.data.mean=(0,0.5,1)")
  parsed = launcher.parse(project.command(tmp_path, *flags))
  config = config_lib.from_config_dict(parsed.config)
  assert config.optimizer.clip_norm == 1.5
  assert config.data.mean == (0.0, 0.5, 1.0)
  assert config.objectives.text_mgsc_group is None
