"""What launch/bench.py tells of the tiny recipe."""

import json

from glscl_jax import config as config_lib
from glscl_jax.systems import registry
from launch import bench
from tests import recipes


def test_a_bench_measures_step_data_and_both_and_writes_nothing_else(
  project, tmp_path, capsys
):
  output = tmp_path / "bench.json"
  code = bench.main(
    [
      "bench.py",
      f"--config={project.recipe}",
      "--steps=2",
      f"--output={output}",
    ]
  )
  said = capsys.readouterr()
  assert code == 0, said.err
  found = json.loads(output.read_text())
  config = config_lib.from_config_dict(recipes.load(str(project.recipe)))
  assert found["batch_size"] == config.data.batch_size
  step = found["step_seconds"]
  assert 0 < step["fastest"] <= step["median"] <= step["slowest"]
  rate = found["batch_size"] / step["median"]
  assert abs(found["samples_per_second"] / rate - 1) < 1e-6
  flops = registry.find(config).forward(config).step
  assert found["gflop_per_sample"] == flops / 1e9
  assert 0 < found["mfu"] and 0 <= found["data_wait"] <= 1
  assert f"{found['num_params']:,} parameters" in said.out
  assert list(tmp_path.iterdir()) == [output]
