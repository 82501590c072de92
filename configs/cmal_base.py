"""CMAL (2410.12595) at the paper's size: 36 regions an image, BERT-base-cased.

`--config=configs/cmal_base.py:main` (COCO and VG), or a row of the ablation,
such as `:uniter`, the same model without anchors, with ITM, MLM and region
classes. The paper
starts from BERT-base-cased; here parameters are random unless
`train.init_from` names a work dir or an export of this package.
"""

from glscl_jax import ablations
from glscl_jax import config as config_lib

ROWS = ablations.SUITES["cmal"].rows
NUM_STEPS, WARMUP_STEPS = 200_000, 10_000  # [code]


def get_config(recipe: str = "main"):
  """112.3 M parameters; values and their marks: `cmal_defaults`."""
  if recipe not in {"main"} | ROWS.keys():
    raise ValueError(
      f"cmal_base.py:{recipe}: the recipes are main, {', '.join(ROWS)}"
    )
  config = config_lib.to_config_dict(config_lib.cmal_defaults())
  if recipe in ROWS:
    config.update_from_flattened_dict(ROWS[recipe].overrides)
  config.train.num_steps = NUM_STEPS
  config.optimizer.warmup_fraction = WARMUP_STEPS / NUM_STEPS
  return config
