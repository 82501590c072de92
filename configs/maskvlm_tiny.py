"""MaskVLM at a small size for smoke runs and tests."""

from glscl_jax import config as config_lib


def get_config(argument: str = ""):
  """64 px, width 128, two layers, 14.8 M parameters at V=50265."""
  if argument:
    raise ValueError(
      f"maskvlm_tiny.py:{argument}: this recipe takes no argument"
    )
  config = config_lib.to_config_dict(config_lib.maskvlm_defaults())
  config.model.vision.image_size = 64
  config.model.text.max_length = 12
  for part in (config.model.vision, config.model.text):
    part.width = 128
    part.depth = 2
  fusion = config.model.fusion
  fusion.width = 128
  fusion.image_depth = fusion.text_depth = fusion.decoder_depth = 1
  fusion.dropout = 0.0
  config.model.text.dropout = 0.0
  config.model.joint_width = 64
  config.model.compute_dtype = "float32"
  config.model.remat = "none"
  config.data.batch_size = 32
  config.optimizer.learning_rate = 1e-3  # with all multipliers 1 [choice]
  config.optimizer.fusion_multiplier = 1.0
  config.optimizer.head_multiplier = 1.0
  config.train.num_steps = 300
  return config
