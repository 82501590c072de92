"""What launch/bench.py measures and prints, without a step."""

import dataclasses
import os
import time

import pytest

from glscl_jax import config as config_lib
from glscl_jax import errors
from glscl_jax.train import bench

SPREAD = bench.Spread(median=2.0, fastest=1.5, slowest=3.0)
FIGURES = bench.Figures(
  system="glscl",
  devices="1 x cpu",
  jax="0.10.2",
  batch_size=4,
  num_params=1000,
  compile_seconds=1.0,
  state_mib=1.0,
  temporary_mib=1.0,
  step_seconds=SPREAD,
  samples_per_second=2.0,
  gflop_per_sample=1.0,
  peak="a peak",
  mfu=0.5,
  matmul_tflops=1.0,
  share_of_matmul=0.5,
  data_samples_per_second=300.0,
  data_wait=0.0,
  peak_rss_mib=100.0,
  torch={},
  torch_images_per_second=None,
)


def test_batches_made_in_advance_do_not_count_as_fast_ones():
  ahead = bench.count_ahead(config_lib.DataConfig(prefetch=8))
  assert ahead == 8

  def batches():
    for _ in range(ahead):
      yield {}
    while True:
      time.sleep(0.02)
      yield {}

  assert bench._time_data(batches(), 4, ahead=ahead) >= 0.02


def test_workers_read_ahead_and_are_collected_from_ahead():
  data = config_lib.DataConfig(prefetch=4, num_workers=2)
  assert bench.count_ahead(data) == (4 + 4) + (2 + 2)


def test_ratios_are_printed_where_pytorch_was_timed():
  assert "PyTorch" not in bench.format_figures(FIGURES)
  slower = bench.Baseline(
    step_seconds=SPREAD, peak_rss_mib=200.0, speed=2.5, memory=0.5
  )
  found = dataclasses.replace(
    FIGURES, torch={"float32": slower}, torch_images_per_second=200.0
  )
  said = bench.format_figures(found)
  assert "float32: 2000.0 ms median, 2.50 times ours" in said
  assert "images: 200.0 a second" in said and "1.50 times as many" in said


def test_a_process_that_was_ended_is_an_error_with_an_advice():
  with pytest.raises(errors.UserError, match="want of memory; lower"):
    bench._run_alone(os._exit, 9)
