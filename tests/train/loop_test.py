"""Parts of the loop that need no training."""

from __future__ import annotations

import os
import signal

import pytest

from glscl_jax.train import loop


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_to_stop_and_a_second_one_is_not_held_back(number):
  before = signal.getsignal(number)
  with loop.Stop() as stop:
    assert not stop.asked(1)
    os.kill(os.getpid(), number)
    assert stop.asked(1) and stop.number == number
    assert signal.getsignal(number) == before
  assert signal.getsignal(number) == before


def test_advice_on_losses_that_are_not_finite_can_be_followed(tmp_path):
  assert f"init_from={tmp_path}/checkpoints/7 and a lower" in (
    loop.format_advice(tmp_path, 7)
  )
  first = loop.format_advice(tmp_path, None)
  assert "start again and a lower" in first and "None" not in first


def test_the_summary_of_a_stopped_run_says_how_to_go_on():
  summary = loop.Summary(
    step=7,
    metrics={},
    seconds={"train": 65.0, "save": 1.0},
    stopped_by=signal.SIGTERM,
  )
  text = loop.format_summary(summary, start_step=4)
  assert "stopped by SIGTERM after step 7, which is saved" in text
  assert "3 steps in this call, time: train 1:05, save 0:01" in text
  assert text.endswith("the same command continues from there")
