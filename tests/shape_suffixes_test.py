import importlib.util
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glscl_jax.models import products
from tests import shape_suffixes

EXAMPLES = pathlib.Path(__file__).with_name("shape_examples.py")


def load_examples():
  name = EXAMPLES.stem
  spec = importlib.util.spec_from_file_location(
    name, EXAMPLES, loader=shape_suffixes.Loader(name, str(EXAMPLES))
  )
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


examples = load_examples()


def watched(function, *args):
  with shape_suffixes.watch(str(EXAMPLES)) as found:
    function(*args)
  return list(found.mistakes)


def test_right_names_pass():
  assert watched(examples.good, np.zeros((2, 3))) == []


def test_one_letter_with_two_sizes_is_named():
  (first, second) = watched(examples.swapped, np.zeros((2, 3)))
  assert "swapped: B has several sizes: 2 in x_BT, 3 in y_TB" in first
  assert "swapped: T has several sizes: 3 in x_BT, 2 in y_TB" in second
  assert str(EXAMPLES) in first


def test_a_wrong_rank_is_named():
  (mistake,) = watched(examples.good, np.zeros((2, 3, 1)))[:1]
  assert "x_BT has rank 3, shape (2, 3, 1)" in mistake


def test_a_scalar_under_a_suffix_is_named():
  (mistake,) = watched(examples.reduced, np.zeros(3))
  assert "sum_B has rank 0" in mistake


def test_a_digit_is_a_size():
  assert watched(examples.pair, np.zeros((5, 2))) == []
  (mistake,) = watched(examples.pair, np.zeros((5, 3)))
  assert "x_B2 has shape (5, 3), not 2" in mistake


@pytest.mark.parametrize(
  "transform",
  [
    jax.jit,
    jax.grad,
    lambda f: lambda x: jax.eval_shape(f, x),
    lambda f: lambda x: jax.vmap(f)(x[None]),
    lambda f: lambda x: jax.lax.map(f, x[None]),
    lambda f: jax.jit(jax.checkpoint(f)),
  ],
  ids=["jit", "grad", "eval_shape", "vmap", "scan", "remat"],
)
def test_tracers_are_checked_under(transform):
  # New functions, since jax traces one it has seen only once.
  new = load_examples()
  x = jnp.zeros((2, 3))
  assert watched(transform(new.good), x) == []
  assert len(watched(transform(new.swapped), x)) == 2


def test_variables_captured_by_an_inner_function_are_checked():
  assert "y_B has rank 2" in watched(examples.captured, np.zeros((2, 3)))[0]


@pytest.mark.parametrize("name", ["stores", "returns_early", "short"])
def test_every_kind_of_return_is_seen(name):
  function = getattr(examples, name)
  more = [[]] if name == "stores" else []
  (mistake,) = watched(function, np.zeros((2, 3)), *more)
  assert f"{function.__name__}: " in mistake and "_B has rank 2" in mistake


def test_inputs_that_a_function_refuses_are_not_reported():
  with shape_suffixes.watch(str(EXAMPLES)) as found:
    with pytest.raises(ValueError, match="rank"):
      examples.refuse(np.zeros(3))
  assert not found.mistakes


def test_names_without_a_shape_suffix_are_free():
  assert watched(examples.free, np.zeros((2, 3)), np.zeros(3)) == []


def test_other_files_are_not_checked():
  with shape_suffixes.watch(str(EXAMPLES) + ".other") as found:
    examples.swapped(np.zeros((2, 3)))
  assert not found.mistakes
  assert found.num_calls == 0


def test_each_mistake_is_reported_once():
  with shape_suffixes.watch(str(EXAMPLES)) as found:
    for _ in range(3):
      examples.swapped(np.zeros((2, 3)))
  assert len(found.mistakes) == 2
  assert found.num_calls == 3


PLANTED = """
import importlib.util
import pathlib
import glscl_jax
import numpy as np

NAME = "glscl_jax.planted"
FILE = str(pathlib.Path(glscl_jax.__file__).parent / "planted.py")


class Loader(type(glscl_jax.__spec__.loader)):
  def get_data(self, path):
    return b"def attend(x_BHLM):\\n  y_BHML = x_BHLM\\n  return y_BHML\\n"


spec = importlib.util.spec_from_file_location(
  NAME, FILE, loader=Loader(NAME, FILE)
)
planted = importlib.util.module_from_spec(spec)
spec.loader.exec_module(planted)


def test_planted():
  planted.attend(np.zeros((1, 2, 3, 4)))
"""


def test_every_module_of_the_package_is_watched():
  loaded = [
    module
    for name, module in sys.modules.items()
    if name.partition(".")[0] == "glscl_jax"
  ]
  assert products in loaded
  for module in loaded:
    assert isinstance(module.__spec__.loader, shape_suffixes.Loader), module


def test_a_mistake_in_the_package_fails_the_test_that_meets_it(tmp_path):
  (tmp_path / "planted_test.py").write_text(PLANTED)
  root = pathlib.Path(__file__).parents[1]
  command = [
    sys.executable,
    "-m",
    "pytest",
    "-q",
    "-n0",
    "-c",
    "pyproject.toml",
  ]
  plugin = ["-p", "tests.conftest", str(tmp_path), "--rootdir", str(tmp_path)]
  run = subprocess.run(
    [*command, *plugin],
    cwd=root,
    env={**os.environ, "PYTHONPATH": str(root)},
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert run.returncode == 1, run.stdout + run.stderr
  assert "names and shapes of arrays disagree" in run.stdout
  assert "L has several sizes: 3 in x_BHLM, 4 in y_BHML" in run.stdout
