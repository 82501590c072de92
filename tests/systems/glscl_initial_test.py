import math

import jax
import numpy as np
import pytest

from tests import random_pairs

BATCH, WORDS = 16, 1000


@pytest.fixture(scope="module")
def metrics():
  """Losses of fresh parameters on distinct random samples."""
  config = random_pairs.config(
    batch_size=BATCH, vocab_size=WORDS, max_length=20
  )
  output = random_pairs.loss_function(config)(
    random_pairs.params(config),
    random_pairs.batch(config),
    jax.random.key(1),
  )
  return {name: float(value) for name, value in output.metrics.items()}


@pytest.mark.parametrize(
  ("name", "expected", "tolerance"),
  [
    ("itc", math.log(BATCH), 0.3),
    ("mlm", math.log(WORDS), 0.15),
    ("itm", math.log(2), 0.05),
  ],
)
def test_losses_start_where_a_guess_would(name, expected, tolerance, metrics):
  assert metrics[name] == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize("name", ["mgsc_image", "mgsc_text"])
def test_global_completion_starts_below_both_guesses(name, metrics):
  assert 0 < metrics[name] < 2 * math.log(BATCH) + 0.3


def test_the_loss_is_the_weighted_sum_of_the_objectives(metrics):
  whole = sum(
    metrics[name] for name in ("mlm", "itm", "itc", "mgsc_image", "mgsc_text")
  )
  local = metrics["mltc_image"] + metrics["mltc_text"]
  assert metrics["loss"] == pytest.approx(whole + 0.2 * local, rel=1e-5)


def test_accuracies_start_near_chance(metrics):
  assert metrics["mlm_accuracy"] < 0.05
  assert metrics["itc_accuracy"] <= 0.25
  assert np.isclose(metrics["itc_temperature"], 0.07)
