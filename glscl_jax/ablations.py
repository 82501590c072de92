"""The rows of the papers' ablation tables, as overrides of a system's recipe.

Baselines (METER, ALBEF-like, CoCa, CLIP, UNITER-like) are such rows: a row that
switches an objective off removes its passes and parameters. `configs/` gives
them at the papers' size, `launch/ablate.py` trains them at the quick start's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

from glscl_jax.config import SYSTEM_OBJECTIVES

Value = float | int | str | bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
  """One row: what differs from the system's recipe."""

  title: str
  overrides: Mapping[str, Value] = dataclasses.field(
    default_factory=dict
  )  # path -> value
  paper: str = ""  # what the paper's table says, in the units of its caption


@dataclasses.dataclass(frozen=True, kw_only=True)
class Suite:
  """A table: rows that share recipe, data, start and number of steps."""

  system: str  # and stage of configs/quickstart.py
  unused: tuple[str, ...] = ()  # objectives of weight 0 in the recipe
  towers: str = ""  # stage whose weights all rows start from
  source: str  # of the paper's values
  paper_column: str  # what they are
  expected: str  # the order that the paper finds
  rows: Mapping[str, Row]  # by a name for folders and flags
  splits: tuple[str, ...] = (  # held out, of the quick start's data
    "test_unseen_studio_seen_concept",
    "test_unseen_studio_unseen_concept",
  )

  def has(self, row: Row, objective: str) -> bool:
    """Whether the row trains the objective."""
    path = f"objectives.{objective}"
    if path in row.overrides:
      return row.overrides[path] != 0
    own = SYSTEM_OBJECTIVES[self.system]
    return objective in own and objective not in self.unused


def _off(*objectives: str) -> dict[str, Value]:
  return {f"objectives.{name}": 0.0 for name in objectives}


_COMPLETION = ("mgsc_image", "mgsc_text", "mltc_image", "mltc_text")

_GLSCL = Suite(
  system="glscl",
  towers="glscl_towers",
  source="SCL, 2211.13437; GLSCL, 2306.07096",
  paper_column="paper",
  expected="MLM + ITM + ITC < + MGSC < + MGSC + MLTC",
  rows={
    "meter": Row(
      title="MLM + ITM (METER)", overrides=_off("itc", *_COMPLETION)
    ),
    "meter_itc": Row(title="MLM + ITM + ITC", overrides=_off(*_COMPLETION)),
    "scl": Row(title="+ MGSC (SCL)", overrides=_off("mltc_image", "mltc_text")),
    "glscl": Row(title="+ MGSC + MLTC (GLSCL)"),
  },
)

_MASKVLM = Suite(
  system="maskvlm",
  towers="maskvlm_towers",
  source="MaskVLM, 2208.02131; 50 % of CC3M and COCO, Flickr30k fine-tuned",
  paper_column="paper, IR / TR R@1",
  expected=(
    "ITC < MLM + MIM < ITC + ITM, + MLM, + MIM < all four; the three in the "
    "middle are within 1 of each other"
  ),
  rows={
    "itc": Row(
      title="ITC", overrides=_off("itm", "mlm", "mim"), paper="65.10 / 80.10"
    ),
    "itc_itm": Row(
      title="ITC + ITM", overrides=_off("mlm", "mim"), paper="79.96 / 92.30"
    ),
    "mlm": Row(
      title="ITC + ITM + MLM", overrides=_off("mim"), paper="80.34 / 92.00"
    ),
    "mim": Row(
      title="ITC + ITM + MIM", overrides=_off("mlm"), paper="80.12 / 91.50"
    ),
    "mlm_mim": Row(
      title="MLM + MIM", overrides=_off("itc", "itm"), paper="76.08 / 90.30"
    ),
    "maskvlm": Row(title="all four (MaskVLM)", paper="81.26 / 94.10"),
    "albef_like": Row(
      title="ITC + ITM + MLM of 15 % (ALBEF-like)",
      overrides=_off("mim") | {"masking.mlm_rate": 0.15},
    ),
  },
)

_SYCOCA = Suite(
  system="sycoca",
  source="SyCoCa, 2401.02137; CC3M, zero-shot COCO",
  paper_column="paper, mTR / mIR",
  expected=(
    "ITC < CoCa < CoCa with attentive captions < SyCoCa; TG-MIM of random "
    "patches is worse than CoCa, MIM without text no better"
  ),
  rows={
    "clip": Row(
      title="ITC (CLIP)",
      overrides=_off("ic", "tg_mim") | {"masking.ic_mask": False},
      paper="13.5 / 14.8",
    ),
    "coca": Row(
      title="ITC + IC (CoCa)",
      overrides=_off("tg_mim") | {"masking.ic_mask": False},
      paper="16.1 / 16.0",
    ),
    "coca_attentive": Row(
      title="CoCa, IC without the lower half",
      overrides=_off("tg_mim"),
      paper="17.5 / 18.3",
    ),
    # That IC sees all patches in these three rows is [uncertain].
    "mim_random": Row(
      title="CoCa + MIM without text, random",
      overrides={
        "masking.split": "random",
        "masking.ic_mask": False,
        "model.fusion.mim_text": False,
      },
      paper="15.8 / 16.3",
    ),
    "mim_attentive": Row(
      title="CoCa + MIM without text, attentive",
      overrides={"masking.ic_mask": False, "model.fusion.mim_text": False},
      paper="15.2 / 16.2",
    ),
    "tg_mim_random": Row(
      title="CoCa + TG-MIM, random",
      overrides={"masking.split": "random", "masking.ic_mask": False},
      paper="14.4 / 15.2",
    ),
    "sycoca": Row(title="all, attentive (SyCoCa)", paper="18.3 / 18.4"),
  },
)

_CMAL = Suite(
  system="cmal",
  unused=("mlm", "mrc", "mrfr"),
  source="CMAL, 2410.12595",
  paper_column="paper",
  expected=(
    "AMC and WRC each add to ITM; anchors that name the same do better than "
    "random pairs"
  ),
  rows={
    "itm": Row(title="ITM", overrides=_off("amc", "wrc")),
    "uniter": Row(
      title="ITM + MLM + MRC (UNITER-like)",
      overrides=_off("amc", "wrc")
      | {
        "masking.swap": "none",
        "objectives.mlm": 1.0,  # equal weights [choice]
        "objectives.mrc": 1.0,
      },
    ),
    "itm_wrc": Row(title="ITM + WRC", overrides=_off("amc")),
    "itm_amc": Row(title="ITM + AMC", overrides=_off("wrc")),
    "random": Row(
      title="all three, random anchors", overrides={"masking.anchors": "random"}
    ),
    "cmal": Row(title="all three (CMAL)"),
  },
)

SUITES: Mapping[str, Suite] = MappingProxyType(
  {"glscl": _GLSCL, "maskvlm": _MASKVLM, "sycoca": _SYCOCA, "cmal": _CMAL}
)
