"""SyCoCa at a small size for smoke runs and tests."""

from glscl_jax import config as config_lib


def get_config(argument: str = ""):
  """64 px, width 128, two layers, 14.7 M parameters at V=49408."""
  if argument:
    raise ValueError(
      f"sycoca_tiny.py:{argument}: this recipe takes no argument"
    )
  config = config_lib.to_config_dict(config_lib.sycoca_defaults())
  config.model.vision.image_size = 64
  config.model.vision.patch_size = 16
  config.model.text.max_length = 12
  config.model.text.num_positions = 13
  for part in (config.model.vision, config.model.text):
    part.width = 128
    part.depth = 2
  config.model.fusion.width = 128
  config.model.fusion.text_depth = 2
  config.model.fusion.image_depth = 1
  config.model.joint_width = 64
  config.model.compute_dtype = "float32"
  config.model.remat = "none"
  config.data.batch_size = 32
  config.optimizer.learning_rate = 1e-3  # [choice]
  config.train.num_steps = 300
  return config
