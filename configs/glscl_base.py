"""GLSCL at the paper's size: ViT-B/16 at 288 px, RoBERTa-base, 6+6 fusion.

`--config=configs/glscl_base.py:ablation` (COCO + VG, 15,000 steps) or `:main`
(COCO + VG + SBU + CC3M, 100,000 steps), or a row of the ablation: `:meter`,
`:meter_itc`, `:scl`. The paper starts from CLIP ViT-B/16 and RoBERTa-base; here
parameters are random unless `train.init_from` names a work dir or an export of
this package.
"""

from glscl_jax import ablations
from glscl_jax import config as config_lib

STEPS = {"ablation": 15_000, "main": 100_000}  # code: SCL@cd0d819
ROWS = ablations.SUITES["glscl"].rows


def get_config(recipe: str = "main"):
  """The defaults of glscl_jax/config.py are this system's paper values."""
  if recipe not in STEPS | ROWS:
    raise ValueError(
      f"glscl_base.py:{recipe}: the recipes are {', '.join(STEPS | ROWS)}"
    )
  config = config_lib.to_config_dict(config_lib.Config())
  if recipe in ROWS:
    config.update_from_flattened_dict(ROWS[recipe].overrides)
    recipe = "ablation"
  config.train.num_steps = STEPS[recipe]
  return config
