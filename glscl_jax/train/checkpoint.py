"""Checkpoints: state, data iterator, configuration and tokenizer as one.

A checkpoint is a folder `checkpoints/STEP` with the items `state` (the whole
TrainState), `data` (where the iterator stands), `meta` (configuration,
tokenizer hash, lineage) and, after a validation, `metrics`. Orbax writes it
beside the training and renames it when it is whole, so a kill leaves only
whole steps visible. `train/loop.py` saves and restores; evaluation and export
read parameters through `restore_params`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from glscl_jax import atomic, errors
from glscl_jax import config as config_lib
from glscl_jax import sharding as sharding_lib
from glscl_jax.data import pairs
from glscl_jax.train import state as state_lib

_log = logging.getLogger(__name__)

BEST_METRIC = "eval/mean_r1"  # larger is better

# Changing these does not change what is learnt, so a run may resume with
# others. Contents of data.dir and data.tokenizer are compared by their hashes:
# the files may have moved. train.init_from is read by new runs only;
# initial.keep_init_from keeps the one a run began with.
FREE_KEYS = (
  "data.dir",
  "data.max_bad_share",
  "data.num_threads",
  "data.num_workers",
  "data.prefetch",
  "data.tokenizer",
  "mesh.data",
  "mesh.fsdp",
  "mesh.tensor",
  "optimizer.max_skips",
  "train.accumulate",
  "train.eval_every",
  "train.init_from",
  "train.keep_best",
  "train.keep_last",
  "train.log_every",
  "train.profile_steps",
  "train.save_every",
  "train.wandb",
)

_TRASH = "deleted"  # orbax renames a step into it: never half a step in sight


class CheckpointError(errors.UserError):
  """A work dir or checkpoint that does not fit; the message says why."""


class Restored(NamedTuple):
  """What a run continues from."""

  state: Any  # the TrainState, on the shardings that were asked for
  data_state: dict[str, Any]  # for the iterator's set_state
  step: int


class Snapshot(NamedTuple):
  """What evaluation and export need of a checkpoint."""

  config: config_lib.Config
  params: Any
  step: int
  metrics: dict[str, float]  # of the validation at this step, or empty
  lineage: dict[str, Any]


class Checkpointer:
  """Writes and reads the checkpoints of one run.

  Args:
    workdir: holds `checkpoints/`; made when missing.
    config: stored with each checkpoint; a work dir of another one is refused.
    tokenizer_sha256: stored and compared in the same way.
    lineage: JSON-able facts about the origin of the run; among them
      `data_sha256`, which is compared.
  """

  def __init__(
    self,
    workdir: str | os.PathLike[str],
    *,
    config: config_lib.Config,
    tokenizer_sha256: str,
    lineage: Mapping[str, Any],
  ):
    self._workdir = pathlib.Path(workdir).absolute()
    self._directory = self._workdir / "checkpoints"
    self._meta = make_meta(
      config, tokenizer_sha256=tokenizer_sha256, lineage=lineage
    )
    # A refused work dir stays as it is: compare before orbax cleans up.
    check_same_run(workdir, self._meta)
    self._empty_trash()
    keep = [
      checkpoint_managers.LatestN(config.train.keep_last),
      checkpoint_managers.BestN(
        get_metric_fn=_score,
        n=config.train.keep_best,
        keep_checkpoints_without_metrics=False,
      ),
    ]
    self._manager = ocp.CheckpointManager(
      self._directory,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=checkpoint_managers.AnyPreservationPolicy(keep),
        best_fn=_score,
        cleanup_tmp_directories=True,
        todelete_subdir=_TRASH,
      ),
    )
    self._write_best()

  @property
  def latest_step(self) -> int | None:
    """The last step saved, or being saved."""
    return self._manager.latest_step()

  def save(
    self,
    step: int,
    state: Any,
    *,
    data_state: Mapping[str, Any],
    metrics: Mapping[str, float] | None = None,
  ) -> None:
    """Starts writing a checkpoint; waits only for the one before.

    Args:
      step: number of updates `state` has seen.
      state: a pytree of arrays; may be donated once this returns.
      data_state: of the iterator, before it moved on.
      metrics: of a validation at this step, or None.
    """
    self.wait()
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(state),
        data=ocp.args.JsonSave(dict(data_state)),
        meta=ocp.args.JsonSave({**self._meta, "step": step}),
      ),
      metrics={} if metrics is None else dict(metrics),
    )

  def restore(self, abstract_state: Any) -> Restored | None:
    """What `restore` gives for this work dir."""
    return restore(self._workdir, abstract_state)

  def wait(self) -> None:
    """Returns when the checkpoint being written is whole."""
    self._manager.wait_until_finished()
    self._write_best()
    self._empty_trash()

  def close(self) -> None:
    """Waits and lets go of orbax's threads."""
    self.wait()
    self._manager.close()

  def _write_best(self) -> None:
    """Says in best.json which of the steps kept scored best."""
    scores = _list_scores(self._directory)
    if not scores or jax.process_index() != 0:
      return
    step = _best(scores)
    atomic.write_text(
      self._workdir / "best.json",
      json.dumps({"step": step, BEST_METRIC: scores[step]}) + "\n",
    )

  def _empty_trash(self) -> None:
    if jax.process_index() == 0:
      shutil.rmtree(self._directory / _TRASH, ignore_errors=True)


def make_meta(
  config: config_lib.Config,
  *,
  tokenizer_sha256: str,
  lineage: Mapping[str, Any],
) -> dict[str, Any]:
  """What is stored beside the arrays, as JSON."""
  return {
    "config": json.loads(config_lib.to_json(config)),
    "tokenizer_sha256": tokenizer_sha256,
    "lineage": dict(lineage),
  }


def check_same_run(
  workdir: str | os.PathLike[str], meta: Mapping[str, Any]
) -> None:
  """Checks that `meta` may continue what the work dir holds, if anything.

  Raises:
    CheckpointError: another configuration (listing the keys), another
      tokenizer, other training data, or a checkpoint that cannot be read.
  """
  steps = list_steps(workdir)
  if not steps:
    return
  _scores_of(workdir)  # orbax will read all, and name no damaged one
  stored = _read_json(_step_directory(workdir, steps[-1]) / "meta")
  here = f"work dir {pathlib.Path(workdir).absolute()} (step {steps[-1]})"
  changed = [
    f"  {key}: {old} there, {new} now"
    for key, old, new in _differences(
      complete_config(stored["config"], where=here), meta["config"]
    )
    if key not in FREE_KEYS
  ]
  if changed:
    raise CheckpointError(
      f"{here} was made with another configuration:\n"
      + "\n".join(changed)
      + "\nSet these back to continue it, or choose another --workdir."
    )
  for what, remedy, old, new in (
    (
      "another tokenizer",
      "data.tokenizer to the copy in the work dir",
      stored["tokenizer_sha256"],
      meta["tokenizer_sha256"],
    ),
    (
      "other training data",
      "data.dir to the same data",
      stored["lineage"]["data_sha256"],
      meta["lineage"]["data_sha256"],
    ),
  ):
    if old != new:
      raise CheckpointError(
        f"{here} was made with {what}: sha256 {old[:12]} there, {new[:12]} "
        f"now. Set {remedy}, or choose another --workdir."
      )


def complete_config(stored: Mapping[str, Any], *, where: str) -> dict[str, Any]:
  """A stored configuration with the keys it lacks, warning of each.

  Those are keys that came later; they get their defaults.
  """
  defaults = json.loads(config_lib.to_json(config_lib.Config()))
  complete = _with_defaults(stored, defaults)
  added = [
    f"{key} = {value}" for key, _, value in _differences(stored, complete)
  ]
  if added:
    _log.warning(
      "%s: its configuration lacks keys, defaults are taken: %s",
      where,
      ", ".join(added),
    )
  return complete


def check_writable(workdir: str | os.PathLike[str]) -> None:
  """Checks, touching no file, that a run could write into a work dir.

  Raises:
    UserError: naming what stands in the way.
  """
  if pairs.is_data_dir(workdir):
    raise errors.UserError(
      f"--workdir={workdir} is a data directory, which a later preparation "
      "replaces: name another one"
    )
  for folder in (workdir, pathlib.Path(workdir) / "checkpoints"):
    errors.check_writable(folder, option=f"--workdir={workdir}")


def restore(
  workdir: str | os.PathLike[str], abstract_state: Any
) -> Restored | None:
  """Reads the latest checkpoint, or None where there is none.

  Args:
    workdir: of a training run; nothing in it is touched.
    abstract_state: ShapeDtypeStructs with the shardings wanted; they may be
      those of another mesh than the one that saved.

  Raises:
    CheckpointError: the stored tree has other names or shapes, or cannot be
      read.
  """
  steps = list_steps(workdir)
  if not steps:
    return None
  directory = _step_directory(workdir, steps[-1])
  with _damage_named(directory):
    _check_tree(
      _stored_tree(directory),
      abstract_state,
      what=f"checkpoint {steps[-1]} of {workdir}",
    )
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
      state = reader.restore(
        directory / "state", args=ocp.args.StandardRestore(abstract_state)
      )
  return Restored(state, _read_json(directory / "data"), steps[-1])


def list_steps(workdir: str | os.PathLike[str]) -> list[int]:
  """The whole checkpoints of a work dir, in order."""
  directory = pathlib.Path(workdir).absolute() / "checkpoints"
  if not directory.is_dir():
    return []
  return sorted(ocp.utils.checkpoint_steps(directory))


def find_step(workdir: str | os.PathLike[str], step: str | int) -> int:
  """The step of a whole checkpoint.

  Args:
    workdir: of a training run.
    step: "latest", "best" (by validation), a number, or "auto": the best one
      if the run was validated, else the latest.

  Raises:
    CheckpointError: there is no such checkpoint; the message lists those there.
  """
  steps = list_steps(workdir)
  if not steps:
    raise CheckpointError(f"{workdir} holds no checkpoint")
  if step == "latest":
    return steps[-1]
  if step in ("best", "auto"):
    scores = _scores_of(workdir)
    if not scores and step == "auto":
      return steps[-1]
    if not scores:
      raise CheckpointError(
        f"no checkpoint of {workdir} was validated (train.eval_every is 0?), "
        "so none is the best: ask for 'latest' or one of "
        f"{steps}"
      )
    return _best(scores)
  if not str(step).isdigit() or int(step) not in steps:
    raise CheckpointError(
      f"{workdir} has no checkpoint {step!r}: choose 'latest', 'best' or one "
      f"of {steps}"
    )
  return int(step)


def read_meta(workdir: str | os.PathLike[str]) -> dict[str, Any]:
  """What `make_meta` gave to the latest checkpoint."""
  directory = _step_directory(workdir, find_step(workdir, "latest"))
  return _read_json(directory / "meta")


def restore_params(
  workdir: str | os.PathLike[str],
  *,
  step: str | int = "latest",
  sharding: jax.sharding.Sharding | None = None,
) -> Snapshot:
  """Reads the parameters of a checkpoint, with what is known about them.

  Args:
    workdir: of a training run.
    step: as for `find_step`.
    sharding: where every parameter goes; None: the first local device.

  Raises:
    CheckpointError: no such checkpoint, one that cannot be read, or one whose
      parameters are not those its own configuration asks for.
  """
  number = find_step(workdir, step)
  directory = _step_directory(workdir, number)
  meta = _read_json(directory / "meta")
  config = config_lib.from_config_dict(
    complete_config(meta["config"], where=str(directory))
  )
  abstract = state_lib.abstract_create(config).params
  if sharding is None:
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  # Without a sharding orbax would return the stored shape in silence.
  target = {
    "params": jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
      abstract,
    )
  }
  with _damage_named(directory):
    _check_tree(
      _stored_tree(directory)["params"],
      abstract,
      what=f"checkpoint {number} of {workdir}",
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
      state = reader.restore(
        directory / "state",
        args=ocp.args.PyTreeRestore(
          target,
          restore_args=ocp.checkpoint_utils.construct_restore_args(target),
          partial_restore=True,
        ),
      )
  scored = directory / "metrics"
  scores = _scores_of(workdir)
  return Snapshot(
    config=config,
    params=state["params"],
    step=number,
    metrics=_read_json(scored) if scored.is_dir() else {},
    lineage={
      **meta["lineage"],
      "workdir": str(pathlib.Path(workdir).absolute()),
      "step": number,
      "tokenizer_sha256": meta["tokenizer_sha256"],
      "eval_splits": list(config.train.validation_splits),
      # By number as well: whoever names it may have looked it up.
      "picked_as_best": (
        step != "latest" and bool(scores) and number == _best(scores)
      ),
    },
  )


def flatten(tree: Any, *, separator: str = "/") -> dict[str, Any]:
  """Maps "a/b/c" to each leaf; fields, keys and indices name the way."""
  return {
    sharding_lib.path_name(path).replace("/", separator): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def _score(metrics: Mapping[str, float]) -> float:
  """What keep-best orders by; a step without validation is never best."""
  return metrics[BEST_METRIC] if BEST_METRIC in metrics else -math.inf


def _best(scores: Mapping[int, float]) -> int:
  """The step of the highest score; of equals the later, as orbax keeps it."""
  return max(scores, key=lambda step: (scores[step], step))


def _scores_of(workdir: str | os.PathLike[str]) -> dict[int, float]:
  return _list_scores(pathlib.Path(workdir).absolute() / "checkpoints")


def _list_scores(directory: pathlib.Path) -> dict[int, float]:
  if not directory.is_dir():
    return {}
  found = {}
  for step in ocp.utils.checkpoint_steps(directory):
    metrics = directory / str(step) / "metrics"
    score = _score(_read_json(metrics)) if metrics.is_dir() else -math.inf
    if score > -math.inf:
      found[step] = score
  return found


def _step_directory(workdir: str | os.PathLike[str], step: int) -> pathlib.Path:
  return pathlib.Path(workdir).absolute() / "checkpoints" / str(step)


@contextlib.contextmanager
def _damage_named(directory: pathlib.Path) -> Iterator[None]:
  """Turns what reading a checkpoint raises into an error that names it."""
  try:
    yield
  except CheckpointError:
    raise
  except Exception as error:  # orbax raises Exception itself, too
    reason = (str(error).splitlines() or [repr(error)])[0]
    raise CheckpointError(
      f"{directory}: cannot be read ({reason:.200}). If its files are damaged, "
      "move that folder away to go on from the checkpoint before, or choose "
      "another --workdir."
    ) from error


def _read_json(path: pathlib.Path) -> dict[str, Any]:
  """Reads what JsonSave wrote for one item of a step."""
  name = "metrics" if path.name == "metrics" else "metadata"
  with _damage_named(path.parent):
    return json.loads((path / name).read_text(encoding="utf-8"))


def _stored_tree(directory: pathlib.Path) -> Any:
  """Shapes and types as stored, read without any array."""
  handler = ocp.PyTreeCheckpointHandler()
  try:
    return handler.metadata(directory / "state").tree
  finally:
    handler.close()


def _check_tree(stored: Any, wanted: Any, *, what: str) -> None:
  """Compares names and shapes before orbax reads anything."""
  old = {name: tuple(x.shape) for name, x in flatten(stored).items()}
  new = {name: tuple(x.shape) for name, x in flatten(wanted).items()}
  lines = [
    f"  {name}: {old[name] if name in old else 'missing'} stored, "
    f"{new[name] if name in new else 'no such array'} asked for"
    for name in sorted(old.keys() | new.keys())
    if (old[name] if name in old else None)
    != (new[name] if name in new else None)
  ]
  if lines:
    more = [f"  and {len(lines) - 20} more"] if len(lines) > 20 else []
    raise CheckpointError(
      f"{what} does not fit:\n" + "\n".join(lines[:20] + more)
    )


def _with_defaults(
  stored: Mapping[str, Any], defaults: Mapping[str, Any]
) -> dict[str, Any]:
  complete = {**defaults, **stored}
  for key, default in defaults.items():
    if isinstance(default, dict) and isinstance(complete[key], dict):
      complete[key] = _with_defaults(complete[key], default)
  return complete


def _differences(
  old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any, Any]]:
  """Yields (dotted key, old, new) where two nested dicts differ."""
  for key in sorted(old.keys() | new.keys()):
    name = prefix + key
    if key not in old:
      yield name, "nothing", new[key]
    elif key not in new:
      yield name, old[key], "nothing"
    elif isinstance(old[key], dict) and isinstance(new[key], dict):
      yield from _differences(old[key], new[key], f"{name}.")
    elif old[key] != new[key]:
      yield name, old[key], new[key]
