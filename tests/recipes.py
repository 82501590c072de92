"""Every recipe of configs/, with every argument it takes."""

import pathlib

from absl import flags
from ml_collections import config_flags

ROOT = pathlib.Path(__file__).parents[1]

ARGUMENTS = {
  "cmal_base": ("uniter",),
  "glscl_base": ("ablation", "meter", "meter_itc"),
  "maskvlm_base": ("ablation", "albef_like"),
  "scl_base": ("ablation",),
  "sycoca_base": ("ablation", "coca", "clip"),
  "quickstart": ("glscl_towers", "maskvlm_towers", "maskvlm", "sycoca", "cmal"),
}
RECIPES = [
  recipe
  for path in sorted((ROOT / "configs").glob("*.py"))
  for recipe in (
    str(path),
    *(f"{path}:{argument}" for argument in ARGUMENTS.get(path.stem, ())),
  )
]


def golden_name(recipe: str) -> str:
  """The stem of a recipe's golden files."""
  return pathlib.Path(recipe).name.replace(".py", "").replace(":", "_")


def load(recipe: str):
  """The ConfigDict of a recipe, "FILE" or "FILE:ARGUMENT"."""
  values = flags.FlagValues()
  arguments = ["train.py", f"--config={recipe}"]
  holder = config_flags.DEFINE_config_file(
    "config", lock_config=True, flag_values=values, sys_argv=arguments
  )
  values(arguments)
  return holder.value
