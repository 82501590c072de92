"""SCL (2211.13437): GLSCL without local token completion.

Arguments as for configs/glscl_base.py.
"""

from glscl_jax import ablations
from glscl_jax import config as config_lib

STEPS = {"ablation": 15_000, "main": 100_000}  # code: SCL@cd0d819


def get_config(recipe: str = "main"):
  """The defaults, with MLTC and its pass switched off."""
  if recipe not in STEPS:
    raise ValueError(f"scl_base.py:{recipe}: the recipes are ablation and main")
  config = config_lib.to_config_dict(config_lib.Config())
  row = ablations.SUITES["glscl"].rows["scl"]
  config.update_from_flattened_dict(row.overrides)
  config.train.num_steps = STEPS[recipe]
  return config
