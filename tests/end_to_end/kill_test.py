"""Runs that are killed at random moments and continued by the same command."""

from __future__ import annotations

import json
import pathlib
import random
import time

import numpy as np

from glscl_jax.train import checkpoint
from tests.end_to_end import child

NUM_KILLS = 10
TIMES = ("samples_per_second", "data_wait", "mfu")


def half_saved(workdir: pathlib.Path) -> list[str]:
  return [path.name for path in workdir.glob("checkpoints/*tmp*")]


def read_metrics(workdir: pathlib.Path) -> list[dict]:
  """All that training itself wrote, without speeds and validation."""
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [
    {
      key: value
      for key, value in json.loads(line).items()
      if key not in TIMES and not key.startswith("eval/")
    }
    for line in lines
  ]


def test_killed_ten_times_a_run_ends_bit_equal_to_an_undisturbed_one(
  trained, start, tmp_path
):
  rng = random.Random(0)
  workdir = tmp_path / "work"
  for number in range(NUM_KILLS):
    before = checkpoint.list_steps(workdir)
    process = start(workdir)
    if number in (0, 5):  # while it starts
      time.sleep(rng.uniform(0.0, 1.0))
    else:
      step = (before[-1] if before else 0) + rng.randint(1, 12)
      process.wait_for_line(f" step {step}/")
      time.sleep(rng.uniform(0.0, 0.05))
    process.kill()
    assert checkpoint.list_steps(workdir)[-1:] >= before[-1:]
  assert "finished" in start(workdir).finish()

  expected = checkpoint.restore_params(trained.workdir)
  found = checkpoint.restore_params(workdir)
  assert found.step == expected.step
  for name, array in checkpoint.flatten(expected.params).items():
    np.testing.assert_array_equal(
      checkpoint.flatten(found.params)[name], array, err_msg=name
    )
  assert read_metrics(workdir) == read_metrics(trained.workdir)


def test_a_kill_during_a_save_leaves_only_whole_checkpoints_visible(
  trained, start, tmp_path
):
  workdir = tmp_path / "work"
  process = start(workdir)
  end = time.monotonic() + child.DEADLINE
  while len(checkpoint.list_steps(workdir)) < 2 or not half_saved(workdir):
    process.check(end)
    time.sleep(0.001)
  process.kill()

  (half,) = half_saved(workdir)
  steps = checkpoint.list_steps(workdir)
  assert len(steps) >= 2 and int(half.partition(".")[0]) not in steps
  for step in steps:
    assert checkpoint.restore_params(workdir, step=step).step == step
