"""How launch/train.py starts."""

import os
import pathlib
import subprocess
import sys

import pytest
from absl import flags

from launch import train

ROOT = pathlib.Path(__file__).resolve().parents[2]
START = """
import os, runpy, sys

def begin_anew(program, arguments):
  print(*{"jax", "flax", "grain", "numpy"} & set(sys.modules))
  sys.exit(7)

os.execv = begin_anew
exists = os.path.exists
os.path.exists = lambda path: not str(path).startswith("/dev/") and exists(path)
os.environ.pop("GLIBC_TUNABLES", None)
runpy.run_path("launch/train.py", run_name="__main__")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a glibc tunable")
def test_the_process_begins_anew_before_it_imports_what_is_slow():
  done = subprocess.run(
    [sys.executable, "-c", START],
    capture_output=True,
    text=True,
    timeout=60,
    cwd=ROOT,
    env={**os.environ, "PYTHONPATH": str(ROOT)},
    check=False,
  )
  assert done.returncode == 7, done.stderr
  assert done.stdout == "\n"


def test_compile_without_a_dry_run_is_refused(tmp_path):
  arguments = ["launch/train.py", f"--workdir={tmp_path}", "--compile"]
  arguments.append(f"--config={ROOT / 'configs' / 'tiny.py'}")
  assert train.parse([*arguments, "--dry_run"]).compile
  with pytest.raises(flags.Error, match="--compile goes with --dry_run"):
    train.parse(arguments)


def test_a_dry_run_of_several_processes_is_refused(tmp_path):
  arguments = ["launch/train.py", f"--workdir={tmp_path}", "--dry_run"]
  arguments.append(f"--config={ROOT / 'configs' / 'tiny.py'}")
  with pytest.raises(flags.Error, match="--dry_run looks at one process"):
    train.parse([*arguments, "--num_processes=2"])
