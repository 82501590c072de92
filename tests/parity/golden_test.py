"""Parity with the published SCL/GLSCL code, number by number.

Each sub-folder of --golden-dir is one training step of the published code on
tiny sizes: inputs, activations, losses, gradient norms and the norms of the
first AdamW update. Parameters follow from a seed and their names.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
import re
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from glscl_jax import sharding
from glscl_jax.config import (
  Config,
  DataConfig,
  FusionConfig,
  ModelConfig,
  ObjectiveConfig,
  OptimizerConfig,
  TextConfig,
  VisionConfig,
)
from glscl_jax.models import layers, pretrained
from glscl_jax.models.towers import Towers
from glscl_jax.systems import glscl
from glscl_jax.train import optimizer
from glscl_jax.types import Batch

LOSS_TOLERANCE = 1e-5  # relative
ACTIVATION_TOLERANCE = 2e-5  # absolute
GRADIENT_TOLERANCE = 2e-4  # relative, where the golden norm is above NOISE
UPDATE_TOLERANCE = 1e-3  # relative
TABLE_UPDATE_TOLERANCE = 2e-3  # relative, arrays of vocabulary size
NOISE = 1e-6  # gradients that are zero on paper stay below

NORM_SCALES = re.compile(
  r".*(LayerNorm\.weight|ln_1\.weight|ln_2\.weight|ln_pre\.weight"
  r"|ln_post\.weight|_proj\.1\.weight|_classifier\.1\.weight)"
)


@dataclasses.dataclass(frozen=True)
class Golden:
  """The files of one mode."""

  inputs: dict[str, np.ndarray]
  activations: dict[str, np.ndarray]
  expected: dict
  float64: dict | None

  @property
  def shapes(self) -> dict[str, tuple[int, ...]]:
    return {k: tuple(v) for k, v in self.expected["shapes"].items()}


@dataclasses.dataclass(frozen=True)
class Step:
  """Our own step on the same numbers."""

  golden: Golden
  config: Config
  batch: Batch
  params: dict
  metrics: dict[str, float]
  grads: dict

  @functools.cached_property
  def named_grads(self) -> dict[str, np.ndarray]:
    return pretrained.to_scl(self.grads)

  @functools.cached_property
  def passes(self) -> dict[str, np.ndarray]:
    return jax.tree.map(
      np.asarray, run_passes(self.config, self.params, self.batch)
    )


def load(folder: pathlib.Path) -> Golden:
  def arrays(name: str) -> dict[str, np.ndarray]:
    with np.load(folder / name) as file:
      return dict(file)

  def numbers(name: str) -> dict | None:
    path = folder / name
    return json.loads(path.read_text()) if path.exists() else None

  return Golden(
    inputs=arrays("inputs.npz"),
    activations=arrays("acts.npz"),
    expected=numbers("expected.json"),
    float64=numbers("float64.json"),
  )


def named_values(golden: Golden) -> dict[str, np.ndarray]:
  """Every parameter of the published model, by the formula."""

  def value(name: str, shape: tuple[int, ...]) -> np.ndarray:
    seeds = [golden.expected["seed"], zlib.crc32(name.encode())]
    z = np.random.default_rng(seeds).standard_normal(shape)
    z = np.asarray(z).astype(np.float32)
    if NORM_SCALES.fullmatch(name):
      return np.float32(1) + np.float32(0.1) * z
    if name == "cl_temp":
      return np.array(0.07, np.float32)
    return np.float32(0.06 if z.ndim >= 2 else 0.02) * z

  return {name: value(name, shape) for name, shape in golden.shapes.items()}


def count_layers(names, pattern: str) -> int:
  found = (re.match(pattern, name) for name in names)
  return 1 + max(int(match[1]) for match in found if match)


def make_config(golden: Golden) -> Config:
  """The sizes of the golden parameters, float32, the published settings."""
  shapes = golden.shapes
  batch, _, image_size, _ = golden.inputs["image"].shape
  width, _, patch_size, _ = shapes[pretrained.PATCHES]
  words = shapes["text_transformer.embeddings.word_embeddings.weight"]
  rows = shapes["text_transformer.embeddings.position_embeddings.weight"]
  count = functools.partial(count_layers, shapes)
  rates = sorted({rate for rate, _ in golden.expected["lr_and_decay"].values()})
  return Config(
    model=ModelConfig(
      vision=VisionConfig(
        image_size=image_size,
        patch_size=patch_size,
        width=width,
        depth=count(r"vision_transformer\.visual.*resblocks\.(\d+)"),
      ),
      text=TextConfig(
        vocab_size=words[0],
        max_length=golden.inputs["text_ids"].shape[1],
        width=words[1],
        depth=count(r"text_transformer\.encoder\.layer\.(\d+)"),
        num_positions=rows[0],
        dropout=0.0,
      ),
      fusion=FusionConfig(
        width=shapes["cross_modal_text_transform.weight"][0],
        depth=count(r"cross_modal_text_layers\.(\d+)"),
        dropout=0.0,
      ),
      joint_width=shapes["vision_proj.3.weight"][0],
      compute_dtype="float32",
      remat="none",
    ),
    # One process: every contrast and every draw spans the whole batch.
    objectives=ObjectiveConfig(
      itm_negatives="dataset",
      neg_group=batch,
      text_mgsc_group=None,
      mltc_image_group=batch,
      mltc_text_group=batch,
      itc_temperature_range=None,
    ),
    data=DataConfig(batch_size=batch),
    optimizer=OptimizerConfig(
      learning_rate=rates[0],
      fusion_multiplier=rates[-1] / rates[0],
      head_multiplier=rates[-1] / rates[0],
      warmup_fraction=0.0,
      variant="hf",
      decay_norms=True,
    ),
  )


def as_index(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """A boolean (B, L) mask as positions (B, J) and which of them count."""
  slots = max(1, int(mask.sum(axis=1).max()))
  positions = np.argsort(~mask, axis=1, kind="stable")[:, :slots]
  ok = np.take_along_axis(mask, positions, axis=1)
  return np.where(ok, positions, 0).astype(np.int32), ok


def make_batch(inputs: dict[str, np.ndarray]) -> Batch:
  def ids(name: str) -> jax.Array:
    return jnp.asarray(inputs[name], jnp.int32)

  def image(name: str) -> jax.Array:
    return jnp.asarray(inputs[name].transpose(0, 2, 3, 1))

  labels = inputs["text_labels_mlm"]
  mlm_pos, mlm_ok = as_index(labels != -100)
  mlm_labels = np.take_along_axis(labels, mlm_pos, axis=1)
  scl_pos, scl_ok = as_index(
    inputs["scl_masked_text_ids"] != inputs["text_ids"]
  )
  tok_idx, tok_ok = as_index(inputs["image_token_mask"].astype(bool))
  assert tok_ok.all(), "images hide different numbers of patches"
  return Batch(
    image_BYXC=image("image"),
    identity_BM=jnp.arange(len(labels), dtype=jnp.int32)[:, None],
    text_ids_BT=ids("text_ids"),
    text_valid_BT=jnp.asarray(inputs["text_masks"].astype(bool)),
    mlm_ids_BT=ids("text_ids_mlm"),
    mlm_pos_BJ=jnp.asarray(mlm_pos),
    mlm_labels_BJ=jnp.asarray(np.where(mlm_ok, mlm_labels, 0), jnp.int32),
    mlm_ok_BJ=jnp.asarray(mlm_ok),
    scl_ids_BT=ids("scl_masked_text_ids"),
    scl_pos_BJ=jnp.asarray(scl_pos),
    scl_ok_BJ=jnp.asarray(scl_ok),
    keep_idx_BI=ids("ids_keep"),
    tok_idx_BI=jnp.asarray(tok_idx),
    itm_labels_B=ids("itm_labels"),
    false_image_BYXC=image("false_image"),
  )


def run_pretrain(golden: Golden) -> Step:
  """The step of pre-training: ITM, MLM, ITC, MGSC, MLTC."""
  config = make_config(golden)
  key = jax.random.key(0)
  like = jax.eval_shape(functools.partial(glscl.init, config), key)
  params = jax.tree.map(
    jnp.asarray, pretrained.from_scl(named_values(golden), like)
  )
  batch = make_batch(golden.inputs)

  @jax.jit
  def step(params, batch):
    def loss(params):
      output = glscl.loss(params, batch, config=config, key=key)
      return output.loss, output.metrics

    return jax.value_and_grad(loss, has_aux=True)(params)

  (_, metrics), grads = step(params, batch)
  metrics = {name: float(value) for name, value in metrics.items()}
  return Step(golden, config, batch, params, metrics, grads)


def run_passes(config: Config, params: dict, batch: Batch) -> dict:
  """Every pass of the published code on its own, without any sharing."""

  def fuse(model, text_enc, image_enc):
    streams = model.fusion.body(
      model.fusion.transform_text(text_enc),
      batch.text_valid_BT,
      model.fusion.transform_image(image_enc),
    )
    text_feats, image_feats = model.fusion.head(streams, batch.text_valid_BT)
    return {
      "text_enc": text_enc,
      "image_enc": image_enc,
      "text_feats": text_feats,
      "image_feats": image_feats,
      "cls_feats": model.fusion.pool(text_feats[:, 0], image_feats[:, 0]),
    }

  def method(model: Towers) -> dict:
    own = (batch.itm_labels_B == 1)[:, None, None, None]
    shown = jnp.where(own, batch.image_BYXC, batch.false_image_BYXC)
    vision, embedded = model.vision, model.vision.embed(batch.image_BYXC)
    dropped = vision.encode(vision.drop(embedded, batch.keep_idx_BI))
    hidden = vision.encode(vision.hide(embedded, batch.tok_idx_BI))
    clean = model.text(batch.text_ids_BT, batch.text_valid_BT)
    mlm = model.text(batch.mlm_ids_BT, batch.text_valid_BT)
    scl = model.text(batch.scl_ids_BT, batch.text_valid_BT)
    image = vision(batch.image_BYXC)
    passes = {
      0: fuse(model, clean, vision(shown)),
      1: fuse(model, mlm, image),
      2: {"text_enc": clean, "image_enc": image},
      3: fuse(model, clean, dropped),
      4: fuse(model, clean, hidden),
      5: fuse(model, scl, image),
    }
    first = passes[0]
    logits = model.match_logits(
      first["text_feats"][:, 0], first["image_feats"][:, 0]
    )
    named = {
      f"{number}/{name}": value
      for number, values in passes.items()
      for name, value in values.items()
    }
    return named | {"itm_logits": logits}

  @jax.jit
  def run(params):
    return Towers(config.model).apply({"params": params}, method=method)

  return run(params)


IMPLEMENTED = {"pretrain": run_pretrain}


def pytest_generate_tests(metafunc):
  if "folder" not in metafunc.fixturenames:
    return
  root = metafunc.config.getoption("--golden-dir")
  folders = sorted(p.parent for p in root.glob("*/expected.json"))
  if not folders:
    raise pytest.UsageError(
      f"--golden-dir={root} holds no MODE/expected.json; give a folder with "
      "one sub-folder a mode, such as tests/golden"
    )
  metafunc.parametrize(
    "folder", folders, ids=lambda path: path.name, scope="session"
  )


@pytest.fixture(scope="session")
def step(folder) -> Step:
  golden = load(folder)
  mode = golden.expected["mode"]
  if mode not in IMPLEMENTED:
    pytest.skip(f"the system of mode {mode!r} is not implemented")
  return IMPLEMENTED[mode](golden)


def relative(found: float, wanted: float) -> float:
  return abs(found - wanted) / max(abs(wanted), 1e-12)


def norm(array: np.ndarray) -> float:
  return float(np.linalg.norm(np.asarray(array, np.float64)))


def fail_if(problems: list[str], checked: int) -> None:
  """`problems` must be empty, and something must have been checked."""
  assert checked > 0
  assert not problems, f"{len(problems)} of {checked}:\n" + "\n".join(problems)


def our_losses(step: Step) -> dict[str, float]:
  """Under the published names."""
  values, weights = step.metrics, step.config.objectives
  completion = ("mgsc_image", "mgsc_text", "mltc_image", "mltc_text")
  return {
    "itm_loss": values["itm"],
    "mlm_loss": values["mlm"],
    "contrast_loss": values["itc"],
    "log:msm/train/con_img_loss": values["mgsc_image"],
    "log:msm/train/con_txt_loss": values["mgsc_text"],
    "log:msm/train/image_tokens_loss": values["mltc_image"],
    "log:msm/train/text_tokens_loss": values["mltc_text"],
    "msm_loss": sum(getattr(weights, n) * values[n] for n in completion),
    "total": values["loss"],
  }


def test_the_published_checkpoint_names_fill_every_parameter(step):
  arrays = named_values(step.golden)
  ours = pretrained.to_scl(step.params)
  for name, array in ours.items():
    np.testing.assert_array_equal(array, arrays[name], err_msg=name)
  unused = set(arrays) - set(ours)
  grad_norms = step.golden.expected["grad_norms"]
  assert {name for name in arrays if grad_norms.get(name) is None} == unused


def test_losses_equal_the_published_ones(step):
  found = our_losses(step)
  problems = [
    f"{name}: {value!r}, published {step.golden.expected['losses'][name]!r}"
    for name, value in found.items()
    if not relative(value, step.golden.expected["losses"][name])
    <= LOSS_TOLERANCE
  ]
  fail_if(problems, len(found))


def test_losses_equal_the_published_ones_run_in_float64(step):
  if step.golden.float64 is None:
    pytest.skip("no float64.json in this folder")
  wanted = step.golden.float64["losses"]
  found = our_losses(step)
  problems = [
    f"{name}: {value!r}, float64 {wanted[name]!r}"
    for name, value in found.items()
    if not relative(value, wanted[name]) <= LOSS_TOLERANCE
  ]
  fail_if(problems, len(found))


def test_activations_equal_the_published_ones(step):
  published = step.golden.activations
  assert set(step.passes) == set(published)
  problems = []
  for name, wanted in published.items():
    worst = np.max(np.abs(step.passes[name] - wanted))
    if not worst <= ACTIVATION_TOLERANCE:
      problems.append(f"{name}: off by {worst:.2e}")
  fail_if(problems, len(published))


def test_gradient_norms_equal_the_published_ones(step):
  published = step.golden.expected["grad_norms"]
  problems, checked = [], 0
  for name, wanted in published.items():
    if wanted is None:
      assert name not in step.named_grads
      continue
    found = norm(step.named_grads[name])
    if wanted <= NOISE:
      # Zero on paper, rounding in both codes.
      bad = not found <= 10 * NOISE
    else:
      checked += 1
      bad = not relative(found, wanted) <= GRADIENT_TOLERANCE
    if bad:
      problems.append(f"{name}: {found!r}, published {wanted!r}")
  fail_if(problems, checked)


def test_learning_rates_and_decay_are_grouped_as_published(step):
  settings = step.config.optimizer

  def both(path, leaf):
    name = sharding.path_name(path)
    rate = settings.learning_rate * optimizer.lr_multiplier(name, settings)
    decay = settings.weight_decay if optimizer.decays(name, settings) else 0.0
    return np.full(leaf.shape, rate), np.full(leaf.shape, decay)

  pairs = jax.tree_util.tree_map_with_path(both, step.params)
  rates, decays = jax.tree.transpose(
    jax.tree.structure(step.params), jax.tree.structure((0, 0)), pairs
  )
  rates, decays = pretrained.to_scl(rates), pretrained.to_scl(decays)
  problems = []
  for name in rates:
    rate, decay = step.golden.expected["lr_and_decay"][name]
    same = np.allclose(rates[name], rate, rtol=1e-9)
    if not (same and np.all(decays[name] == decay)):
      found = np.unique(rates[name]), np.unique(decays[name])
      problems.append(f"{name}: {found}, published {rate, decay}")
  fail_if(problems, len(rates))


def test_norms_of_the_first_adamw_update_equal_the_published_ones(step):
  settings = step.config.optimizer
  transform = optimizer.make_optimizer(settings, step.config.train.num_steps)

  @jax.jit
  def change(params, grads):
    updates, _ = transform.update(grads, transform.init(params), params)
    # As measured on the published code: float32 parameters after - before.
    after = optax.apply_updates(params, updates)
    return jax.tree.map(jnp.subtract, after, params)

  changes = pretrained.to_scl(change(step.params, step.grads))
  vocab_size = step.config.model.text.vocab_size
  problems, checked = [], 0
  for name, change in changes.items():
    wanted = step.golden.expected["adamw_update_norms"][name]
    low = high = wanted
    if name.endswith("key.bias"):
      continue  # the gradient is zero on paper, its direction is rounding
    if name.endswith("in_proj_bias"):
      # So is the key third: published updates may contain it or not.
      query, key, value = np.split(change, 3)
      change = np.concatenate([query, value])
      noise = step.golden.expected["lr_and_decay"][name][0] * key.size**0.5
      low = max(wanted**2 - noise**2, 0.0) ** 0.5
    checked += 1
    tolerance = (
      TABLE_UPDATE_TOLERANCE if vocab_size in change.shape else UPDATE_TOLERANCE
    )
    found = norm(change)
    if not low * (1 - tolerance) <= found <= high * (1 + tolerance):
      problems.append(f"{name}: {found!r}, published {wanted!r}")
  fail_if(problems, checked)


def test_the_published_code_repeats_the_passes_that_we_share(step):
  """What makes sharing exact: these encodings are equal bit for bit."""
  published = step.golden.activations
  for number in (2, 5):
    np.testing.assert_array_equal(
      published["1/image_enc"], published[f"{number}/image_enc"]
    )
  own = step.golden.inputs["itm_labels"] == 1
  assert own.any()
  np.testing.assert_array_equal(
    published["1/image_enc"][own], published["0/image_enc"][own]
  )
  for number in (2, 3, 4):
    np.testing.assert_array_equal(
      published["0/text_enc"], published[f"{number}/text_enc"]
    )


def test_shared_passes_equal_the_published_ones(step):
  """The rows that the losses read, as encoded and fused once a step."""
  config, batch = step.config, step.batch
  plan = glscl.make_plan(config.objectives)

  @jax.jit
  def run(params):
    def method(model):
      encoded = glscl.encode(model, batch, plan, config, jax.random.key(0))
      fused = glscl.fuse(model, batch, encoded, plan, config)
      return {
        (number, stream, name): rows[key][name]
        for number, key in PASSES.items()
        for stream, rows in (("text", fused.text), ("image", fused.image))
        for name in rows[key].offsets
      }

    return Towers(config.model).apply({"params": params}, method=method)

  index = {
    "class": jnp.zeros((len(batch.text_ids_BT), 1), jnp.int32),
    "mlm": batch.mlm_pos_BJ,
    "scl": batch.scl_pos_BJ,
    "token": batch.tok_idx_BI + 1,
  }
  problems = []
  rows = run(step.params)
  for (number, stream, name), found in rows.items():
    full = jnp.asarray(step.golden.activations[f"{number}/{stream}_feats"])
    wanted = layers.take_rows(full, index[name])
    worst = float(jnp.max(jnp.abs(found - wanted)))
    if not worst <= ACTIVATION_TOLERANCE:
      problems.append(f"pass {number} {stream} {name}: off by {worst:.2e}")
  assert {number for number, _, _ in rows} == set(PASSES)
  fail_if(problems, len(rows))


# Pass 2 (ITC) is not fused.
PASSES = {
  0: glscl.Pass("itm", "full"),
  1: glscl.Pass("full", "mlm"),
  3: glscl.Pass("drop", "full"),
  4: glscl.Pass("token", "full"),
  5: glscl.Pass("full", "scl"),
}
