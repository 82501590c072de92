import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glscl_jax import config as config_lib
from glscl_jax.models import stem
from tests import random_pairs

CONFIG = random_pairs.config(vision={"stem": (8, 64), "stem_blocks": (1, 0)})


def test_cells_join_as_patches_do():
  x_BYXD = np.arange(2 * 4 * 6 * 3).reshape(2, 4, 6, 3)
  joined_BYXD = stem.join_cells(x_BYXD, 2)
  assert joined_BYXD.shape == (2, 2, 3, 12)
  np.testing.assert_array_equal(
    joined_BYXD[1, 1, 2], x_BYXD[1, 2:4, 4:6].reshape(-1)
  )


def test_blank_keeps_the_pixels_of_visible_patches_only():
  image_BYXC = np.ones((1, 6, 4, 3), np.float32)
  visible_BI = np.array([[True, False, False, False, False, True]])
  kept_YX = np.asarray(stem.blank(image_BYXC, visible_BI, 2))[0, :, :, 0]
  expected_YX = np.zeros((6, 4))
  expected_YX[:2, :2] = expected_YX[4:, 2:] = 1
  np.testing.assert_array_equal(kept_YX, expected_YX)


def test_a_convolution_reads_the_nine_cells_around(key):
  module = stem.Convolution("float32")
  x_BYXD = jax.random.normal(key, (1, 5, 4, 2))
  params = module.init(key, x_BYXD)
  y_BYXD = module.apply(params, x_BYXD)
  kernel_33DF = params["params"]["kernel"].reshape(3, 3, 2, 2)
  wide_YXD = np.pad(x_BYXD[0], ((1, 1), (1, 1), (0, 0)))
  expected_D = np.einsum("yxd,yxdf->f", wide_YXD[2:5, 1:4], kernel_33DF)
  np.testing.assert_allclose(y_BYXD[0, 2, 1], expected_D, rtol=1e-4, atol=1e-5)


def test_it_gives_one_embedding_a_patch_and_reads_neighbours(key):
  module = stem.Stem(CONFIG.model)
  image_BYXC = jax.random.normal(key, (1, 32, 32, 3))
  params = jax.tree.map(
    lambda leaf: jax.random.normal(key, leaf.shape),
    jax.jit(module.init)(key, image_BYXC),
  )
  apply = jax.jit(module.apply)
  x_BID = apply(params, image_BYXC)
  assert x_BID.shape == (1, 16, 64)
  changed = x_BID != apply(params, image_BYXC.at[:, 8, 8].add(1.0))
  # Pixel (8, 8) is the corner of patch 5: two convolutions of 4-pixel cells
  # carry it 8 pixels, so to patch 0 but not to the far corner.
  rows_I = np.any(np.asarray(changed)[0], axis=-1)
  assert rows_I[5] and rows_I[0] and not rows_I[15]


@pytest.mark.parametrize(
  ("options", "path"),
  [
    ({"stem": (0, 64), "stem_blocks": (1, 1)}, "stem: not all positive"),
    ({"stem": (8, 16), "stem_blocks": (1, 1)}, "does not end with width 64"),
    ({"stem": (8, 64), "stem_blocks": (1,)}, "stem_blocks: needs one number"),
    (
      {"stem": (2, 2, 2, 2, 64), "stem_blocks": (0,) * 5, "patch_size": 8},
      "stem: 5 stages do not halve to patch_size 8",
    ),
  ],
)
def test_a_stem_that_does_not_fit_names_its_field(options, path):
  with pytest.raises(config_lib.ConfigError, match=path):
    config_lib.VisionConfig(
      **{"image_size": 32, "patch_size": 8, "width": 64} | options
    )


def test_fresh_residual_branches_can_start_as_the_identity(key):
  block = stem.ResidualBlock("float32", 1e-5, "gelu", zero=True)
  x_BYXD = jax.random.normal(key, (1, 4, 4, 8))
  y_BYXD, _ = block.init_with_output(key, x_BYXD)
  np.testing.assert_array_equal(y_BYXD, jnp.asarray(x_BYXD))
