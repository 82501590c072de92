"""The texts of a run, and its speed."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import types

import numpy as np
import pytest

from glscl_jax import config as config_lib
from glscl_jax.systems import registry
from glscl_jax.train import journal, metrics


def test_speed_leaves_out_what_is_no_training_and_forgets_old_steps():
  config = config_lib.Config()
  batch = config.data.batch_size
  config = dataclasses.replace(
    config, train=dataclasses.replace(config.train, num_steps=100)
  )
  time = [0.0]
  clock = metrics.Clock(now=lambda: time[0])
  peak = metrics.Peak(flops=None, source="")
  speed = journal.Speed(config, clock, peak, step=0)
  for step in range(1, 21):
    with clock("data"):
      time[0] += 0.5
    time[0] += 1.5
    with clock("eval"):
      time[0] += 2.0
    speed.mark(step)
  for _ in range(10):  # twice as fast, without a line
    time[0] += 1.0
  now = speed.measure(30, loss=1.0)
  # Over steps 10 to 30: ten of 2 s, ten of 1 s, and a quarter of the former
  # was waiting. Time left counts validation as well: 90 s for 30 steps.
  assert now.samples_per_second == pytest.approx(20 * batch / 30)
  assert now.data_wait == pytest.approx(5 / 30)
  assert now.seconds_left == pytest.approx(70 * 90 / 30)
  assert now.mfu is None


def test_mfu_counts_the_flops_of_each_step_by_the_length_of_its_texts():
  config = config_lib.Config()
  time = [0.0]
  clock = metrics.Clock(now=lambda: time[0])
  peak = metrics.Peak(flops=1e15, source="")
  speed = journal.Speed(config, clock, peak, step=0)
  longest = config.model.text.max_length
  whole = registry.find(config).forward(config).step
  assert speed.flops_per_sample(longest) == whole
  assert speed.flops_per_sample(16) < 0.95 * whole
  for length in (longest, 16):
    speed.count(length)
    time[0] += 2.0
  now = speed.measure(2, loss=1.0)
  mean = (whole + speed.flops_per_sample(16)) / 2
  batch = config.data.batch_size
  assert now.samples_per_second == pytest.approx(2 * batch / 4)
  assert now.mfu == pytest.approx(2 * batch / 4 * mean / 1e15)


def test_advice_on_losses_that_are_not_finite_can_be_followed(tmp_path):
  assert f"init_from={tmp_path}/checkpoints/7 and a lower" in (
    journal.format_advice(tmp_path, 7)
  )
  first = journal.format_advice(tmp_path, None)
  assert "start again and a lower" in first and "None" not in first


def test_a_run_stopped_before_its_first_step_does_not_claim_to_be_saved():
  summary = journal.Summary(
    step=0, metrics={}, seconds={"start": 1.0}, stopped_by=signal.SIGINT
  )
  text = journal.format_summary(summary, start_step=0)
  assert text.startswith("stopped by SIGINT before the first step: nothing")
  assert "saved" not in text


def test_the_summary_of_a_stopped_run_says_how_to_go_on():
  summary = journal.Summary(
    step=7,
    metrics={},
    seconds={"train": 65.0, "save": 1.0},
    stopped_by=signal.SIGTERM,
  )
  text = journal.format_summary(summary, start_step=4)
  assert "stopped by SIGTERM after step 7, which is saved" in text
  assert "3 steps in this call, time: train 1:05, save 0:01" in text
  assert text.endswith("the same command continues from there")


def lines_of(tmp_path, steps, *, log_every=1):
  """What a journal writes of the scalars of some steps, and its last word."""
  default = config_lib.Config()
  train = dataclasses.replace(default.train, log_every=log_every)
  config = dataclasses.replace(default, train=train)
  writer = metrics.MetricWriter(tmp_path, config=config, start_step=0)
  told = journal.Journal(
    config,
    workdir=tmp_path,
    checkpointer=None,
    writer=writer,
    log=types.SimpleNamespace(progress=lambda *_, **__: None),
    clock=metrics.Clock(),
  )
  peak = metrics.Peak(flops=None, source="")
  told._speed = journal.Speed(config, metrics.Clock(), peak, step=0)
  for number, values in enumerate(steps, start=1):
    values = {"grad_norm": 1.0, "num_skipped": 0} | values
    scalars = {name: np.float32(v) for name, v in values.items()}
    told.add(number, scalars, length=config.model.text.max_length)
  told.flush()
  writer.close()
  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  names = {"loss", "amc", "wrc", "grad_norm"}
  found = [
    {k: v for k, v in json.loads(line).items() if k in names} for line in lines
  ]
  return found, told.last


def drawn(name, value):
  """The scalars of a step that computed one of two objectives."""
  nothing = {"amc": math.nan, "wrc": math.nan}
  return {"loss": value} | nothing | {name: value}


def test_a_line_holds_nothing_of_objectives_that_no_step_drew(tmp_path):
  found, last = lines_of(tmp_path, [drawn("amc", 3.0), drawn("wrc", 2.0)])
  assert found == [
    {"loss": 3.0, "amc": 3.0, "grad_norm": 1.0},
    {"loss": 2.0, "wrc": 2.0, "grad_norm": 1.0},
  ]
  assert "amc" not in last


def test_what_some_steps_drew_is_their_mean_since_the_last_line(tmp_path):
  steps = [
    drawn("amc", 9.0),  # a line
    drawn("amc", 4.0),
    drawn("wrc", 2.0),
    drawn("amc", 5.0),  # a line
    drawn("wrc", 1.0),
    drawn("wrc", 3.0),
    drawn("wrc", 5.0),
    drawn("wrc", 7.0),  # a line
  ]
  found, last = lines_of(tmp_path, steps, log_every=4)
  assert found[1:] == [
    {"loss": 5.0, "amc": 4.5, "wrc": 2.0, "grad_norm": 1.0},
    {"loss": 7.0, "wrc": 4.0, "grad_norm": 1.0},
  ]
  assert last["wrc"] == 4.0


def test_what_all_steps_have_is_that_of_the_step(tmp_path):
  steps = [{"loss": float(n), "amc": 2.0 * n, "wrc": 1.0} for n in range(1, 5)]
  found, _ = lines_of(tmp_path, steps, log_every=4)
  assert found[-1] == {"loss": 4.0, "amc": 8.0, "wrc": 1.0, "grad_norm": 1.0}


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_what_is_not_finite_stays_visible(name, tmp_path):
  bad = drawn("amc", 3.0) | {name: math.nan}
  found, _ = lines_of(tmp_path, [drawn("wrc", 1.0), bad])
  expected = {"loss": 3.0, "amc": 3.0, "wrc": None, "grad_norm": 1.0}
  assert found[1] == expected | {name: None}
