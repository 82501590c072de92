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
