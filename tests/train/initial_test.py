"""What train.init_from brings into a fresh state."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glscl_jax.train import checkpoint, initial

PARAMS = {
  "a": {"kernel": jnp.zeros((2, 3)), "bias": jnp.zeros((3,))},
  "b": {"kernel": jnp.zeros((3, 4))},
}


def test_init_from_loads_what_agrees_in_name_and_shape_and_names_the_rest():
  loaded = {
    "a": {"kernel": np.ones((2, 3), np.float16), "bias": np.ones((5,))},
    "c": {"kernel": np.ones((1,))},
  }
  params, merge = initial.merge_params(PARAMS, loaded)
  assert merge == initial.Merge(
    loaded=("a/kernel",),
    missing=("b/kernel",),
    unexpected=("c/kernel",),
    reshaped=("a/bias",),
  )
  assert params["a"]["kernel"].dtype == jnp.float32
  np.testing.assert_array_equal(params["a"]["kernel"], np.ones((2, 3)))
  np.testing.assert_array_equal(params["a"]["bias"], np.zeros((3,)))
  text = initial.format_merge("DIR", merge)
  assert "DIR: 1 parameters loaded" in text
  assert "1 unexpected there, left out: c/kernel" in text


def test_a_branch_that_is_wholly_new_is_one_entry():
  merge = initial.Merge(
    loaded=("text/norm/scale", "vision/patch/kernel"),
    missing=(
      "fusion/last/bias",
      "fusion/last/kernel",
      "head",
      "text/norm/bias",
      "vision/mask/value",
      "vision/stem/a",
      "vision/stem/b",
    ),
    unexpected=("old/a", "old/b", "text/type/a", "text/type/b"),
    reshaped=("text/type/c", "vision/stem/c"),
  )
  assert initial.format_merge("DIR", merge).splitlines()[1:] == [
    "  7 missing there, new here: fusion/* (2), head, text/norm/bias, "
    "vision/mask/value, vision/stem/a, vision/stem/b",
    "  4 unexpected there, left out: old/* (2), text/type/a, text/type/b",
    "  2 of another shape, new here: text/type/c, vision/stem/c",
  ]


def test_loaded_parameters_take_the_sharding_of_the_new_state():
  mesh = jax.make_mesh(
    (8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
  )
  where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
  params = {"kernel": jax.device_put(jnp.zeros((8, 2)), where)}
  found, _ = initial.merge_params(
    params, {"kernel": np.arange(16.0).reshape(8, 2)}
  )
  assert found["kernel"].sharding == where
  np.testing.assert_array_equal(found["kernel"], np.arange(16.0).reshape(8, 2))


def test_init_from_that_brings_nothing_is_an_error():
  _, merge = initial.merge_params(PARAMS, {"z": np.ones((1,))})
  with pytest.raises(checkpoint.CheckpointError, match="nothing of DIR fits"):
    initial.check_merge("DIR", merge)
