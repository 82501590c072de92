"""How fast a recipe trains here: the step alone, the data alone, both.

The step is the run's own, on a real batch: `launch/bench.py` measures what
`launch/train.py` does.
"""

from __future__ import annotations

import concurrent.futures
import concurrent.futures.process
import dataclasses
import importlib.util
import itertools
import json
import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from glscl_jax import config as config_lib
from glscl_jax import errors
from glscl_jax.data import pipeline
from glscl_jax.systems import registry
from glscl_jax.train import loop, metrics
from glscl_jax.train import state as state_lib
from glscl_jax.train import step as step_lib

WARM_UP = 3  # steps, and batches, before anything is timed
MIN_SAMPLES = 512  # that are timed, at least, of the data alone


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spread:
  """Seconds of a repeated piece of work."""

  median: float
  fastest: float
  slowest: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Baseline:
  """The published step in PyTorch, on the same batch."""

  step_seconds: Spread
  peak_rss_mib: float
  speed: float  # its median step over ours
  memory: float  # our peak over its peak


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figures:
  """What one bench has measured."""

  system: str
  devices: str  # number and kind
  jax: str  # version
  batch_size: int
  num_params: int
  compile_seconds: float
  state_mib: float  # state and batch of a device
  temporary_mib: float  # of a device, beside them
  step_seconds: Spread
  samples_per_second: float
  gflop_per_sample: float  # forward and backward of the model, no recomputing
  peak: str  # what MFU is a share of
  mfu: float | None
  matmul_tflops: float  # a large product of these devices, measured here
  share_of_matmul: float
  data_samples_per_second: float  # of the pipeline alone
  data_wait: float  # share of the time in which steps wait for batches
  peak_rss_mib: float  # of this process, before anything else is timed
  torch: Mapping[str, Baseline]  # by precision; empty: not asked for
  # Images alone, by DataLoader and Pillow; None: not asked for.
  torch_images_per_second: float | None

  def to_json(self) -> str:
    """As one object."""
    return json.dumps(dataclasses.asdict(self), indent=1)


def bench(
  config: config_lib.Config,
  *,
  num_steps: int,
  against_torch: bool = False,
  say: Callable[[str], None] = print,
) -> Figures:
  """Measures a recipe on the devices and the data that it names.

  Args:
    config: the run's; nothing is written.
    num_steps: timed steps, alone and with data.
    against_torch: time PyTorch's step and images too (`torch_baseline.py`).
    say: called with each stage.

  Raises:
    UserError: what a start of the training would fail with.
  """
  if against_torch:
    check_torch(config)
  if config.data.text_lengths:
    length = config.model.text.max_length
    say(f"data.text_lengths: steps and batches of {length} tokens are timed")
    config = config_lib.at_length(config, length)
  inputs = loop.open_inputs(config)
  try:
    mesh = inputs.mesh
    local = next(inputs.iterator)
    batch = pipeline.global_batch(local, mesh)
    state = state_lib.make_state(config, mesh)
    num_params = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    say(f"compiling the step of {num_params:,} parameters")
    started = time.perf_counter()
    key = state_lib.run_key(config, mesh, "step")
    step = (
      step_lib.make_train_step(config, mesh).lower(state, batch, key).compile()
    )
    compiled = time.perf_counter() - started
    say(f"compiled in {compiled:.1f} s; timing {num_steps} steps")
    state, seconds = _time_steps(step, state, batch, key, num_steps)
    size = config.data.batch_size
    num_batches = max(num_steps, math.ceil(MIN_SAMPLES / size))
    say(f"timing {num_batches} batches of the pipeline")
    ahead = count_ahead(config.data)
    data_seconds = _time_data(inputs.iterator, num_batches, ahead=ahead)
    say(f"timing {num_steps} steps, each with a batch of its own")
    data_wait = _time_both(step, state, inputs, key, num_steps)
  finally:
    inputs.iterator.close()
  flops = registry.find(config).forward(config).step
  rate = size / seconds.median * flops
  dtype = config.model.compute_dtype
  devices = list(mesh.devices.flat)
  peak = metrics.find_peak(devices, compute_dtype=dtype)
  matmul = metrics.measure_matmul(dtype) * (
    1 if devices[0].platform == "cpu" else len(devices)
  )
  memory = step.memory_analysis()
  rss = metrics.peak_rss_mib()
  torch, torch_images = {}, None
  if against_torch:
    del state, batch  # leave the memory to the others
    torch_images = _time_torch_images(config, say)
    torch = _time_torch(config, local, seconds, rss, num_steps, say)
  return Figures(
    system=config.system,
    devices=f"{len(devices)} x {devices[0].device_kind}",
    jax=jax.__version__,
    batch_size=size,
    num_params=num_params,
    compile_seconds=compiled,
    state_mib=memory.argument_size_in_bytes / 2**20,
    temporary_mib=memory.temp_size_in_bytes / 2**20,
    step_seconds=seconds,
    samples_per_second=size / seconds.median,
    gflop_per_sample=flops / 1e9,
    peak=peak.source,
    mfu=None if peak.flops is None else rate / peak.flops,
    matmul_tflops=matmul / 1e12,
    share_of_matmul=rate / matmul,
    data_samples_per_second=size / data_seconds,
    data_wait=data_wait,
    peak_rss_mib=rss,
    torch=torch,
    torch_images_per_second=torch_images,
  )


def format_figures(found: Figures) -> str:
  """For people."""
  step = found.step_seconds
  mfu = "" if found.mfu is None else f"MFU {100 * found.mfu:.1f} % of "
  return "\n".join(
    [
      f"{found.system}, batch {found.batch_size}, {found.devices}, jax "
      f"{found.jax}, {found.num_params:,} parameters",
      f"  step      {1e3 * step.median:.1f} ms median "
      f"({1e3 * step.fastest:.1f} to {1e3 * step.slowest:.1f}), "
      f"{found.samples_per_second:.1f} samples/s",
      f"  work      {found.gflop_per_sample:.2f} GFLOP a sample; {mfu}"
      f"{found.peak}",
      f"  matmul    {100 * found.share_of_matmul:.1f} % of the "
      f"{found.matmul_tflops:.3g} TFLOP/s of a large product here",
      f"  memory    {found.state_mib:.0f} MiB state and batch, "
      f"{found.temporary_mib:.0f} MiB temporary, a device",
      f"  compile   {found.compile_seconds:.1f} s",
      f"  data      {found.data_samples_per_second:.1f} samples/s alone; steps "
      f"wait {100 * found.data_wait:.1f} % of the time",
      *_format_images(found),
      *(
        f"  PyTorch   {name}: {1e3 * other.step_seconds.median:.1f} ms median, "
        f"{other.speed:.2f} times ours; peak {other.peak_rss_mib:.0f} MiB, "
        f"ours {other.memory:.2f} of it"
        for name, other in found.torch.items()
      ),
    ]
  )


def _format_images(found: Figures) -> list[str]:
  rate = found.torch_images_per_second
  if rate is None:
    return []
  return [
    f"  PyTorch   images: {rate:.1f} a second; the pipeline, which reads "
    f"texts too, {found.data_samples_per_second / rate:.2f} times as many"
  ]


def check_torch(config: config_lib.Config) -> None:
  """Raises UserError where PyTorch's step cannot be timed."""
  if importlib.util.find_spec("torch") is None:
    raise errors.UserError(
      "--against=torch: PyTorch is not installed; pip install torch"
    )
  model = config.model
  if (
    config.system != "glscl"
    or model.vision.stem
    or model.joint_projection != "mlp"
    or {model.vision.class_state, model.text.class_state} != {"token"}
  ):
    raise config_lib.ConfigError(
      "--against=torch: PyTorch's step is that of system=glscl without "
      "model.vision.stem, with class tokens and model.joint_projection=mlp"
    )


def _time_torch(
  config: config_lib.Config,
  local: Mapping[str, np.ndarray],
  ours: Spread,
  rss: float,
  num_steps: int,
  say: Callable[[str], None],
) -> dict[str, Baseline]:
  from glscl_jax.train import torch_baseline  # an extra of this bench alone

  found = {}
  for precision in torch_baseline.PRECISIONS:
    say(f"timing {num_steps} steps of PyTorch in {precision}")
    timing = _run_alone(
      torch_baseline.time_steps,
      config,
      dict(local),
      precision=precision,
      num_steps=num_steps,
      num_warm=WARM_UP,
    )
    seconds = _spread(timing.seconds)
    found[precision] = Baseline(
      step_seconds=seconds,
      peak_rss_mib=timing.peak_rss_mib,
      speed=seconds.median / ours.median,
      memory=rss / timing.peak_rss_mib,
    )
  return found


def _time_torch_images(
  config: config_lib.Config, say: Callable[[str], None]
) -> float:
  from glscl_jax.train import torch_baseline

  # As many as make rows here.
  num_workers = config.data.num_workers or config.data.num_threads
  say(f"timing PyTorch's images, by {num_workers} processes")
  return _run_alone(
    torch_baseline.time_images,
    config,
    num_images=MIN_SAMPLES,
    num_workers=num_workers,
  )


def _run_alone(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
  """Runs in a process of its own, whose peak of memory is its own too.

  Raises:
    UserError: of `function`, or the process was ended.
  """
  context = multiprocessing.get_context("spawn")
  with concurrent.futures.ProcessPoolExecutor(1, context) as pool:
    asked = pool.submit(function, *args, **options)
    try:
      return asked.result()
    except concurrent.futures.process.BrokenProcessPool as error:
      raise errors.UserError(
        "--against=torch: PyTorch's process was ended, most likely for want "
        "of memory; lower --config.data.batch_size"
      ) from error


def _spread(seconds: Sequence[float]) -> Spread:
  return Spread(
    median=statistics.median(seconds),
    fastest=min(seconds),
    slowest=max(seconds),
  )


def _time_steps(
  step: Any,
  state: state_lib.TrainState,
  batch: Any,
  key: jax.Array,
  count: int,
) -> tuple[state_lib.TrainState, Spread]:
  """Each step to its end, the same batch again and again."""
  seconds = []
  for _ in range(WARM_UP + count):
    started = time.perf_counter()
    state, values = step(state, batch, key)
    jax.block_until_ready(values)
    seconds.append(time.perf_counter() - started)
  return state, _spread(seconds[WARM_UP:])


def count_ahead(data: config_lib.DataConfig) -> int:
  """How many batches may have been made before anyone asks for them."""
  if not data.num_workers:
    return data.prefetch
  # Each worker reads ahead by itself, and its batches are collected ahead.
  collected = max(1, data.prefetch // data.num_workers)
  return data.num_workers * (data.prefetch + collected)


def _time_data(
  iterator: Iterator[Mapping[str, Any]], count: int, *, ahead: int
) -> float:
  """Seconds a batch, where nobody else works.

  Batches that were made while other things were timed cost nothing: they are
  taken first.
  """
  for _ in itertools.islice(iterator, WARM_UP + ahead):
    pass
  started = time.perf_counter()
  for _ in itertools.islice(iterator, count):
    pass
  return (time.perf_counter() - started) / count


def _time_both(
  step: Any,
  state: state_lib.TrainState,
  inputs: loop.Inputs,
  key: jax.Array,
  count: int,
) -> float:
  """The share of the time in which the next batch was not there yet."""
  waited, values, started = 0.0, None, 0.0
  for number in range(WARM_UP + count):
    if number == WARM_UP:
      jax.block_until_ready(values)
      waited, started = 0.0, time.perf_counter()
    began = time.perf_counter()
    local = next(inputs.iterator)
    waited += time.perf_counter() - began
    batch = pipeline.global_batch(local, inputs.mesh)
    # As in training: one step runs while the next batch is fetched.
    jax.block_until_ready(values)
    state, values = step(state, batch, key)
  jax.block_until_ready(values)
  return waited / (time.perf_counter() - started)
