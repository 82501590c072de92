"""Training on one batch until it is known by heart, for any system."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

from glscl_jax import sharding
from glscl_jax.config import Config, MeshConfig
from glscl_jax.data import masking
from glscl_jax.systems import registry
from glscl_jax.train import state as state_lib
from glscl_jax.train import step as step_lib
from glscl_jax.types import Batch
from tests import random_pairs

NUM_PAIRS = 32


def make_batch(config: Config, draw_image) -> Batch:
  """Pictures by `draw_image(rng)`; captions of two words out of 8 and 4.

  Each pair of words is used once, so a masked word follows from the picture
  and never from the other word.
  """
  rng = np.random.default_rng(0)
  rows = [
    random_pairs.sample(
      config,
      masking.sample_rng(0, 0, index, "all"),
      draw_image(rng),
      np.array([10 + index % 8, 20 + index // 8]),
      index,
    )
    for index in range(NUM_PAIRS)
  ]
  return Batch(**{k: np.stack([row[k] for row in rows]) for k in rows[0]})


@dataclasses.dataclass(frozen=True)
class Trained:
  """The end of the run; metrics are those of a step, as floats."""

  params: dict
  first: dict[str, float]
  last: dict[str, float]
  shuffled: dict[str, float]  # of the trained model, with others' captions


def train(config: Config, batch: Batch) -> Trained:
  """`config.train.num_steps` steps on one device, and one with wrong texts."""
  mesh = sharding.make_mesh(MeshConfig(), devices=jax.devices()[:1])

  def put(batch):
    return jax.device_put(batch, sharding.batch_sharding(mesh))

  # The shift changes both words of every caption.
  texts = {
    name: np.roll(array, 9, axis=0)
    for name, array in vars(batch).items()
    if name.startswith(("text_", "mlm_", "scl_", "amc_"))
    and not name.startswith("amc_region")
    and array is not None
  }
  shuffled = put(random_pairs.change(batch, **texts))
  batch = put(batch)
  key = state_lib.run_key(config, mesh, "step")
  train_step = (
    step_lib.make_train_step(config, mesh)
    .lower(state_lib.abstract_state(config, mesh), batch, key)
    .compile()
  )
  state = state_lib.make_state(config, mesh)

  def step(state, batch):
    state, metrics = train_step(state, batch, key)
    return state, {name: float(value) for name, value in metrics.items()}

  state, first = step(state, batch)
  for _ in range(config.train.num_steps - 1):
    state, last = step(state, batch)
  params = jax.tree.map(np.array, state.params)
  return Trained(params, first, last, step(state, shuffled)[1])


def ranks(score_BB):
  """How many others score at least as high as the own one, both ways."""
  own_B1 = np.diag(score_BB)[:, None]
  return (
    np.sum(score_BB >= own_B1, axis=1) - 1,
    np.sum(score_BB.T >= own_B1, axis=1) - 1,
  )


def scores(config: Config, params, batch: Batch) -> dict[str, np.ndarray]:
  """Text by image: similarity of vectors and ITM of all pairs, as there is."""
  system = registry.find(config)

  @jax.jit
  def compute(params, batch):
    valid_BT = batch.text_valid_BT
    x_BLD = system.encode_text(
      params, batch.text_ids_BT, valid_BT, config=config
    )
    visual, found = system.see(batch), {}
    y_BMD = system.encode_visual(params, visual, config=config)
    if system.text_vectors is not None:
      text_BE = system.text_vectors(params, x_BLD, config=config)
      image_BE = system.image_vectors(params, y_BMD, config=config)
      found["vectors"] = text_BE @ image_BE.T
    if system.match_scores is None:
      return found
    text, image = np.divmod(np.arange(NUM_PAIRS**2), NUM_PAIRS)
    match = system.match_scores(
      params,
      x_BLD[text],
      valid_BT[text],
      y_BMD[image],
      None if visual.valid is None else visual.valid[image],
      config=config,
    )
    return found | {"matching": match.reshape(NUM_PAIRS, NUM_PAIRS)}

  return jax.tree.map(np.asarray, compute(params, batch))
