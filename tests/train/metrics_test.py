"""The files and lines a run leaves behind."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import struct
import sys
import types

import pytest
from tensorboardX.proto import event_pb2

from glscl_jax import config as config_lib
from glscl_jax.train import metrics

CONFIG = config_lib.Config()


class Terminal(io.StringIO):
  def isatty(self):
    return True


class Device:
  platform = "gpu"

  def __init__(self, kind):
    self.device_kind = kind


def write(workdir, start_step, values):
  writer = metrics.MetricWriter(workdir, config=CONFIG, start_step=start_step)
  for step, loss in values:
    writer.write(step, {"loss": loss})
  writer.close()


def read(workdir):
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [tuple(json.loads(line).values()) for line in lines]


def read_board(workdir):
  """(step, value) of the scalars in all TensorBoard files, oldest first."""
  found = []
  for path in sorted(workdir.glob("events.out.tfevents.*")):
    data, at = path.read_bytes(), 0
    while at < len(data):
      (length,) = struct.unpack_from("<Q", data, at)
      event = event_pb2.Event.FromString(data[at + 12 : at + 12 + length])
      found += [(event.step, v.simple_value) for v in event.summary.value]
      at += 12 + length + 4
  return found


def test_metrics_are_one_json_object_a_line_with_their_step(tmp_path):
  write(tmp_path, 0, [(1, 3.0), (2, 2.5)])
  assert read(tmp_path) == [(1, 3.0), (2, 2.5)]
  assert read_board(tmp_path) == [(1, 3.0), (2, 2.5)]


def test_a_resumed_run_drops_what_it_will_write_again(tmp_path):
  write(tmp_path, 0, [(1, 3.0), (2, 2.5), (3, 2.25)])
  write(tmp_path, 2, [(3, 2.0)])
  assert read(tmp_path) == [(1, 3.0), (2, 2.5), (3, 2.0)]


def test_a_line_cut_by_a_kill_is_dropped(tmp_path):
  write(tmp_path, 0, [(1, 3.0)])
  with open(tmp_path / "metrics.jsonl", "a") as file:
    file.write('{"step": 2, "lo')
  assert metrics.drop_after(tmp_path / "metrics.jsonl", 5) == 1
  assert read(tmp_path) == [(1, 3.0)]


def test_values_that_are_not_finite_stay_valid_json(tmp_path):
  write(tmp_path, 0, [(1, math.nan), (2, math.inf)])
  assert read(tmp_path) == [(1, None), (2, None)]


def test_other_processes_write_no_metrics(tmp_path):
  writer = metrics.MetricWriter(
    tmp_path, config=CONFIG, start_step=0, process_index=1
  )
  writer.write(1, {"loss": 1.0})
  writer.close()
  assert list(tmp_path.iterdir()) == []


def test_asking_for_wandb_without_the_package_says_how_to_go_on(monkeypatch):
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  config = dataclasses.replace(
    CONFIG, train=dataclasses.replace(CONFIG.train, wandb=True)
  )
  with pytest.raises(config_lib.ConfigError, match="pip install wandb"):
    metrics.check_wandb(config)


def test_wandb_gets_the_same_values_and_continues_the_same_run(
  tmp_path, monkeypatch
):
  started, logged = [], []

  def init(**options):
    started.append(options)
    return types.SimpleNamespace(
      log=lambda values, step: logged.append((step, values)),
      finish=lambda: logged.append("finished"),
    )

  monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
  monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
  config = dataclasses.replace(
    CONFIG, train=dataclasses.replace(CONFIG.train, wandb=True)
  )
  for step in (1, 2):
    writer = metrics.MetricWriter(tmp_path, config=config, start_step=step - 1)
    writer.write(step, {"loss": 1.0 / step})
    writer.close()
  assert logged == [
    (1, {"loss": 1.0}),
    "finished",
    (2, {"loss": 0.5}),
    "finished",
  ]
  first, second = started
  assert first["id"] == second["id"] and second["resume"] == "allow"
  assert first["config"]["train"]["wandb"] is True


def test_the_progress_line_is_dense():
  line = metrics.format_progress(
    metrics.Progress(
      step=1250,
      num_steps=6000,
      loss=8.12342,
      samples_per_second=45.26,
      seconds_left=754.0,
      mfu=0.3124,
      data_wait=0.021,
    )
  )
  assert line == (
    "step 1250/6000 20% | eta 12:34 | loss 8.1234 | 45.3 samples/s | "
    "MFU 31.2% | data wait 2.1%"
  )


@pytest.mark.parametrize(
  ("seconds", "text"),
  [(0.4, "0:00"), (75, "1:15"), (4000, "1:06:40"), (200000, "2d 7:33:20")],
)
def test_durations_read_like_a_clock(seconds, text):
  assert metrics.format_duration(seconds) == text


def test_a_terminal_shows_one_line_that_is_rewritten(tmp_path):
  stream = Terminal()
  log = metrics.RunLog(tmp_path, stream=stream)
  log.progress("step 1", logged=False)
  log.progress("step 2", logged=True)
  log.info("saved")
  log.close()
  assert stream.getvalue() == "\rstep 1\x1b[K\rstep 2\x1b[K\nsaved\n"
  written = (tmp_path / "log-0.txt").read_text().splitlines()
  assert [line.split(" ", 2)[2] for line in written] == ["step 2", "saved"]


def test_off_a_terminal_only_logged_steps_have_a_line(tmp_path):
  stream = io.StringIO()
  log = metrics.RunLog(tmp_path, stream=stream)
  log.progress("step 1", logged=False)
  log.progress("step 2", logged=True)
  log.warning("slow")
  log.close()
  assert stream.getvalue() == "step 2\nwarning: slow\n"


def test_other_processes_have_a_log_of_their_own_and_are_silent(tmp_path):
  stream = io.StringIO()
  log = metrics.RunLog(tmp_path, process_index=3, stream=stream)
  log.info("here")
  log.close()
  assert stream.getvalue() == ""
  assert (tmp_path / "log-3.txt").read_text().endswith(" here\n")


@pytest.mark.parametrize(
  ("kind", "tera"),
  [
    ("NVIDIA H200", 989.4),
    ("NVIDIA H100 80GB HBM3", 989.4),
    ("NVIDIA H100 PCIe", 756),
    ("NVIDIA A100-SXM4-80GB", 312),
    ("TPU v4", 275),
    ("TPU v5 lite", 197),
    ("TPU v5", 459),
    ("TPU v5p", 459),
    ("TPU v6 lite", 918),
  ],
)
def test_known_accelerators_have_their_data_sheet_peak(kind, tera):
  peak = metrics.find_peak([Device(kind)] * 4, compute_dtype="bfloat16")
  assert peak.flops == pytest.approx(4 * tera * 1e12)
  assert kind in peak.source


def test_an_unknown_accelerator_has_no_mfu():
  peak = metrics.find_peak([Device("Fancy 9000")], compute_dtype="bfloat16")
  assert peak.flops is None and "Fancy 9000" in peak.source


def test_the_clock_adds_up_by_purpose():
  ticks = iter([0.0, 1.0, 3.0, 4.0, 4.5, 10.0])
  clock = metrics.Clock(now=lambda: next(ticks))
  for _ in range(2):
    with clock("save"):
      pass
  assert clock.total("save") == 2.5 and clock.total("eval") == 0.0
  assert clock.elapsed() == 10.0
