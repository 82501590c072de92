"""CMAL at a small size for smoke runs and tests."""

from glscl_jax import config as config_lib


def get_config(argument: str = ""):
  """8 regions, width 128, two layers, 4.5 M parameters at V=28996."""
  if argument:
    raise ValueError(f"cmal_tiny.py:{argument}: this recipe takes no argument")
  config = config_lib.to_config_dict(config_lib.cmal_defaults())
  config.model.region.number = 8
  config.model.region.feature_width = 64
  config.model.text.max_length = 12
  config.model.text.width = 128
  config.model.text.dropout = 0.0
  config.model.fusion.width = 128
  config.model.fusion.depth = 2
  config.model.fusion.dropout = 0.0
  config.model.compute_dtype = "float32"
  config.model.remat = "none"
  config.data.batch_size = 32
  config.optimizer.learning_rate = 1e-3  # [choice]
  config.train.num_steps = 300
  return config
