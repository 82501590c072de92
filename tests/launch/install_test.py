"""What launch/install.sh says when it cannot go on."""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def clone(tmp_path):
  (tmp_path / "launch").mkdir()
  shutil.copy(ROOT / "launch" / "install.sh", tmp_path / "launch")
  (tmp_path / "setup.py").write_text("")
  return tmp_path


def start(clone, **variables):
  return subprocess.run(
    [shutil.which("bash"), str(clone / "launch" / "install.sh")],
    cwd="/",
    env={**os.environ, **variables},
    stdin=subprocess.DEVNULL,
    capture_output=True,
    text=True,
    timeout=60,
  )


def test_a_machine_without_python_is_told_what_to_install(clone, tmp_path):
  programs = tmp_path / "programs"
  programs.mkdir()
  for name in ("dirname", "cat", "ls", "rm", "rmdir", "tail", "tee"):
    (programs / name).symlink_to(shutil.which(name))
  run = start(clone, PATH=str(programs), PYTHON="")
  assert run.returncode == 1
  assert "no Python 3.11 or newer found" in run.stderr
  assert "PYTHON=/path/to/python3.12" in run.stderr


def test_a_python_that_is_too_old_is_refused(clone, tmp_path):
  old = tmp_path / "python"
  old.write_text("#!/bin/sh\nexit 1\n")
  old.chmod(0o755)
  run = start(clone, PYTHON=str(old))
  assert run.returncode == 1
  assert f"PYTHON={old} is no Python 3.11 or newer" in run.stderr
  assert not (clone / ".venv").exists()


def test_a_folder_that_is_no_environment_is_left_alone(clone):
  (clone / ".venv").mkdir()
  (clone / ".venv" / "mine").write_text("x")
  run = start(clone, PYTHON=sys.executable)
  assert run.returncode == 1
  assert "is no virtual environment; move it away first" in run.stderr
  assert (clone / ".venv" / "mine").read_text() == "x"
