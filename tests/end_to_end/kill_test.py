"""Runs that are killed at random moments and continued by the same command."""

from __future__ import annotations

import json
import multiprocessing
import pathlib
import random
import time

import jax
import numpy as np
import pytest

from glscl_jax.train import checkpoint
from launch import train as launcher

NUM_STEPS = 60
NUM_KILLS = 10
DEADLINE = 300.0  # seconds, of one start; a loaded machine is slow
FLAGS = (f"--config.train.num_steps={NUM_STEPS}",)
TIMES = ("samples_per_second", "data_wait", "mfu")


@pytest.fixture(scope="module")
def start(project, tmp_path_factory):
  """Starts the launcher as a process of its own on a work dir.

  The processes are forked from one that has imported everything, which saves
  seconds a start, and share a compilation cache.
  """
  context = multiprocessing.get_context("forkserver")
  with pytest.MonkeyPatch.context() as patch:
    root = pathlib.Path(launcher.__file__).parents[1]
    patch.setenv("PYTHONPATH", str(root))
    cache = tmp_path_factory.mktemp("cache")
    patch.setenv("JAX_COMPILATION_CACHE_DIR", str(cache))
    patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    patch.setenv("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
    context.set_forkserver_preload(["launch.train"])

    def start(workdir: pathlib.Path):
      process = context.Process(
        target=launcher.main, args=(project.command(workdir, *FLAGS),)
      )
      process.start()
      return process

    yield start


def finish(process) -> None:
  process.join(DEADLINE)
  assert process.exitcode == 0


def read_log(workdir: pathlib.Path) -> str:
  path = workdir / "log-0.txt"
  return path.read_text() if path.is_file() else ""


def wait_for_line(process, workdir: pathlib.Path, seen: int, text: str) -> None:
  """Returns once the log holds `text` after its first `seen` characters."""
  end = time.monotonic() + DEADLINE
  while text not in read_log(workdir)[seen:]:
    assert process.is_alive(), "the run ended before it could be killed"
    assert time.monotonic() < end
    time.sleep(0.002)


def half_saved(workdir: pathlib.Path) -> list[str]:
  return [path.name for path in workdir.glob("checkpoints/*tmp*")]


def read_metrics(workdir: pathlib.Path) -> list[dict]:
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [
    {k: v for k, v in json.loads(line).items() if k not in TIMES}
    for line in lines
  ]


def test_killed_ten_times_a_run_ends_bit_equal_to_an_undisturbed_one(
  start, tmp_path
):
  rng = random.Random(0)
  whole, killed = tmp_path / "whole", tmp_path / "killed"
  finish(start(whole))

  for kill in range(NUM_KILLS):
    before, seen = checkpoint.list_steps(killed), len(read_log(killed))
    process = start(killed)
    if kill in (0, 5):  # while it starts
      time.sleep(rng.uniform(0.0, 1.0))
    else:
      step = (before[-1] if before else 0) + rng.randint(1, 12)
      wait_for_line(process, killed, seen, f" step {step}/")
      time.sleep(rng.uniform(0.0, 0.05))
    process.kill()
    process.join()
    assert process.exitcode == -9
    after = checkpoint.list_steps(killed)
    assert after[-1:] >= before[-1:]
  finish(start(killed))

  assert checkpoint.list_steps(killed)[-1] == NUM_STEPS
  expected = checkpoint.restore_params(whole)
  found = checkpoint.restore_params(killed)
  for name, array in checkpoint.flatten(expected.params).items():
    np.testing.assert_array_equal(
      checkpoint.flatten(found.params)[name], array, err_msg=name
    )
  assert jax.tree.leaves(found.params)[0].dtype == np.float32
  assert read_metrics(killed) == read_metrics(whole)


def test_a_kill_during_a_save_leaves_only_whole_checkpoints_visible(
  start, tmp_path
):
  process = start(tmp_path)
  end = time.monotonic() + DEADLINE
  while len(checkpoint.list_steps(tmp_path)) < 2 or not half_saved(tmp_path):
    assert process.is_alive() and time.monotonic() < end
    time.sleep(0.001)
  process.kill()
  process.join()

  (half,) = half_saved(tmp_path)
  steps = checkpoint.list_steps(tmp_path)
  assert len(steps) >= 2 and int(half.partition(".")[0]) not in steps
  for step in steps:
    assert checkpoint.restore_params(tmp_path, step=step).step == step
