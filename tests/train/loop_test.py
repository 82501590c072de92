"""Parts of the loop that need no training."""

from __future__ import annotations

import os
import signal

import pytest

from glscl_jax.train import loop


class Stopped(Exception):
  """What the handler that was there before does."""


def stop_at_once(number, frame):
  raise Stopped


@pytest.fixture(params=[signal.SIGTERM, signal.SIGINT])
def number(request):
  """A signal that would end this process, were it not for a handler."""
  before = signal.signal(request.param, stop_at_once)
  yield request.param
  signal.signal(request.param, before)


def test_a_signal_asks_to_stop_and_a_second_one_is_not_held_back(
  number, monkeypatch
):
  with loop.Stop() as stop:
    assert not stop.asked(1)
    os.kill(os.getpid(), number)
    assert stop.asked(1) and stop.number == number
    os.kill(os.getpid(), number)  # a launcher tells what the group was told
    monkeypatch.setattr(loop, "SAME_STOP_SECONDS", 0.0)
    with pytest.raises(Stopped):
      os.kill(os.getpid(), number)
  assert signal.getsignal(number) is stop_at_once
