"""Mistakes in the command line of launch/bench.py."""

import importlib.util

import pytest

from launch import bench


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ((), "--config is missing"),
    (("--config=configs/none.py",), "--config=configs/none.py: [Errno 2]"),
    (("--config=configs/quickstart.py:x",), "quickstart.py:x: the stages are"),
    (
      ("--config=configs/tiny.py", "--config.data.bach_size=3"),
      "config.data.bach_size: unknown key; did you mean config.data.batch_size",
    ),
    (("--config=configs/tiny.py", "--steps=0"), "--steps=0"),
    (("--config=configs/tiny.py",), "config.data.dir is empty"),
  ],
)
def test_mistakes_end_with_one_line(arguments, message, capsys):
  assert bench.main(["launch/bench.py", *arguments]) == 2
  err = capsys.readouterr().err
  assert err.startswith("error: ") and message in err
  assert len(err.splitlines()) == 1


def test_what_pytorch_cannot_be_timed_on_is_said_at_once(monkeypatch, capsys):
  def run(recipe):
    arguments = (f"--config=configs/{recipe}.py", "--against=torch")
    assert bench.main(["launch/bench.py", *arguments]) == 2
    return capsys.readouterr().err

  find = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util,
    "find_spec",
    lambda name: None if name == "torch" else find(name),
  )
  assert "PyTorch is not installed; pip install torch" in run("tiny")
  monkeypatch.setattr(
    importlib.util,
    "find_spec",
    lambda name: find("json" if name == "torch" else name),
  )
  assert "PyTorch's step is that of system=glscl" in run("maskvlm_tiny")
