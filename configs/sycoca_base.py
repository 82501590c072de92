"""SyCoCa (2401.02137) at the paper's size: ViT-B/18 at 288 px, CoCa-Base.

`--config=configs/sycoca_base.py:main` (CC12M) or `:ablation` (CC3M), and two
rows of that ablation, `:coca` and `:clip`: the same towers, data and steps
without the image decoder and the attentive mask, and without the caption
decoder too. All start from random parameters.
"""

from glscl_jax import config as config_lib

# (image, caption) pairs, rounded, and epochs over them: 20 of main are the
# paper's, those of the ablation ours [choice].
CC12M, CC3M = (12_400_000, 20), (3_300_000, 20)
RECIPES = {"main": CC12M, "ablation": CC3M, "coca": CC3M, "clip": CC3M}
WARMUP_STEPS = 2000  # [choice]


def get_config(recipe: str = "main"):
  """456.7 M parameters; values and their marks: `sycoca_defaults`."""
  if recipe not in RECIPES:
    raise ValueError(
      f"sycoca_base.py:{recipe}: the recipes are main, ablation, coca and clip"
    )
  pairs, epochs = RECIPES[recipe]
  config = config_lib.to_config_dict(config_lib.sycoca_defaults())
  if recipe in ("coca", "clip"):
    config.objectives.tg_mim = 0.0
    config.masking.ic_mask = False
  if recipe == "clip":
    config.objectives.ic = 0.0
  config.train.num_steps = epochs * pairs // config.data.batch_size
  config.optimizer.warmup_fraction = WARMUP_STEPS / config.train.num_steps
  return config
