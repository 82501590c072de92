"""The stages of launch/quickstart.sh, around programs that do no work."""

import importlib
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]

# Notes each start, fails on demand, and writes what the real one writes.
PROGRAM = """
import os, pathlib, sys
name = pathlib.Path(sys.argv[0]).stem
options = dict(a.lstrip("-").split("=", 1) for a in sys.argv[1:] if "=" in a)
with open("starts", "a") as file:
  print(name, *sys.argv[1:], file=file)
work = pathlib.Path(options["workdir"] if "workdir" in options else ".")
made = {
  "prepare": pathlib.Path(options["output"] if "output" in options else "."),
  "train": work / "checkpoints",
  "evaluate": work / "eval" / "retrieval",
  "export": work / "export",
  "report": work,
}[name]
made.mkdir(parents=True, exist_ok=True)
if os.environ["FAIL"] == name:
  (made / "half").write_text("x")
  sys.exit(int(os.environ["CODE"]))
if name == "train":
  (work / "config.json").write_text("{}")
files = {"prepare": "manifest.json", "report": "report.html"}
(made / (files[name] if name in files else "result")).write_text(name)
"""


@pytest.fixture
def clone(tmp_path):
  """A folder with the script, one recipe, and stand-ins for the rest."""
  launch = tmp_path / "launch"
  launch.mkdir()
  shutil.copy(ROOT / "launch" / "quickstart.sh", launch)
  (launch / "install.sh").write_text(
    f'mkdir -p .venv/bin\nln -sf "{sys.executable}" .venv/bin/python\n'
  )
  for name in ("prepare", "train", "evaluate", "export", "report"):
    (launch / f"{name}.py").write_text(PROGRAM)
  (tmp_path / "configs").mkdir()
  (tmp_path / "configs" / "quickstart.py").write_text("# recipe\n")
  return tmp_path


def start(clone, *arguments, fail="", code=130, cwd=None):
  """Runs the script; returns the process and the programs it started."""
  (clone / "starts").write_text("")
  run = subprocess.run(
    ["bash", str(clone / "launch" / "quickstart.sh"), *arguments],
    cwd=cwd or clone,
    env={**os.environ, "FAIL": fail, "CODE": str(code)},
    stdin=subprocess.DEVNULL,
    capture_output=True,
    text=True,
    timeout=60,
  )
  lines = (clone / "starts").read_text().splitlines()
  return run, [line.split()[0] for line in lines], lines


# Training has two stages: the towers, then GLSCL.
ALL = ["prepare", "train", "train", "evaluate", "export", "report"]


def test_a_first_start_runs_every_stage_and_shows_the_time_of_each(clone):
  run, started, _ = start(clone)
  assert run.returncode == 0, run.stderr
  assert started == ALL
  assert (clone / "runs/quickstart-seed0/report.html").exists()
  for part in ("install", "data", "training", "evaluation", "report", "total"):
    assert f"\n  {part:<10} " in run.stdout


def test_every_program_takes_the_arguments_it_is_started_with(
  clone, monkeypatch
):
  _, _, lines = start(clone)
  assert len(lines) == len(ALL)
  monkeypatch.chdir(ROOT)  # where the recipe is
  for line in lines:
    name, *arguments = line.split()
    launcher = importlib.import_module(f"launch.{name}")
    launcher.parse([f"launch/{name}.py", *arguments])


def test_a_second_start_makes_nothing_again(clone):
  start(clone)
  run, started, _ = start(clone)
  assert run.returncode == 0
  assert started == ["prepare"]  # which checks its directory by itself
  assert run.stdout.count("whole already") == 5


@pytest.mark.parametrize("name", sorted(set(ALL)))
def test_a_stage_that_was_stopped_is_the_first_of_the_next_start(clone, name):
  run, started, _ = start(clone, fail=name)
  assert run.returncode == 130
  assert "the same command continues" in run.stderr
  assert started[-1] == name
  run, started, _ = start(clone)
  assert run.returncode == 0
  again = ALL if name == "prepare" else ["prepare", *ALL[ALL.index(name) :]]
  assert started == again


@pytest.mark.parametrize(
  ("path", "again", "damage"),
  [
    ("checkpoints/result", ["train"], "cut"),
    ("towers/checkpoints/result", ["train"], "removed"),
    ("eval/retrieval/result", ["evaluate"], "removed"),
    ("export/result", ["export"], "cut"),
    ("report.html", ["report"], "removed"),
  ],
)
def test_a_damaged_output_is_made_again(clone, path, again, damage):
  start(clone)
  file = clone / "runs/quickstart-seed0" / path
  file.unlink() if damage == "removed" else file.write_text("")
  run, started, _ = start(clone)
  assert run.returncode == 0
  assert started == ["prepare", *again]
  assert file.read_text()


def test_no_output_of_another_recipe_file_counts_as_whole(clone):
  start(clone)
  (clone / "configs" / "quickstart.py").write_text("# other recipe\n")
  _, started, _ = start(clone)
  assert started == ALL


def test_a_run_that_train_refuses_to_continue_comes_with_what_to_do(clone):
  start(clone)
  (clone / "configs" / "quickstart.py").write_text("# other recipe\n")
  run, started, _ = start(clone, fail="train", code=2)
  assert run.returncode == 2
  assert started == ["prepare", "train"]
  work = clone / "runs/quickstart-seed0"
  assert f"--workdir=NEW, or remove {work}" in run.stderr
  assert "the same command continues" not in run.stderr


def test_a_mistake_of_another_stage_is_not_blamed_on_the_recipe(clone):
  run, _, _ = start(clone, fail="evaluate", code=2)
  assert run.returncode == 2
  assert "--workdir=NEW" not in run.stderr
  assert "mend it, then the same command continues" in run.stderr


def test_a_stage_that_makes_nothing_fails(clone):
  (clone / "launch" / "report.py").write_text("")
  run, _, _ = start(clone)
  assert run.returncode == 1
  assert "report made no" in run.stderr


def test_seeds_share_the_data_and_nothing_else(clone):
  start(clone, "--seed=1")
  _, started, lines = start(clone, "--seed=2")
  assert started == ALL
  for train in (lines[1].split(), lines[2].split()):
    assert "--config.train.seed=2" in train
    assert "--config.data.seed=2" in train
  assert (clone / "runs/quickstart-seed1/report.html").exists()
  assert (clone / "runs/quickstart-seed2/report.html").exists()


def test_folders_are_meant_from_where_the_user_is(clone, tmp_path):
  user = tmp_path / "some where"
  user.mkdir()
  run, _, _ = start(clone, "--workdir=w", "--data=d", cwd=user)
  assert run.returncode == 0, run.stderr
  assert (user / "w" / "report.html").exists()
  assert (user / "d" / "manifest.json").exists()
  assert not (clone / "runs").exists()


def test_the_second_training_starts_from_the_first(clone):
  _, _, lines = start(clone)
  work = clone / "runs/quickstart-seed0"
  assert f"--workdir={work}/towers" in lines[1].split()
  assert "--config=configs/quickstart.py:glscl_towers" in lines[1].split()
  assert f"--workdir={work}" in lines[2].split()
  assert f"--config.train.init_from={work}/towers" in lines[2].split()


def test_more_arguments_reach_the_training(clone):
  _, _, lines = start(clone, "--", "--config.train.num_steps=5")
  for line in lines[1:3]:
    assert line.endswith("--config.train.num_steps=5")


@pytest.mark.parametrize("argument", ["--sed=1", "1", "--seed=x", "--seed="])
def test_a_mistyped_argument_is_refused(clone, argument):
  run, started, _ = start(clone, argument)
  assert run.returncode == 2
  assert argument in run.stderr
  assert not started
