"""MaskVLM (2208.02131) at the paper's size: ViT-B/16 at 224 px, RoBERTa-base.

`--config=configs/maskvlm_base.py:main` (COCO, VG, SBU, CC3M) or `:ablation`
(COCO and half of CC3M), or a row of that ablation, such as `:itc_itm` and
`:albef_like`. The paper starts from ImageNet's ViT-B/16 and
RoBERTa-base; here parameters are random unless `train.init_from` names a work
dir or an export of this package.
"""

from glscl_jax import ablations
from glscl_jax import config as config_lib

# (image, caption) pairs, rounded, and epochs over them. Main is [uncertain];
# the ablation's data and epochs are the paper's.
RECIPES = {"main": (5_100_000, 50), "ablation": (2_070_000, 30)}
WARMUP_EPOCHS = 5  # [uncertain]
ROWS = ablations.SUITES["maskvlm"].rows


def get_config(recipe: str = "main"):
  """335 M parameters; values and their marks: `maskvlm_defaults`."""
  if recipe not in RECIPES | ROWS:
    raise ValueError(
      f"maskvlm_base.py:{recipe}: the recipes are {', '.join(RECIPES | ROWS)}"
    )
  config = config_lib.to_config_dict(config_lib.maskvlm_defaults())
  if recipe in ROWS:
    config.update_from_flattened_dict(ROWS[recipe].overrides)
    recipe = "ablation"
  pairs, epochs = RECIPES[recipe]
  config.train.num_steps = epochs * pairs // config.data.batch_size
  config.optimizer.warmup_fraction = WARMUP_EPOCHS / epochs
  return config
