import os
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import shape_suffixes


def watched(function, *args):
  with shape_suffixes.watch(__file__) as found:
    function(*args)
  return list(found.mistakes)


def swapped(x_BT):
  y_TB = x_BT  # a forgotten transpose
  return y_TB.sum()


def good(x_BT):
  y_TB = x_BT.T
  total = y_TB.sum()
  mask_B11T = x_BT[:, None, None, :]
  return total + mask_B11T.sum()


def test_right_names_pass():
  assert watched(good, np.zeros((2, 3))) == []


def test_one_letter_with_two_sizes_is_named():
  (first, second) = watched(swapped, np.zeros((2, 3)))
  assert "swapped: B has several sizes: 2 in x_BT, 3 in y_TB" in first
  assert "swapped: T has several sizes: 3 in x_BT, 2 in y_TB" in second
  assert __file__ in first


def test_a_wrong_rank_is_named():
  (mistake,) = watched(good, np.zeros((2, 3, 1)))[:1]
  assert "x_BT has rank 3, shape (2, 3, 1)" in mistake


def test_a_scalar_under_a_suffix_is_named():
  def reduce(x_B):
    sum_B = x_B.sum()
    return sum_B

  (mistake,) = watched(reduce, np.zeros(3))
  assert "sum_B has rank 0" in mistake


def test_a_digit_is_a_size():
  def pair(x_B2):
    return x_B2

  assert watched(pair, np.zeros((5, 2))) == []
  (mistake,) = watched(pair, np.zeros((5, 3)))
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
  right, wrong = (types.FunctionType(f.__code__, {}) for f in (good, swapped))
  x = jnp.zeros((2, 3))
  assert watched(transform(right), x) == []
  assert len(watched(transform(wrong), x)) == 2


def test_variables_captured_by_an_inner_function_are_checked():
  def outer(x_BT):
    y_B = x_BT  # wrong, and a cell variable

    def inner():
      return y_B

    return inner()

  assert "y_B has rank 2" in watched(outer, np.zeros((2, 3)))[0]


def test_inputs_that_a_function_refuses_are_not_reported():
  def refuse(x_BT):
    raise ValueError("rank")

  with shape_suffixes.watch(__file__) as found:
    with pytest.raises(ValueError, match="rank"):
      refuse(np.zeros(3))
  assert not found.mistakes


def test_names_without_a_shape_suffix_are_free():
  def free(B, x_1):
    x_b, LIMIT, y_BT = B, x_1, None
    return x_b, LIMIT, y_BT

  assert watched(free, np.zeros((2, 3)), np.zeros(3)) == []


def test_other_files_are_not_checked():
  with shape_suffixes.watch(__file__ + ".other") as found:
    swapped(np.zeros((2, 3)))
  assert not found.mistakes
  assert found.num_calls == 0


def test_each_mistake_is_reported_once():
  with shape_suffixes.watch(__file__) as found:
    for _ in range(3):
      swapped(np.zeros((2, 3)))
  assert len(found.mistakes) == 2
  assert found.num_calls == 3


PLANTED = """
import pathlib
import glscl_jax
import numpy as np

FILE = pathlib.Path(glscl_jax.__file__).parent / "planted.py"
SOURCE = "def attend(x_BHLM):\\n  y_BHML = x_BHLM\\n  return y_BHML\\n"
names = {}
exec(compile(SOURCE, str(FILE), "exec"), names)


def test_planted():
  names["attend"](np.zeros((1, 2, 3, 4)))
"""


def test_a_mistake_in_the_package_fails_the_test_that_meets_it(tmp_path):
  (tmp_path / "planted_test.py").write_text(PLANTED)
  root = pathlib.Path(__file__).parents[1]
  command = [sys.executable, "-m", "pytest", "-q", "-c", "pyproject.toml"]
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
