"""Mistakes in the command line of launch/compile.py."""

import jax
import pytest

from glscl_jax.train import ahead_of_time
from launch import compile as command

TINY = "--config=configs/tiny.py"


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ((), "--config is missing"),
    ((TINY,), "--topology is missing"),
    ((TINY, "--topology=v5e-256"), "--topology=v5e-256: no such name; v4:4x4"),
    (
      (TINY, "--topology=v5e:2x2", "--config.mesh.data_=2"),
      "config.mesh.data_: unknown key; did you mean config.mesh.data",
    ),
    ((TINY, "--topology=v5e:2x2", "--output=tests"), "--output=tests is a"),
  ],
)
def test_mistakes_end_with_one_line(arguments, message, capsys):
  assert command.main(["launch/compile.py", *arguments]) == 2
  err = capsys.readouterr().err
  assert err.startswith("error: ") and message in err
  assert len(err.splitlines()) == 1


def test_overrides_reach_the_plan_and_files_are_written(
  tmp_path, monkeypatch, capsys
):
  asked = []

  class Plan:
    def to_json(self):
      return "{}"

  def compile_ahead(config, topology):
    asked.append((config.data.batch_size, config.mesh.fsdp, topology))
    return Plan(), "HloModule"

  monkeypatch.setattr(ahead_of_time, "compile_ahead", compile_ahead)
  monkeypatch.setattr(ahead_of_time, "format_plan", lambda plan: "the plan")
  arguments = (
    TINY,
    "--topology=v6e:4x4",
    "--config.data.batch_size=64",
    "--config.mesh.fsdp=4",
    f"--output={tmp_path / 'a.json'}",
    f"--program={tmp_path / 'a.txt'}",
  )
  assert command.main(["launch/compile.py", *arguments]) == 0
  assert asked == [(64, 4, "v6e:4x4")]
  assert capsys.readouterr().out == "the plan\n"
  assert (tmp_path / "a.json").read_text() == "{}\n"
  assert (tmp_path / "a.txt").read_text() == "HloModule"


def test_a_mesh_that_does_not_fit_the_topology_is_an_error(monkeypatch, capsys):
  monkeypatch.setattr(
    ahead_of_time, "find_devices", lambda topology: jax.devices()
  )
  arguments = (TINY, "--topology=v5e:2x4", "--config.mesh.fsdp=3")
  assert command.main(["launch/compile.py", *arguments]) == 2
  assert "config.mesh: data x fsdp x tensor" in capsys.readouterr().err
