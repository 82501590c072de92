"""SyCoCa (2401.02137) at the paper's size: ViT-B/18 at 288 px, CoCa-Base.

`--config=configs/sycoca_base.py:main` (CC12M) or `:ablation` (CC3M), or a row
of that ablation, such as `:coca` and `:clip`: the same towers, data and steps
without the image decoder and the attentive mask, and without the caption
decoder too. All start from random parameters.
"""

from glscl_jax import ablations
from glscl_jax import config as config_lib

# (image, caption) pairs, rounded, and epochs over them: 20 of main are the
# paper's, those of the ablation ours [choice].
RECIPES = {"main": (12_400_000, 20), "ablation": (3_300_000, 20)}
WARMUP_STEPS = 2000  # [choice]
ROWS = ablations.SUITES["sycoca"].rows


def get_config(recipe: str = "main"):
  """456.7 M parameters; values and their marks: `sycoca_defaults`."""
  if recipe not in RECIPES | ROWS:
    raise ValueError(
      f"sycoca_base.py:{recipe}: the recipes are {', '.join(RECIPES | ROWS)}"
    )
  config = config_lib.to_config_dict(config_lib.sycoca_defaults())
  if recipe in ROWS:
    config.update_from_flattened_dict(ROWS[recipe].overrides)
    recipe = "ablation"
  pairs, epochs = RECIPES[recipe]
  config.train.num_steps = epochs * pairs // config.data.batch_size
  config.optimizer.warmup_fraction = WARMUP_STEPS / config.train.num_steps
  return config
