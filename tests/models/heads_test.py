import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glscl_jax.models import heads, layers, products
from tests import random_pairs


def init(module, *inputs):
  return jax.jit(module.init)(jax.random.key(0), *inputs)["params"]


def test_projection_starts_with_the_framework_default_spread():
  params = init(heads.JointProjection(32, "float32"), jnp.zeros((2, 64)))
  for name, shape in (("fc1", (64, 64)), ("fc2", (64, 32))):
    kernel, bias = params[name]["kernel"], params[name]["bias"]
    assert kernel.shape == shape
    for leaf in (kernel, bias):
      assert np.abs(leaf).max() <= 64**-0.5
      assert np.abs(leaf).max() > 0.8 * 64**-0.5


def test_projection_is_linear_norm_gelu_linear():
  module = heads.JointProjection(32, "float32")
  x_BD = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)
  params = init(module, x_BD)
  h = x_BD @ params["fc1"]["kernel"] + params["fc1"]["bias"][None]
  h = (h - h.mean(1, keepdims=True)) / np.sqrt(h.var(1)[:, None] + 1e-5)
  h = 0.5 * h * (1 + jax.lax.erf(h / np.sqrt(2).astype(np.float32)))
  expected = h @ params["fc2"]["kernel"] + params["fc2"]["bias"][None]
  np.testing.assert_allclose(
    module.apply({"params": params}, x_BD), expected, atol=1e-5
  )


def test_a_linear_projection_is_one_matrix_and_bias():
  config = random_pairs.maskvlm().model
  module = heads.make_projection(config)
  x_BD = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)
  params = init(module, x_BD)
  assert set(params) == {"kernel", "bias"}
  assert params["kernel"].shape == (64, config.joint_width)
  np.testing.assert_allclose(
    module.apply({"params": params}, x_BD),
    x_BD @ params["kernel"] + params["bias"][None],
    atol=1e-5,
  )


def test_the_projection_of_coca_is_one_matrix():
  config = random_pairs.config(joint_projection="matrix").model
  x_BD = np.random.default_rng(0).normal(size=(3, 64)).astype(np.float32)
  params = init(heads.make_projection(config), x_BD)
  assert set(params) == {"kernel"}
  assert np.std(params["kernel"]) == pytest.approx(64**-0.5, rel=0.1)


@pytest.mark.parametrize("use_bias", [True, False])
def test_the_end_of_a_decoder_is_a_norm_and_a_matrix(use_bias):
  module = heads.NormHead(100, "float32", 0.02, 1e-5, use_bias)
  x_BJD = np.random.default_rng(0).normal(size=(2, 5, 64)).astype(np.float32)
  params = init(module, x_BJD)
  assert set(params) == {"norm", "fc"}
  assert set(params["fc"]) == {"kernel", *(["bias"] if use_bias else [])}
  unit = x_BJD - x_BJD.mean(axis=-1, keepdims=True)
  unit /= np.sqrt(x_BJD.var(axis=-1, keepdims=True) + 1e-5)
  np.testing.assert_allclose(
    module.apply({"params": params}, x_BJD),
    unit @ params["fc"]["kernel"],
    atol=1e-5,
  )


def test_the_pixel_head_gives_the_values_of_a_patch():
  module = heads.make_pixel_head(random_pairs.maskvlm().model)
  x_BJD = np.ones((2, 5, 64), np.float32)
  params = init(module, x_BJD)
  # 8 x 8 pixels of three colours.
  assert params["fc"]["kernel"].shape == (64, 192)
  assert module.apply({"params": params}, x_BJD).shape == (2, 5, 192)


@pytest.mark.parametrize(
  ("module", "shape", "out_shape"),
  [
    (heads.VocabularyHead(100, "bfloat16", 0.02), (2, 5, 64), (2, 5, 100)),
    (heads.LinearHead(2, "bfloat16", 0.02), (2, 128), (2, 2)),
    (heads.JointProjection(32, "bfloat16"), (2, 64), (2, 32)),
    (heads.NormHead(9, "bfloat16", 0.02, 1e-5, False), (2, 5, 64), (2, 5, 9)),
  ],
  ids=["vocabulary", "match", "projection", "decoder"],
)
def test_results_are_never_rounded_to_the_type_of_products(
  module, shape, out_shape, monkeypatch
):
  # As on an accelerator, where activations have the type of products.
  monkeypatch.setattr(products, "activation_dtype", jnp.dtype)
  x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  result, _ = module.init_with_output(jax.random.key(0), x)
  assert (result.shape, result.dtype) == (out_shape, jnp.float32)
  short = result.astype(jnp.bfloat16).astype(jnp.float32)
  assert not np.array_equal(result, short)


def test_a_tied_head_reads_with_a_matrix_of_others():
  rng = np.random.default_rng(0)
  x_BJD = rng.standard_normal((2, 5, 64)).astype(np.float32)
  kernel_DF = rng.standard_normal((64, 9)).astype(np.float32)
  module = heads.TiedHead(9, "float32", 0.02)
  params = init(module, x_BJD, kernel_DF)
  assert jax.tree.map(jnp.shape, params) == {
    "fc1": {"kernel": (64, 64), "bias": (64,)},
    "norm": {"scale": (64,), "bias": (64,)},
    "bias": (9,),
  }
  params = params | {"bias": np.arange(9, dtype=np.float32)}
  h = np.asarray(layers.gelu(x_BJD @ params["fc1"]["kernel"]))
  h = (h - h.mean(-1, keepdims=True)) / h.std(-1, keepdims=True)
  np.testing.assert_allclose(
    module.apply({"params": params}, x_BJD, kernel_DF),
    h @ kernel_DF + np.arange(9),
    atol=2e-3,
  )


def test_the_vocabulary_head_has_its_own_table():
  params = init(
    heads.VocabularyHead(1000, "float32", 0.02), jnp.zeros((1, 1, 64))
  )
  assert params["fc2"]["kernel"].shape == (64, 1000)
  assert np.std(params["fc2"]["kernel"]) == pytest.approx(0.02, rel=0.05)
  assert np.all(np.asarray(params["fc2"]["bias"]) == 0)
