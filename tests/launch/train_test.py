"""How launch/train.py starts."""

import os
import pathlib
import subprocess
import sys

import pytest
from absl import flags

from launch import train

ROOT = pathlib.Path(__file__).resolve().parents[2]
JOIN = "--xla_backend_extra_options=xla_cpu_use_multi_output_fusion"
START = """
import os, runpy, sys

def begin_anew(program, arguments):
  print(*{"jax", "flax", "grain", "numpy"} & set(sys.modules))
  print(os.environ["XLA_FLAGS"])
  sys.exit(7)

os.execv = begin_anew
exists = os.path.exists
os.path.exists = lambda path: not str(path).startswith("/dev/") and exists(path)
os.environ.pop("GLIBC_TUNABLES", None)
runpy.run_path("launch/train.py", run_name="__main__")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a glibc tunable")
@pytest.mark.parametrize(
  ("asked", "found"),
  [
    ("", [JOIN]),
    ("--xla_dump_to=x", ["--xla_dump_to=x", JOIN]),
    ("--xla_backend_extra_options=x", ["--xla_backend_extra_options=x"]),
  ],
)
def test_the_process_begins_anew_before_it_imports_what_is_slow(asked, found):
  done = subprocess.run(
    [sys.executable, "-c", START],
    capture_output=True,
    text=True,
    timeout=60,
    cwd=ROOT,
    env={**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": asked},
    check=False,
  )
  assert done.returncode == 7, done.stderr
  slow, flags = done.stdout.splitlines()
  assert not slow
  assert flags.split() == found


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
