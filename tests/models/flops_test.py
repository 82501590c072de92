import pytest

from glscl_jax.models import flops


def vit(
  width: int,
  depth: int,
  patch_size: int,
  patches: int,
  *,
  projection_width: int = 0,
) -> int:
  """A complete ViT with a class token and a projection of it (0: none)."""
  return (
    flops.patch_embedding(width, patch_size, patches)
    + flops.encoder(width, depth, 1 + patches)
    + flops.linear(1, width, projection_width)
  )


@pytest.mark.parametrize(
  ("width", "depth", "patch_size", "projection_width", "published"),
  [
    (768, 12, 32, 512, 8.82),
    (768, 12, 16, 512, 35.13),
    (1024, 24, 14, 768, 162.03),
  ],
  ids=["B/32", "B/16", "L/14"],
)
def test_image_towers_cost_what_open_clip_publishes(
  width, depth, patch_size, projection_width, published
):
  count = vit(
    width,
    depth,
    patch_size,
    (224 // patch_size) ** 2,
    projection_width=projection_width,
  )
  assert count / 1e9 == pytest.approx(published, rel=1e-3)


def test_the_text_tower_costs_what_open_clip_publishes():
  count = flops.encoder(512, 12, 77) + flops.linear(1, 512, 512)
  assert count / 1e9 == pytest.approx(5.96, rel=1e-3)


def test_a_multiply_add_counts_as_two():
  assert flops.linear(3, 5, 7) == 2 * 3 * 5 * 7


def test_attention_counts_four_maps_and_two_mixings():
  maps = 2 * (4 * 4 + 4 * 4) * 10 + 2 * (4 * 4 + 4 * 4) * 3
  assert flops.attention(10, 3, 4) == maps + 2 * (2 * 10 * 3 * 4)


def test_a_stream_that_nobody_reads_costs_nothing():
  assert flops.cross_block(0, 50, 325, 768) == 0


def test_some_rows_cost_less_than_all_and_more_than_their_share():
  whole = flops.cross_block(50, 50, 325, 768)
  some = flops.cross_block(7, 50, 325, 768)
  assert whole * 7 / 50 < some < whole


def test_each_kind_of_joint_projection_costs_its_matrices():
  linear = 2 * 8 * 3
  found = {
    kind: flops.joint_projection(kind, 8, 3)
    for kind in ("mlp", "linear", "matrix", "none")
  }
  assert found == {
    "mlp": 2 * 8 * 8 + linear,
    "linear": linear,
    "matrix": linear,
    "none": 0,
  }
