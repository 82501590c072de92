"""How launch/ablate.py plans, runs and continues, and what its table says."""

import concurrent.futures
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest
from absl import flags

from glscl_jax import ablations, errors
from glscl_jax import config as config_lib
from glscl_jax.export import ablation_table
from launch import ablate
from tests import recipes
from tests.data import pipeline_test, tiny_regions

ROOT = pathlib.Path(__file__).resolve().parents[2]
ROWS = [
  (suite, row)
  for suite, table in ablations.SUITES.items()
  for row in table.rows
]


def make_plan(tmp_path, suite="maskvlm", **changes):
  options = {
    "workdir": tmp_path,
    "data": "/data",
    "rows": list(ablations.SUITES[suite].rows),
    "seeds": 2,
    "steps": 7,
    "limit": 16,
  }
  return ablate.plan(suite, **options | changes)


def option(command, name):
  """The value of a flag; fails where it is not there exactly once."""
  (found,) = [a for a in command if a.startswith(f"--{name}=")]
  return found.partition("=")[2]


@pytest.mark.parametrize(("suite", "row"), ROWS)
def test_a_row_is_a_recipe_with_the_objectives_that_it_names(suite, row):
  table = ablations.SUITES[suite]
  recipe = recipes.load(f"{ROOT / 'configs/quickstart.py'}:{table.system}")
  recipe.update_from_flattened_dict(table.rows[row].overrides)
  config = config_lib.from_config_dict(recipe)
  assert config.system == table.system
  for name in config_lib.OBJECTIVES:
    assert table.has(table.rows[row], name) == (
      name in config.objectives.active
    )


def test_rows_of_one_suite_differ():
  for suite in ablations.SUITES.values():
    seen = [json.dumps(dict(row.overrides)) for row in suite.rows.values()]
    assert len(set(seen)) == len(seen)


def test_rows_start_alike_and_take_equally_many_steps(tmp_path):
  jobs = make_plan(tmp_path)
  towers = {job.name: job for job in jobs if not job.after}
  assert len(towers) == 2 and len(jobs) == 2 + 2 * 7
  assert jobs[:2] == list(towers.values())
  for job in jobs[2:]:
    train = job.commands[0]
    assert option(train, "config.train.num_steps") == "7"
    seed = option(train, "config.train.seed")
    assert option(train, "config.data.seed") == seed
    start = option(train, "config.train.init_from")
    assert start == str(towers[job.after].workdir)
    assert option(towers[job.after].commands[0], "config.train.seed") == seed
    assert option(train, "config.train.eval_every") == "0"


def test_a_row_is_asked_only_what_it_has_learned(tmp_path):
  reranks = {
    job.name: [option(command, "rerank") for command in job.commands[1:]]
    for suite in ("maskvlm", "glscl")
    for job in make_plan(tmp_path, suite=suite, seeds=1)
  }
  asked = {
    job.name: " ".join(job.commands[-1])
    for job in make_plan(tmp_path, suite="cmal", seeds=1)
  }
  assert "--task=anchors" in asked["itm_wrc-seed0"]
  assert "--task" not in asked["uniter-seed0"]
  assert reranks["itc-seed0"] == ["none"]
  assert reranks["mlm_mim-seed0"] == []
  assert reranks["maskvlm-seed0"] == ["none,full"]
  assert reranks["meter-seed0"] == ["full"]


def test_overrides_are_flags_that_training_takes(tmp_path):
  (job,) = make_plan(tmp_path, suite="sycoca", rows=["mim_random"], seeds=1)
  train = job.commands[0]
  assert option(train, "config.masking.split") == "random"
  assert option(train, "config.model.fusion.mim_text") == "False"
  done = subprocess.run(
    [*train, "--config.data.dir=/nowhere", "--dry_run"],
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 2
  assert "/nowhere" in done.stderr  # all that is wrong with it


def job(folder, name, code, after=""):
  return ablate.Job(
    name=name,
    workdir=folder / name,
    commands=((sys.executable, "-c", code),),
    after=after,
  )


def count(path):
  return f"open({str(path)!r}, 'a').write('x')"


def test_what_is_done_is_not_run_again(tmp_path, capsys):
  jobs = [job(tmp_path, "a", count(tmp_path / "runs"))]
  for _ in range(2):
    assert ablate.Table(jobs, at_a_time=1).run() == {}
  assert (tmp_path / "runs").read_text() == "x"
  assert "a: was done before" in capsys.readouterr().out
  # Other commands for the same folder are other work.
  changed = [job(tmp_path, "a", f"{count(tmp_path / 'runs')}; 1")]
  assert ablate.Table(changed, at_a_time=1).run() == {}
  assert (tmp_path / "runs").read_text() == "xx"


def test_commands_are_given_what_the_environment_lacks(tmp_path, monkeypatch):
  monkeypatch.setenv("ABLATE_SET", "here")
  given = {"ABLATE_SET": "there", "ABLATE_UNSET": "there"}
  code = (
    f"import os; open({str(tmp_path / 'found')!r}, 'w').write("
    "os.environ['ABLATE_SET'] + os.environ['ABLATE_UNSET'])"
  )
  table = ablate.Table(
    [job(tmp_path, "a", code)], at_a_time=1, environment=given
  )
  assert table.run() == {}
  assert (tmp_path / "found").read_text() == "herethere"


def test_a_failure_stops_what_needs_it_and_nothing_else(tmp_path, capsys):
  jobs = [
    job(tmp_path, "towers", "import sys; print('why'); sys.exit(3)"),
    job(tmp_path, "row", count(tmp_path / "row_ran"), after="towers"),
    job(tmp_path, "other", count(tmp_path / "other_ran")),
  ]
  failed = ablate.Table(jobs, at_a_time=2).run()
  assert set(failed) == {"towers", "row"}
  assert str(tmp_path / "towers/log.txt") in failed["towers"]
  assert (tmp_path / "towers/log.txt").read_text() == "why\n"
  assert not (tmp_path / "row_ran").exists()
  assert (tmp_path / "other_ran").exists()
  assert "left out: towers failed" in capsys.readouterr().out


SLEEPS = """
import pathlib, signal, sys
from launch import ablate
signal.signal(signal.SIGTERM, ablate._interrupt)
code = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
job = ablate.Job(
  name="a",
  workdir=pathlib.Path(sys.argv[1]),
  commands=((sys.executable, "-c", code),),
)
ablate.Table([job], at_a_time=1).run()
"""


def is_alive(process):
  try:
    os.kill(process, 0)
  except ProcessLookupError:
    return False
  return True


def start_table(folder):
  return subprocess.Popen(
    [sys.executable, "-c", SLEEPS, folder],
    cwd=ROOT,
    env={**os.environ, "PYTHONPATH": str(ROOT)},
    stderr=subprocess.DEVNULL,
  )


def wait_for_child(folder, process):
  """The id that the command of a table has written."""
  log = folder / "log.txt"
  deadline = time.monotonic() + 50
  while not (log.exists() and log.read_text().strip()):
    assert time.monotonic() < deadline and process.poll() is None
    time.sleep(0.1)
  return int(log.read_text())


def test_nothing_runs_on_after_it_was_stopped(tmp_path):
  process = start_table(tmp_path)
  child = wait_for_child(tmp_path, process)
  process.send_signal(signal.SIGTERM)
  assert process.wait(timeout=30) != 0
  assert not is_alive(child)
  assert not (tmp_path / ablate.DONE).exists()


def test_wrong_rows_and_data_without_the_splits_are_named(tmp_path):
  suite = ablations.SUITES["glscl"]
  assert ablate.check_rows(suite, ["glscl", "meter"]) == ["meter", "glscl"]
  with pytest.raises(flags.Error, match="'mgsc'; meter, meter_itc"):
    ablate.check_rows(suite, ["mgsc"])
  with pytest.raises(errors.UserError, match="no such data directory"):
    ablate.check_data(suite, str(tmp_path / "none"))


def test_regions_are_asked_for_before_the_first_row(tmp_path):
  records = [tiny_regions.make_record(number) for number in range(4)]
  scenes = tiny_regions.write(tmp_path / "regions", records)
  with pytest.raises(errors.UserError, match="no split 'test_unseen"):
    ablate.check_data(ablations.SUITES["cmal"], str(scenes))
  pictures = pipeline_test.write(
    tmp_path / "pictures", [pipeline_test.make_record(i) for i in range(20)]
  )
  with pytest.raises(errors.UserError, match="no regions, which CMAL reads"):
    ablate.check_data(ablations.SUITES["cmal"], str(pictures))


class Child:
  """A process that ends when it is asked to, and lets its waiter know it."""

  def __init__(self, *arguments, **options):
    self._asked, self.stopped = threading.Event(), False

  def wait(self):
    self._asked.wait(10)
    return -15

  def terminate(self):
    self.stopped = True
    self._asked.set()
    time.sleep(0.1)  # the waiting thread goes on


def test_runs_that_end_while_all_are_stopped_hide_none(tmp_path, monkeypatch):
  children = []

  def start(*arguments, **options):
    children.append(Child())
    return children[-1]

  monkeypatch.setattr(subprocess, "Popen", start)
  jobs = [job(tmp_path, name, "") for name in "abc"]
  table = ablate.Table(jobs, at_a_time=3)
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    running = pool.submit(table.run)
    deadline = time.monotonic() + 10
    while len(children) < 3 and time.monotonic() < deadline:
      time.sleep(0.01)
    table._stop()
    assert set(running.result()) == {"a", "b", "c"}
  assert [child.stopped for child in children] == [True] * 3


def test_what_a_killed_call_left_running_is_not_joined(tmp_path):
  folder = tmp_path / "a"
  process = start_table(folder)
  child = wait_for_child(folder, process)
  process.kill()
  process.wait(timeout=30)
  again = [job(tmp_path, "a", count(tmp_path / "ran"))]
  try:
    failed = ablate.Table(again, at_a_time=1).run()
    assert f"{folder} is in use" in failed["a"]
    assert not (tmp_path / "ran").exists()
  finally:
    os.kill(child, signal.SIGKILL)
  deadline = time.monotonic() + 10
  while ablate.Table(again, at_a_time=1).run():
    assert time.monotonic() < deadline
    time.sleep(0.1)
  assert (tmp_path / "ran").read_text() == "x"


def test_results_of_other_flags_are_not_in_the_table(tmp_path):
  jobs = make_plan(tmp_path, rows=["itc", "mim"])
  for one in jobs:
    one.workdir.mkdir(parents=True)
    (one.workdir / ablate.DONE).write_text(one.text)
  changed = make_plan(tmp_path, rows=["itc", "mim"], steps=8)
  found = ablate.find_runs(changed, rows=["itc", "mim"])
  assert found == {"itc": [], "mim": []}
  (tmp_path / "maskvlm/mim/seed1" / ablate.DONE).unlink()
  found = ablate.find_runs(jobs, rows=["itc", "mim"])
  assert found == {
    "itc": [tmp_path / "maskvlm/itc/seed0", tmp_path / "maskvlm/itc/seed1"],
    "mim": [tmp_path / "maskvlm/mim/seed0"],
  }


def test_the_table_tells_all_flags_that_its_numbers_depend_on():
  base = ["ablate.py", "--suite=glscl", "--workdir=w", "--data=d"]
  told = " ".join(ablate._told(ablate.parse(base)))
  assert told == "--suite=glscl --seeds=3 --workdir=DIR --data=DATA"
  more = ["--rows=scl,glscl", "--steps=9", "--limit=0", "--jobs=2"]
  told = " ".join(ablate._told(ablate.parse([*base, *more])))
  assert "--rows=scl,glscl --steps=9 --limit=0 --workdir" in told


def test_two_results_of_one_question_are_not_averaged(tmp_path):
  write_result(tmp_path / "run", 0.1)
  path = tmp_path / "run/eval/retrieval/metrics.json"
  tree = json.loads(path.read_text())
  tree["results"]["emoji-2"] = tree["results"]["emoji-1"]
  path.write_text(json.dumps(tree))
  with pytest.raises(errors.UserError, match="'test_seen' was measured twice"):
    ablation_table.collect({"glscl": [tmp_path / "run"]})


def write_result(workdir, value, *, rerank="none"):
  """A result file as launch/evaluate.py leaves it, as far as it is read."""
  entry = {
    "protocol": {"rerank": rerank, "captions": "first"},
    "metrics": {"mean_r1": value},
    "chance": {"mean_r1": 0.01},
  }
  folder = workdir / "eval/retrieval"
  folder.mkdir(parents=True)
  tree = {"results": {"emoji-1": {"test_seen": {rerank: entry}}}}
  (folder / "metrics.json").write_text(json.dumps(tree))


def test_the_table_holds_means_spreads_chance_and_the_paper(tmp_path):
  runs = {
    name: [tmp_path / f"{name}{seed}" for seed in range(3)]
    for name in ("meter_itc", "glscl", "meter")
  }
  for workdir, value in zip(runs["meter_itc"], (0.1, 0.2, 0.3), strict=True):
    write_result(workdir, value)
  write_result(runs["glscl"][0], 0.5)
  ablation_table.write(
    tmp_path,
    suite=ablations.SUITES["glscl"],
    runs=runs,
    command="python launch/ablate.py",
  )
  text = (tmp_path / ablation_table.MARKDOWN).read_text()
  rows = [line.split(" | ") for line in text.splitlines() if " | " in line]
  cells = {row[0].strip("| "): row[1] for row in rows}
  assert cells["MLM + ITM + ITC"] == "20.0 \u00b1 10.0"
  # A row that has lost seeds says so.
  assert cells["+ MGSC + MLTC (GLSCL)"] == "50.0 (of 1)"
  assert cells["MLM + ITM (METER)"] == "-"
  assert cells["chance"] == "1.0"
  assert "3 seeds" in text and "< + MGSC + MLTC" in text
  assert (tmp_path / ablation_table.PLOT).read_bytes().startswith(b"<?xml")
  assert "3 seeds" in text
  (column,) = json.loads((tmp_path / ablation_table.NUMBERS).read_text())
  assert column["values"]["meter_itc"] == [0.1, 0.2, 0.3]
