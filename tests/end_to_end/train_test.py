"""The train command as a user meets it: start, dry run, stop, continue."""

from __future__ import annotations

import io
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
from glscl_jax.train import checkpoint, loop
from launch import train as launcher

ROOT = pathlib.Path(launcher.__file__).parents[1]


class Interrupting(io.StringIO):
  """A stream that sends this process a signal when `text` is written."""

  def __init__(self, text, number):
    super().__init__()
    self._text, self._number = text, number

  def write(self, text):
    if self._text in text:
      os.kill(os.getpid(), self._number)
    return super().write(text)


def read_metrics(workdir):
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


def read_config(trained) -> config_lib.Config:
  return config_lib.from_json((trained.workdir / "config.json").read_text())


def test_a_run_ends_with_everything_in_its_work_dir(trained):
  assert trained.result.code == 0, trained.result.err
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
  assert checkpoint.list_steps(trained.workdir)[-2:] == [15, 16]
  assert read_config(trained).train.num_steps == 16
  assert '"num_steps": 16' in trained.result.out
  assert "finished at step 16; 16 steps in this call, time: train" in (
    trained.result.out
  )


def test_the_loss_falls_and_every_step_is_written_once(trained):
  lines = read_metrics(trained.workdir)
  assert [line["step"] for line in lines] == list(range(1, 17))
  losses = [line["loss"] for line in lines]
  assert np.mean(losses[-3:]) < 0.9 * losses[0]
  assert all(line["samples_per_second"] > 0 for line in lines)
  assert all(line["mfu"] > 0 for line in lines)


def test_validation_picks_the_best_checkpoint(trained):
  scores = {
    line["step"]: line[checkpoint.BEST_METRIC]
    for line in read_metrics(trained.workdir)
    if checkpoint.BEST_METRIC in line
  }
  assert scores.keys() == {8, 16}
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
  assert lineage["init_from"] is None and lineage["step"] == 16


def test_a_finished_run_has_nothing_left_to_do(trained):
  before = checkpoint.list_steps(trained.workdir)
  result = trained.project.run(trained.workdir, *trained.flags)
  assert result.code == 0
  assert "finished at step 16; 0 steps in this call" in result.out
  assert checkpoint.list_steps(trained.workdir) == before
  assert len(read_metrics(trained.workdir)) == 16


@pytest.mark.parametrize(
  ("number", "name"), [(signal.SIGTERM, "SIGTERM"), (signal.SIGINT, "SIGINT")]
)
def test_a_stopped_run_saves_and_the_same_command_ends_it_bit_equal(
  trained, tmp_path, number, name
):
  stream = Interrupting("step 5/16", number)
  config = read_config(trained)
  summary = loop.train(
    config, tmp_path, evaluate=launcher.retrieval.evaluate, stream=stream
  )
  assert summary.stopped_by == number and 5 <= summary.step < 16
  assert f"stopped by {name} after step {summary.step}" in stream.getvalue()
  assert checkpoint.list_steps(tmp_path)[-1] == summary.step

  result = trained.project.run(tmp_path, *trained.flags)
  assert result.code == 0
  assert f"continuing after step {summary.step}" in result.out
  expected = checkpoint.restore_params(trained.workdir).params
  found = checkpoint.restore_params(tmp_path).params
  assert jax.tree.all(jax.tree.map(jnp.array_equal, found, expected))


def test_parameters_that_are_not_finite_end_the_run_with_advice(
  trained, tmp_path
):
  params = checkpoint.restore_params(trained.workdir).params
  broken = jax.tree.map(lambda x: np.full(x.shape, np.nan, x.dtype), params)
  config = read_config(trained)
  config = config_lib.from_config_dict(
    {
      **json.loads(config_lib.to_json(config)),
      "train": {
        **json.loads(config_lib.to_json(config.train)),
        "init_from": "nan",
      },
    }
  )
  with pytest.raises(loop.TrainError, match="optimizer.max_skips = 10"):
    loop.train(
      config,
      tmp_path,
      evaluate=launcher.retrieval.evaluate,
      read_params=lambda path: (broken, {"from": path}),
      stream=io.StringIO(),
    )
  assert read_metrics(tmp_path)[-1]["loss"] is None
  lineage = checkpoint.restore_params(tmp_path).lineage
  assert lineage["init_from"] == {"from": "nan"}


def test_init_from_another_work_dir_is_loaded_and_reported(trained, tmp_path):
  result = trained.project.run(
    tmp_path / "work",
    "--dry_run",
    f"--config.train.init_from={trained.workdir}/checkpoints/16",
    "--config.model.joint_width=32",
  )
  assert result.code == 0, result.err
  assert "of another shape, new here: image_projection" in result.out


def test_a_dry_run_shows_all_and_touches_nothing(project, tmp_path):
  workdir = tmp_path / "work"
  objectives = [
    f"--config.objectives.{name}=1.0" for name in config_lib.OBJECTIVES
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
