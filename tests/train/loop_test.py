"""Parts of the loop that need no training."""

from __future__ import annotations

import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glscl_jax.train import checkpoint, loop

PARAMS = {
  "a": {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros((3,))},
  "b": {"kernel": jnp.zeros((3, 4))},
}


def test_init_from_loads_what_agrees_in_name_and_shape_and_names_the_rest():
  loaded = {
    "a": {"kernel": np.ones((2, 3), np.float16), "bias": np.ones((5,))},
    "c": {"kernel": np.ones((1,))},
  }
  params, merge = loop.merge_params(PARAMS, loaded)
  assert merge == loop.Merge(
    loaded=("a/kernel",),
    missing=("b/kernel",),
    unexpected=("c/kernel",),
    reshaped=("a/bias",),
  )
  assert params["a"]["kernel"].dtype == jnp.float32
  np.testing.assert_array_equal(params["a"]["kernel"], np.ones((2, 3)))
  np.testing.assert_array_equal(params["a"]["bias"], np.zeros((3,)))
  text = loop.format_merge("DIR", merge)
  assert "DIR: 1 parameters loaded" in text
  assert "1 unexpected there, left out: c/kernel" in text


def test_loaded_parameters_take_the_sharding_of_the_new_state():
  mesh = jax.make_mesh(
    (8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
  )
  where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
  params = {"kernel": jax.device_put(jnp.zeros((8, 2)), where)}
  found, _ = loop.merge_params(
    params, {"kernel": np.arange(16.0).reshape(8, 2)}
  )
  assert found["kernel"].sharding == where
  np.testing.assert_array_equal(found["kernel"], np.arange(16.0).reshape(8, 2))


def test_init_from_that_brings_nothing_is_an_error():
  _, merge = loop.merge_params(PARAMS, {"z": np.ones((1,))})
  with pytest.raises(checkpoint.CheckpointError, match="nothing of DIR fits"):
    loop.check_merge("DIR", merge)


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
