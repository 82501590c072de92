"""A small size for smoke runs and tests."""

from glscl_jax import config as config_lib


def get_config(argument: str = ""):
  """64 px, width 128, two layers everywhere, 15.2 M parameters at V=50265."""
  if argument:
    raise ValueError(f"tiny.py:{argument}: this recipe takes no argument")
  config = config_lib.to_config_dict(config_lib.Config())
  config.model.vision.image_size = 64
  config.model.text.max_length = 12
  for part in (config.model.vision, config.model.text, config.model.fusion):
    part.width = 128
    part.depth = 2
  config.model.text.dropout = 0.0
  config.model.fusion.dropout = 0.0
  config.model.compute_dtype = "float32"
  config.model.remat = "none"
  config.data.batch_size = 32
  config.optimizer.learning_rate = 1e-3  # with all multipliers 1 [choice]
  config.optimizer.fusion_multiplier = 1.0
  config.optimizer.head_multiplier = 1.0
  config.train.num_steps = 300
  return config
