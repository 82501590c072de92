"""A tiny real data directory and recipe, and a way to run the launcher."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import io
import itertools
import json
import os
import pathlib
import textwrap
from collections.abc import Callable, Iterator

import cv2
import numpy as np
import pytest

from glscl_jax.data import prepare
from launch import train as launcher
from tests.end_to_end import child

ROOT = pathlib.Path(launcher.__file__).parents[1]
NUM_STEPS = 60
RECIPE_NAME = "recipe.py"

COLORS = {"red": (0, 0, 200), "green": (0, 200, 0), "blue": (200, 0, 0)}
SHAPES = ("square", "disc", "bar")
SIZES = {"small": 4, "medium": 6, "large": 9}  # medium: validation


@dataclasses.dataclass(frozen=True)
class Result:
  code: int
  out: str
  err: str


@dataclasses.dataclass(frozen=True)
class Project:
  """A prepared data directory, and a recipe that trains on it."""

  data: pathlib.Path
  recipe: pathlib.Path

  def command(self, workdir: pathlib.Path, *extra: str) -> list[str]:
    return [
      "launch/train.py",
      f"--config={self.recipe}",
      f"--workdir={workdir}",
      *extra,
    ]

  def run(self, workdir: pathlib.Path, *extra: str) -> Result:
    """The launcher in this process: exit code and what it printed."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
      code = launcher.main(self.command(workdir, *extra))
    return Result(code, out.getvalue(), err.getvalue())


def draw(color: tuple[int, int, int], shape: str, size: str) -> bytes:
  """A PNG of 24 x 24 pixels."""
  image_YXC = np.full((24, 24, 3), 255, np.uint8)
  radius = SIZES[size]
  if shape == "disc":
    cv2.circle(image_YXC, (12, 12), radius, color, -1)
  else:
    height = radius if shape == "square" else 2
    cv2.rectangle(
      image_YXC, (12 - radius, 12 - height), (12 + radius, 12 + height), color,
      -1,
    )  # fmt: skip
  return cv2.imencode(".png", image_YXC)[1].tobytes()


def make_data(folder: pathlib.Path) -> pathlib.Path:
  """Prepares 18 pairs for training and 9 for validation, by the real code."""
  lines = []
  for (color, pixel), shape, size in itertools.product(
    COLORS.items(), SHAPES, SIZES
  ):
    name = f"{size}-{color}-{shape}"
    (folder / f"{name}.png").write_bytes(draw(pixel, shape, size))
    lines.append(
      {
        "image": f"{name}.png",
        "caption": f"a {size} {color} {shape} on white paper",
        "id": name,
        "split": "val" if size == "medium" else "train",
      }
    )
  path = folder / "pairs.jsonl"
  path.write_text("\n".join(map(json.dumps, lines)) + "\n")
  prepare.prepare_jsonl(
    folder / "data", path=path, vocabulary=prepare.Vocabulary(size=80)
  )
  return folder / "data"


RECIPE = """
    from glscl_jax import config as config_lib

    def get_config(arg=""):
      c = config_lib.to_config_dict(config_lib.Config())
      c.data.dir = {data!r}
      c.data.batch_size = 8
      c.data.num_threads = 1
      c.data.prefetch = 2
      c.data.augment.crop_scale = (0.9, 1.0)
      c.model.vision.image_size = 16
      c.model.vision.patch_size = 4
      c.model.text.vocab_size = {vocab_size}
      c.model.text.max_length = 12
      c.model.text.num_positions = 14
      for tower in (c.model.vision, c.model.text, c.model.fusion):
        tower.width = 64
        tower.depth = 1
      c.model.joint_width = 16
      c.model.compute_dtype = "float32"
      c.model.scan = False
      c.model.remat = "none"
      for name in ("mgsc_image", "mgsc_text", "mltc_image", "mltc_text"):
        c.objectives[name] = 0.0
      c.objectives.neg_group = 8
      c.objectives.mltc_image_group = 8
      c.objectives.mltc_text_group = 8
      c.optimizer.learning_rate = 1e-3
      c.train.num_steps = {num_steps}
      c.train.log_every = 1
      c.train.save_every = 3
      return c
"""


def make_project(folder: pathlib.Path) -> None:
  data = make_data(folder)
  vocab_size = json.loads((data / "manifest.json").read_text())["tokenizer"][
    "vocab_size"
  ]
  (folder / RECIPE_NAME).write_text(
    textwrap.dedent(RECIPE).format(
      data=str(data), vocab_size=vocab_size, num_steps=NUM_STEPS
    )
  )


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> pathlib.Path:
  """A folder that all processes of this run of the suite see."""
  base = tmp_path_factory.getbasetemp()
  if "PYTEST_XDIST_WORKER" in os.environ:
    base = base.parent
  folder = base / "end_to_end"
  folder.mkdir(exist_ok=True)
  return folder


@contextlib.contextmanager
def alone(folder: pathlib.Path) -> Iterator[None]:
  """Holds the lock of a folder; a process that dies gives it back."""
  with (folder / "lock").open("w") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    yield


@pytest.fixture(scope="session")
def project(shared) -> Project:
  """Made by the first process that needs it."""
  folder = shared / "project"
  with alone(shared):
    if not (folder / RECIPE_NAME).exists():
      folder.mkdir(exist_ok=True)
      make_project(folder)
  return Project(folder / "data", folder / RECIPE_NAME)


@dataclasses.dataclass(frozen=True)
class Trained:
  """A finished, undisturbed run of NUM_STEPS, validated twice."""

  project: Project
  workdir: pathlib.Path
  flags: tuple[str, ...]
  output: str


@pytest.fixture(scope="session")
def starter(shared) -> Iterator[child.Starter]:
  """Starts the launcher on one device; all share a compilation cache."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("PYTHONPATH", str(ROOT))
    patch.setenv("JAX_COMPILATION_CACHE_DIR", str(shared / "cache"))
    patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    patch.setenv("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
    yield child.Starter()


@pytest.fixture(scope="session")
def start(project, starter) -> Callable[..., child.Child]:
  """A function (workdir, *flags) that starts the recipe."""
  return lambda workdir, *flags: starter(
    project.command(workdir, *flags), workdir
  )


@pytest.fixture(scope="session")
def trained(project, start, shared) -> Trained:
  """Made by the first process that needs it, while the others wait."""
  workdir = shared / "trained" / "work"
  output = workdir.with_name("output.txt")
  flags = (
    f"--config.train.eval_every={NUM_STEPS // 2}",
    "--config.train.eval_splits=val",
  )
  with alone(shared):
    if not output.exists():
      workdir.parent.mkdir(exist_ok=True)
      output.write_text(start(workdir, *flags).finish())
  return Trained(project, workdir, flags, output.read_text())
