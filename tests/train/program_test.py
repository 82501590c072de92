"""What is read from the text of a compiled program.

v5e_program.txt is the gradient of three layers x = relu(x W), 64 rows of 256
in bfloat16, for `v5e:2x2` (jax 0.10.2, libtpu 0.0.42.1): mesh data 2, fsdp 2;
rows over both, W over fsdp; without metadata.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from glscl_jax.train import program

TEXT = pathlib.Path(__file__).with_name("v5e_program.txt").read_text()
MESH = {"data": 2, "fsdp": 2}
LAYERS, WIDTH = 3, 256
ROWS = 16  # of a device
WEIGHT = WIDTH * WIDTH * 2  # bytes of a layer


@pytest.fixture(scope="module")
def work():
  return program.read(TEXT, MESH)


def test_products_of_a_loop_count_each_time(work):
  assert work.flops == LAYERS * 3 * 2 * ROWS * WIDTH * WIDTH


def test_weights_are_gathered_twice_and_gradients_scattered_and_summed(work):
  found = {
    (one.kind, one.axes): (one.bytes, one.group, one.count)
    for one in work.collectives
  }
  assert found == {
    # One of both is spread over the fusions of a layer by the compiler.
    ("all-gather", ("fsdp",)): (WEIGHT, 2, 2 * LAYERS),
    ("reduce-scatter", ("fsdp",)): (WEIGHT, 2, LAYERS),
    ("all-reduce", ("data",)): (WEIGHT // 2, 2, LAYERS),
  }


def test_memory_traffic_is_more_than_the_arguments_and_no_whole_loop_state(
  work,
):
  held = LAYERS * WEIGHT // 2 + ROWS * WIDTH * 2
  # States live in the fast memory; weights are read twice, gradients written.
  assert held < work.memory_bytes < 4 * held


def test_another_mesh_of_as_many_devices_gives_other_axes():
  found = program.read(TEXT, {"data": 1, "fsdp": 4})
  assert {one.axes for one in found.collectives} == {("fsdp",)}


def test_a_text_without_an_entry_is_refused():
  with pytest.raises(ValueError, match="no ENTRY"):
    program.read("nothing", MESH)


@pytest.mark.parametrize(
  ("attributes", "first", "axes"),
  [
    ("replica_groups={{0,1,2,3},{4,5,6,7}}", [0, 1, 2, 3], ("fsdp",)),
    ("replica_groups=[4,2]<=[2,4]T(1,0)", [0, 4], ("data",)),
    ("replica_groups=[1,8]<=[8]", list(range(8)), ("data", "fsdp")),
    ("replica_groups=mesh['a'=2,'b'=4] {'b'}", [0, 1, 2, 3], ("fsdp",)),
    (
      "replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}",
      [0, 4],
      ("data",),
    ),
    ("replica_groups=mesh['a'=8] {'a':(2)2}", [0, 2], ("fsdp",)),
    ("replica_groups={}", list(range(8)), ("data", "fsdp")),
    ("source_target_pairs={{0,1},{1,2},{2,3},{3,0}}", [0, 1], ("fsdp",)),
    ("source_target_pairs={{0,0},{1,5}}", [1, 5], ("data",)),
  ],
)
def test_groups_of_devices_in_all_their_spellings(attributes, first, axes):
  groups_AG = program._groups(f", channel_id=1, {attributes}, x=1", 8)
  assert groups_AG[0].tolist() == first
  assert program._axes(groups_AG, {"data": 2, "fsdp": 4}) == axes


def compiled_text(function, *arguments):
  return jax.jit(function).lower(*arguments).compile().as_text()


def test_products_of_this_machine_s_compiler_are_counted_too():
  x_AD, w_NDF = jnp.ones((5, 7)), jnp.ones((4, 7, 7))

  def run(x_AD, w_NDF):
    return jax.lax.scan(lambda x_AD, w_DF: (x_AD @ w_DF, None), x_AD, w_NDF)[0]

  text = compiled_text(run, x_AD, w_NDF)
  assert program.read(text, {"data": 1}).flops == 4 * 2 * 5 * 7 * 7


def test_calls_of_a_gpu_s_library_count():
  # Of a compiled step, jax 0.10.2 for H200.
  text = """HloModule x

ENTRY %main (a: f32[80,128], b: f32[128,384]) -> f32[80,384] {
  %a = f32[80,128]{1,0} parameter(0)
  %b = f32[128,384]{1,0} parameter(1)
  %call = (f32[80,384]{1,0}, s8[4194304]{0}) custom-call(%a, %b), \
custom_call_target="__cublas$lt$matmul", backend_config={\
"gemm_backend_config":{"dot_dimension_numbers":{\
"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
  ROOT %out = f32[80,384]{1,0} get-tuple-element(%call), index=0
}
"""
  assert program.read(text, {"data": 1}).flops == 2 * 80 * 128 * 384


def test_products_inside_of_splash_attention_count():
  # Of a compiled step, jax 0.10.2 for v5e: an attribute of several lines.
  text = """HloModule x

ENTRY %main (q: bf16[16,12,128,64], k: bf16[16,12,384,64]) -> f32[] {
  %m = s8[1,1,1]{2,1,0} parameter(2)
  %q = bf16[16,12,128,64]{3,2,1,0} parameter(0)
  %k = bf16[16,12,384,64]{3,2,1,0} parameter(1)
  %splash_mha_fwd_segmented.6 = bf16[16,12,128,64]{3,2,1,0} \
custom-call(%m, %q, %k, %k), custom_call_target="tpu_custom_call", \
frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}, metadata={op_name="jit(step)/splash"}
  %splash_mha_dkv_segmented.7 = bf16[16,12,384,64]{3,2,1,0} \
custom-call(%m, %q, %k, %k), custom_call_target="tpu_custom_call"
  ROOT %out = f32[] constant(0)
}
"""
  one = 2 * 16 * 12 * 128 * 384 * 64
  assert program.read(text, {"data": 1}).flops == (2 + 4) * one


def test_convolutions_count_without_what_padding_adds():
  x_BYXC, w = jnp.ones((2, 6, 6, 3)), jnp.ones((3, 3, 3, 5))
  valid = (3 * 6 - 2) ** 2  # window places inside of the image, both ways

  def run(x_BYXC, w):
    return jax.lax.conv_general_dilated(
      x_BYXC, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )

  text = compiled_text(run, x_BYXC, w)
  assert program.read(text, {"data": 1}).flops == 2 * 2 * 3 * 5 * valid


def test_of_branches_the_dearest_counts():
  def run(index, x_AD):
    return jax.lax.switch(
      index, [lambda x: x, lambda x: x @ x @ x, lambda x: x @ x], x_AD
    )

  text = compiled_text(run, 0, jnp.ones((8, 8)))
  assert program.read(text, {"data": 1}).flops == 2 * 2 * 8**3


def test_bytes_are_those_that_cross_main_memory():
  x_A = jnp.ones(1000)
  text = compiled_text(lambda x_A: jnp.sin(x_A) + 1, x_A)
  assert program.read(text, {"data": 1}).memory_bytes == 2 * 4000


def test_a_loop_that_changes_a_row_writes_that_row():
  def run(x_AD):
    return jax.lax.fori_loop(
      0, 10, lambda i, x_AD: x_AD.at[i].set(jnp.sin(x_AD[i])), x_AD
    )

  text = compiled_text(run, jnp.ones((10, 1000)))
  moved = program.read(text, {"data": 1}).memory_bytes
  # Read and write each row once, and a copy of the argument.
  assert 2 * 40_000 <= moved < 6 * 40_000


def test_collectives_of_a_mesh_are_found():
  mesh = jax.make_mesh(
    (2, 4), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2
  )
  x_AD = jax.ShapeDtypeStruct(
    (8, 16), np.float32, sharding=NamedSharding(mesh, P(None, "fsdp"))
  )
  whole = NamedSharding(mesh, P())
  text = (
    jax.jit(lambda x_AD: 2 * x_AD, out_shardings=whole)
    .lower(x_AD)
    .compile()
    .as_text()
  )
  (one,) = program.read(text, dict(mesh.shape)).collectives
  assert (one.kind, one.axes, one.group) == ("all-gather", ("fsdp",), 4)
  assert (one.bytes, one.count) == (8 * 16 * 4, 1)
