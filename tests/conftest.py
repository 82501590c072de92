"""What every test gets: eight CPU devices, strict shapes, golden files."""

from __future__ import annotations

import importlib.metadata
import os
import pathlib

# Before jax is imported anywhere. Processes that a test starts inherit it.
os.environ["JAX_PLATFORMS"] = "cpu"
# Most programs are small and run a few times: compiling them well costs more
# than it saves. Flags from outside come last and win.
os.environ["XLA_FLAGS"] = " ".join(
  (
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    # The older code generation takes two thirds of the time. jaxlib 0.12 has it
    # no more, and ends where it reads a flag that it does not know.
    "--xla_cpu_use_fusion_emitters=false"
    if importlib.metadata.version("jaxlib").startswith("0.10.")
    else "",
    os.environ.get("XLA_FLAGS", ""),
  )
)

import jax
import pytest
from absl import flags

from tests import shape_suffixes

shape_suffixes.install("glscl_jax")

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = str(ROOT / "glscl_jax") + os.sep
GOLDEN = ROOT / "tests" / "golden"

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
# grain reads a flag when it starts workers, and no absl app parses it here.
flags.FLAGS.mark_as_parsed()


def pytest_addoption(parser):
  parser.addoption(
    "--golden-dir",
    type=pathlib.Path,
    default=GOLDEN,
    help="folder of reference numbers for tests/parity, one sub-folder a mode",
  )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
  with shape_suffixes.watch(PACKAGE) as found:
    yield
  _fail_on(found)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
  with shape_suffixes.watch(PACKAGE) as found:
    yield
  _fail_on(found)


def _fail_on(found: shape_suffixes.Watch) -> None:
  if found.mistakes:
    pytest.fail(
      "names and shapes of arrays disagree:\n  " + "\n  ".join(found.mistakes),
      pytrace=False,
    )


@pytest.fixture
def key():
  return jax.random.key(0)


@pytest.fixture(scope="session")
def golden_dir(request) -> pathlib.Path:
  """The folder of reference numbers: tests/golden, or --golden-dir."""
  return request.config.getoption("--golden-dir")


@pytest.fixture(scope="session")
def check_golden():
  """A function (path below tests/golden, text): equal, or rewritten.

  UPDATE_GOLDEN=1 writes the file instead. Look at the diff before committing.
  """

  def check(name: str, text: str) -> None:
    path = GOLDEN / name
    if os.environ.get("UPDATE_GOLDEN"):
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_text(text)
    assert path.exists(), f"no {path}; UPDATE_GOLDEN=1 pytest writes it"
    assert path.read_text() == text, (
      f"{path} differs; if that is meant, UPDATE_GOLDEN=1 pytest rewrites it"
    )

  return check
