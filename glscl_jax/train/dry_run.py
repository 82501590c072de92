"""What a run would be, without training: `launch/train.py --dry_run`.

Does everything that a start does before its first step and touches no file,
so it succeeds only where a start would get as far.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax

from glscl_jax import config as config_lib
from glscl_jax import sharding
from glscl_jax.data import pipeline
from glscl_jax.systems import registry
from glscl_jax.train import checkpoint, initial, journal, loop, metrics, shapes
from glscl_jax.train import state as state_lib
from glscl_jax.train import step as step_lib
from glscl_jax.types import Batch

MIB = 2**20


def dry_run(
  config: config_lib.Config,
  workdir: str | os.PathLike[str],
  *,
  compile_step: bool = False,
  read_params: initial.ReadParams = initial.read_work_dir,
  say: Callable[[str], None] = print,
) -> None:
  """Prints configuration, parameters, FLOPs, memory and the first batch.

  Args:
    config: the run's.
    workdir: where it would go; checked, not made.
    compile_step: compile as well, for the compiler's own memory figures.
    read_params: reads what `train.init_from` names.
    say: called with each part of the text.

  Raises:
    What `loop.train` raises before its first step.
  """
  inputs = loop.open_inputs(config)
  try:
    config = initial.keep_init_from(
      config, workdir, warn=lambda text: say(f"warning: {text}")
    )
    _check_workdir(config, workdir, inputs)
    say(config_lib.to_json(config))
    abstract = state_lib.abstract_state(config, inputs.mesh)
    say(format_params(abstract.params))
    for line in sharding.find_undivided(abstract.params, inputs.mesh):
      say(f"warning: {line}")
    restored = checkpoint.restore(workdir, abstract)
    if restored is not None:
      inputs.iterator.set_state(restored.data_state)
      say(f"a start would continue after step {restored.step} of {workdir}")
      del restored  # as large as the state of a run
    elif config.train.init_from:
      loaded, _ = initial.read_initial(
        config, inputs.tokenizer, inputs.tokenizer_path, read_params
      )
      _, merge = initial.merge_params(abstract.params, loaded)
      say(initial.format_merge(config.train.init_from, merge))
      initial.check_merge(config.train.init_from, merge)
    local = next(inputs.iterator)
    if config.data.text_lengths:
      length = config.model.text.max_length
      say(f"data.text_lengths: FLOPs and memory are those of {length} tokens")
    per_sample = registry.find(config).forward(config).step
    say(
      f"model FLOPs a sample, forward and backward: {per_sample / 1e9:.3f} G; "
      f"a step of {config.data.batch_size}: "
      f"{per_sample * config.data.batch_size / 1e12:.4f} T"
    )
  finally:
    inputs.iterator.close()
  batch = pipeline.global_batch(local, inputs.mesh)
  say(format_batch(batch))
  if config.data.text_lengths:
    length = config.model.text.max_length
    batch = shapes.abstract_batch(
      config_lib.at_length(config, length), inputs.mesh
    )
  lowered = step_lib.make_train_step(config, inputs.mesh).lower(
    abstract, batch, state_lib.run_key(config, inputs.mesh, "step")
  )
  parts = estimate_memory(config, abstract, batch, inputs.mesh)
  say(format_memory(parts, inputs.mesh))
  oversights = loop.find_oversights(config, inputs)
  for line in [*find_excess(config, parts, inputs), *oversights]:
    say(f"warning: {line}")
  if compile_step:
    say(f"compiled, a device: {journal.format_memory(lowered.compile())}")
  say("dry run: a start would reach its first step")


def format_params(params: Any) -> str:
  """A table of path, shape, number and spec of each parameter, and a total."""
  rows = [
    (name, str(leaf.shape), f"{leaf.size:,}", str(leaf.sharding.spec))
    for name, leaf in checkpoint.flatten(params).items()
  ]
  total = sum(leaf.size for leaf in jax.tree.leaves(params))
  rows = [("parameter", "shape", "number", "spec"), *rows]
  rows.append(("total", "", f"{total:,}", ""))
  first, second, third = (max(len(row[i]) for row in rows) for i in range(3))
  lines = [
    f"{name:<{first}}  {shape:<{second}}  {count:>{third}}  {spec}"
    for name, shape, count, spec in rows
  ]
  return "\n".join(line.rstrip() for line in lines)


def format_batch(batch: Batch) -> str:
  """Name, type and global shape of each array of a batch."""
  lines = [
    f"  {name:<18}{leaf.dtype!s:<8}{leaf.shape}"
    for name, leaf in vars(batch).items()
    if leaf is not None
  ]
  return "\n".join(["first batch:", *lines])


def estimate_memory(
  config: config_lib.Config,
  abstract: state_lib.TrainState,
  batch: Batch,
  mesh: jax.sharding.Mesh,
) -> dict[str, float]:
  """Bytes a device: state exactly, activations by jax's own trace."""
  params = _device_bytes(abstract.params)
  return {
    "parameters": params,
    "gradients": params,
    "optimizer state": _device_bytes(abstract.opt_state),
    "activations kept for the backward pass, estimated": (
      _residual_bytes(config, abstract, batch)
      / (mesh.shape["data"] * mesh.shape["fsdp"])
    ),
  }


def find_excess(
  config: config_lib.Config, parts: Mapping[str, float], inputs: loop.Inputs
) -> list[str]:
  """What a start would likely fail of, or hardly mean; one line each.

  On CPU all devices share the memory of the machine. Accelerators say only
  when they are full.
  """
  found = []
  if jax.default_backend() == "cpu":
    here = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    needed = sum(parts.values()) * inputs.mesh.size
    if needed > here:
      found.append(
        f"this needs about {needed / MIB:,.0f} MiB, the machine has "
        f"{here / MIB:,.0f}: raise train.accumulate, lower data.batch_size, "
        "or take a smaller recipe"
      )
  num_pairs = inputs.iterator.num_pairs
  if config.data.batch_size > num_pairs:
    found.append(
      f"data.batch_size {config.data.batch_size} is more than the "
      f"{num_pairs} training pairs: a batch holds pairs twice"
    )
  return found


def format_memory(parts: Mapping[str, float], mesh: jax.sharding.Mesh) -> str:
  """A line a part of `estimate_memory`, and their sum."""
  lines = [f"  {size / MIB:10.1f} MiB {name}" for name, size in parts.items()]
  return "\n".join(
    [
      f"memory a device, of {mesh.size}:",
      *lines,
      f"  {sum(parts.values()) / MIB:10.1f} MiB in all (activations: what "
      "jax.vjp saves; the compiler's temporaries come on top: --compile)",
    ]
  )


def _device_bytes(tree: Any) -> int:
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )


def _residual_bytes(
  config: config_lib.Config, abstract: state_lib.TrainState, batch: Batch
) -> int:
  """Bytes of what the forward pass leaves for the backward pass."""
  system = registry.find(config)

  def pull_back(params, batch):
    def loss(params):
      key = state_lib.stream_key(config.train.seed, "step")
      return system.loss(params, batch, config=config, key=key).loss

    return jax.vjp(loss, params)[1]

  # One micro-batch is held at a time.
  rows = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      (x.shape[0] // config.train.accumulate, *x.shape[1:]), x.dtype
    ),
    batch,
  )
  saved = jax.tree.leaves(jax.eval_shape(pull_back, abstract.params, rows))
  known = [(x.shape, x.dtype) for x in jax.tree.leaves(abstract.params)]
  total = 0
  for leaf in saved:
    if (leaf.shape, leaf.dtype) in known:  # a parameter, counted already
      known.remove((leaf.shape, leaf.dtype))
    elif not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      total += leaf.size * leaf.dtype.itemsize
  return total


def _check_workdir(
  config: config_lib.Config,
  workdir: str | os.PathLike[str],
  inputs: loop.Inputs,
) -> None:
  checkpoint.check_writable(workdir)
  checkpoint.check_same_run(
    workdir,
    checkpoint.make_meta(
      config,
      tokenizer_sha256=inputs.tokenizer.sha256,
      lineage=inputs.data_facts,
    ),
  )
  metrics.check_wandb(config)
