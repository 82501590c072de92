"""Runs that are killed at random moments and continued by the same command."""

from __future__ import annotations

import pathlib
import random
import textwrap
import time

import numpy as np
import pytest

from glscl_jax.data import tokenizer
from glscl_jax.train import checkpoint
from tests.data import tiny_regions
from tests.end_to_end import child

NUM_KILLS = 10


def half_saved(workdir: pathlib.Path) -> list[str]:
  return [path.name for path in workdir.glob("checkpoints/*tmp*")]


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

  assert_equal(workdir, trained.workdir)


# Other systems, with all that they draw at random.
RECIPE = """
    from configs import {system}_tiny

    def get_config(arg=""):
      c = {system}_tiny.get_config()
      c.data.dir = {data!r}
      c.data.batch_size = 8
      c.data.num_threads = 1
      c.model.text.vocab_size = {vocab_size}
      for part in (c.model.vision, c.model.text, c.model.fusion):
        part.width = 64
      for part in (c.model.vision, c.model.text):
        part.depth = 1
      c.model.scan = False
      {own}
      c.train.num_steps = 12
      c.train.log_every = 1
      c.train.save_every = 3
      return c
"""
OWN = {
  "maskvlm": "c.model.text.dropout = c.model.fusion.dropout = 0.1",
  # The first steps split at random, the others by the captions.
  "sycoca": "c.masking.mask_warmup_steps = 6; c.model.fusion.text_depth = 1",
  # Each step draws its objective, and its batch has one of two lengths.
  "cmal": "c.model.region.number, c.model.region.feature_width, "
  "c.model.region.num_classes = 5, 6, 5; c.model.fusion.depth = 1; "
  "c.data.text_lengths = (4,)",
}


@pytest.mark.parametrize("system", OWN)
def test_a_killed_run_of_another_system_ends_bit_equal(
  system, project, starter, tmp_path
):
  data = project.data
  if system == "cmal":
    records = [tiny_regions.make_record(number) for number in range(24)]
    data = tiny_regions.write(tmp_path / "regions", records)
  recipe = tmp_path / "recipe.py"
  recipe.write_text(
    textwrap.dedent(RECIPE).format(
      system=system,
      data=str(data),
      vocab_size=tokenizer.load(data / "tokenizer.model").vocab_size,
      own=OWN[system],
    )
  )
  command = type(project)(data, recipe).command
  whole, killed = tmp_path / "whole", tmp_path / "killed"
  starter(command(whole), whole).finish()
  process = starter(command(killed), killed)
  process.wait_for_line(" step 8/")  # between two saves
  process.kill()
  assert checkpoint.list_steps(killed)[-1] >= 3
  told = starter(command(killed), killed).finish()
  assert "finished" in told
  if system == "cmal":
    assert "step of 4 tokens" in told and "step of 12 tokens" in told
  assert_equal(killed, whole)


def assert_equal(found_dir: pathlib.Path, expected_dir: pathlib.Path) -> None:
  """The same last weights, bit for bit, and the same metrics."""
  found, expected = map(checkpoint.restore_params, (found_dir, expected_dir))
  assert found.step == expected.step
  for name, array in checkpoint.flatten(expected.params).items():
    np.testing.assert_array_equal(
      checkpoint.flatten(found.params)[name], array, err_msg=name
    )
  assert child.read_metrics(found_dir) == child.read_metrics(expected_dir)


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
