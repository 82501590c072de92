"""One run by several processes of this machine."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import socket
import time

import pytest

from glscl_jax import roll_call
from glscl_jax.train import checkpoint
from tests.end_to_end import child, spin

# Quickly compiled: every process of several does so for itself.
SMALL = (
  "--config.objectives.mlm=0",
  "--config.objectives.itm=0",
  "--config.train.num_steps=12",
)
TIMEOUT = 120.0


def free_port() -> int:
  with socket.socket() as server:
    server.bind(("127.0.0.1", 0))
    return server.getsockname()[1]


def test_two_processes_train_as_one_and_stop_together_and_one_continues(
  project, start, starter, tmp_path
):
  workdir, alone, port = tmp_path / "work", tmp_path / "alone", free_port()
  both = [
    starter(
      project.command(
        workdir,
        *SMALL,
        f"--coordinator_address=localhost:{port}",
        "--num_processes=2",
        f"--process_id={number}",
      ),
      workdir,
      number=number,
    )
    for number in (0, 1)
  ]
  both[0].wait_for_line(" step 4/")
  os.kill(both[1].process.pid, signal.SIGTERM)
  said = [process.finish(code=143) for process in both]

  step = checkpoint.list_steps(workdir)[-1]
  assert step >= 4
  stopped = f"stopped by SIGTERM after step {step}, which is saved"
  assert stopped in said[0] and "error" not in said[1]
  assert stopped in (workdir / "log-1.txt").read_text()
  # A batch of eight: half of it was made by each.
  for number in (0, 1):
    log = (workdir / f"log-{number}.txt").read_text()
    assert f"data: {4 * step} rows" in log
  assert len(child.read_metrics(workdir)) == step

  start(alone, *SMALL).finish()
  assert f"continuing after step {step}" in start(workdir, *SMALL).finish()
  found, expected = child.read_metrics(workdir), child.read_metrics(alone)
  assert len(found) == len(expected) == 12
  for line, other in zip(found, expected, strict=True):
    assert line == pytest.approx(other, rel=1e-4, abs=1e-5)


@pytest.fixture
def start_both(starter):
  """Starts a function of `spin` in two processes; none outlives the test."""
  context = multiprocessing.get_context("forkserver")
  both = []

  def start(function, folder):
    port = free_port()
    for number in (0, 1):
      process = context.Process(
        target=function, args=(port, number, str(folder)), daemon=True
      )
      process.start()
      both.append(process)
    return both

  yield start
  for process in both:
    process.kill()
    process.join()


@pytest.mark.parametrize("dead", [0, 1])
def test_a_killed_process_ends_the_other_with_an_error_that_says_so(
  start_both, tmp_path, dead
):
  both = start_both(spin.add_up, tmp_path)
  end = time.monotonic() + TIMEOUT
  while not all((tmp_path / str(number)).exists() for number in (0, 1)):
    assert time.monotonic() < end
    assert all(process.is_alive() for process in both)
    time.sleep(0.01)
  both[dead].kill()
  left = both[1 - dead]
  left.join(TIMEOUT)
  said = (tmp_path / f"out-{1 - dead}").read_text()
  assert left.exitcode == roll_call.LOST, said
  assert f"error: process {dead} of 2 (host " in said
  assert f"pid {both[dead].pid}) ended without a word" in said
  assert "start all processes again" in said
  assert "Traceback" not in said


def test_a_work_dir_that_is_not_shared_ends_both_with_an_error(
  start_both, tmp_path
):
  both = start_both(spin.look, tmp_path)
  for number, process in enumerate(both):
    process.join(TIMEOUT)
    said = (tmp_path / f"out-{number}").read_text()
    assert process.exitcode == 2, said
    assert "--workdir=own: processes 1 do not see what process 0" in said
  assert list((tmp_path / "own-0").iterdir()) == []


def test_an_error_of_one_process_ends_the_other_with_the_reason(
  start_both, tmp_path
):
  both = start_both(functools.partial(spin.add_up, fail=True), tmp_path)
  for process in both:
    process.join(TIMEOUT)
    assert process.exitcode == 2
  said = [(tmp_path / f"out-{number}").read_text() for number in (0, 1)]
  assert "error: process 1 of 2 (host " in said[0]
  assert "has failed: record 7 cannot be read" in said[0]
  assert "error: record 7 cannot be read" in said[1]
  assert "Traceback" not in said[0] + said[1]
