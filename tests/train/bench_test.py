"""How launch/bench.py measures the data alone."""

import time

from glscl_jax import config as config_lib
from glscl_jax.train import bench


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
