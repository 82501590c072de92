"""The products every layer is made of, and what else platforms do apart.

`dot` and `batched_dot` multiply matrices, `convolve` slides a window, `choose`
takes one of two results.

Operands are rounded to `dtype` and sums are kept in float32, forward and
backward: without rules of its own JAX multiplies a float32 cotangent with
bfloat16 operands, which XLA runs as float32. `dot` gives its result in
`activation_dtype(dtype)` unless another type is asked for: on CPU XLA has fast
bfloat16 products only with float32 results, and its bfloat16 element-wise code
is slow, so there float32 travels between the products.

Shape suffixes: Z, W are rows and columns of a window, D and F its channels in
and out.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import layout

Tree = Any  # of arrays
PRODUCT = "product"  # the name of `dot`'s results, for `jax.checkpoint`


def platform() -> str:
  """What the program is for: cpu, gpu or tpu.

  That of the mesh in jax's context, which `make_train_step` sets and which need
  not be here (ahead-of-time compilation); without one, of this process.
  """
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.default_backend() if device is None else device.platform


def activation_dtype(dtype: str) -> jnp.dtype:
  """The type that travels between products computed in `dtype`."""
  return jnp.dtype("float32" if platform() == "cpu" else dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _dot(x_AD: jax.Array, kernel_DF: jax.Array, dtype: str) -> jax.Array:
  return jnp.matmul(
    x_AD.astype(dtype),
    kernel_DF.astype(dtype),
    preferred_element_type=jnp.float32,
  )


def _dot_forward(x_AD, kernel_DF, dtype):
  return _dot(x_AD, kernel_DF, dtype), (x_AD, kernel_DF)


def _dot_backward(dtype, saved, grad_AF):
  x_AD, kernel_DF = saved
  grad_x_AD = _dot(grad_AF, transpose(kernel_DF.astype(dtype)), dtype)
  grad_kernel_DF = _dot(transpose(x_AD.astype(dtype)), grad_AF, dtype)
  return grad_x_AD.astype(x_AD.dtype), grad_kernel_DF.astype(kernel_DF.dtype)


def transpose(x_AD: jax.Array) -> jax.Array:
  """x^T; on one CPU device as a row-major copy.

  XLA would fold the transpose into the product, and its fast CPU product does
  not take a contraction over the first axis: the copy is 1.7 times faster.
  With several devices the constraint would gather x on each of them, because
  XLA does not partition it.
  """
  if platform() != "cpu" or jax.device_count() > 1:
    return x_AD.T
  return layout.with_layout_constraint(
    jnp.transpose(x_AD), layout.Layout((0, 1))
  )


_dot.defvjp(_dot_forward, _dot_backward)


def dot(
  x: jax.Array,
  kernel_DF: jax.Array,
  *,
  dtype: str,
  out_dtype: str | None = None,
) -> jax.Array:
  """`x @ kernel` over the last axis of `x`, (..., D) to (..., F).

  `out_dtype` is the type of the result; None: `activation_dtype(dtype)`.
  """
  width, features = kernel_DF.shape
  x_AD = x.reshape(-1, width)
  y_AF = _dot(x_AD, kernel_DF, dtype).astype(
    out_dtype or activation_dtype(dtype)
  )
  # Policies of `jax.checkpoint` see no product inside a `custom_vjp`.
  return checkpoint_name(y_AF, PRODUCT).reshape(*x.shape[:-1], features)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def _einsum(equation: str, x: jax.Array, y: jax.Array, dtype: str) -> jax.Array:
  return jnp.einsum(
    equation,
    x.astype(dtype),
    y.astype(dtype),
    preferred_element_type=jnp.float32,
  )


def _einsum_forward(equation, x, y, dtype):
  return _einsum(equation, x, y, dtype), (x, y)


def _einsum_backward(equation, dtype, saved, grad):
  x, y = saved
  of_x, of_y, of_grad = re.split(",|->", equation)
  grad_x = _einsum(f"{of_grad},{of_y}->{of_x}", grad, y, dtype)
  grad_y = _einsum(f"{of_grad},{of_x}->{of_y}", grad, x, dtype)
  return grad_x.astype(x.dtype), grad_y.astype(y.dtype)


_einsum.defvjp(_einsum_forward, _einsum_backward)


def batched_dot(
  equation: str, x: jax.Array, y: jax.Array, *, dtype: str
) -> jax.Array:
  """An einsum of two operands, float32 result.

  Every letter of `equation` stands in two of its three terms or in all, so
  that swapping terms gives the gradients.
  """
  return _einsum(equation, x, y, dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolve(
  x_BYXD: jax.Array, kernel_ZWDF: jax.Array, dtype: str
) -> jax.Array:
  return _slide(
    x_BYXD, kernel_ZWDF, dtype, _margins(kernel_ZWDF), "NHWC,HWIO->NHWC"
  )


def _convolve_forward(x_BYXD, kernel_ZWDF, dtype):
  return _convolve(x_BYXD, kernel_ZWDF, dtype), (x_BYXD, kernel_ZWDF)


def _convolve_backward(dtype, saved, grad_BYXF):
  x_BYXD, kernel_ZWDF = saved
  margins = _margins(kernel_ZWDF)
  grad_x_BYXD = _slide(
    grad_BYXF, kernel_ZWDF[::-1, ::-1], dtype, margins, "NHWC,HWOI->NHWC"
  )
  # The batch is what is summed over, as channels are in the forward pass.
  grad_kernel_ZWDF = _slide(
    x_BYXD, grad_BYXF, dtype, margins, "CHWN,IHWO->HWNC"
  )
  return (
    grad_x_BYXD.astype(x_BYXD.dtype),
    grad_kernel_ZWDF.astype(kernel_ZWDF.dtype),
  )


def _margins(kernel_ZWDF: jax.Array) -> list[tuple[int, int]]:
  """Zeros before and after, for windows whose sides are odd."""
  return [(side // 2, side // 2) for side in kernel_ZWDF.shape[:2]]


def _slide(
  x: jax.Array,
  window: jax.Array,
  dtype: str,
  margins: list[tuple[int, int]],
  equation: str,
) -> jax.Array:
  """A convolution in XLA's letters, with a float32 result.

  Operands are float32 on CPU, where XLA's bfloat16 convolution is no faster.
  """
  operand_dtype = activation_dtype(dtype)
  return jax.lax.conv_general_dilated(
    x.astype(operand_dtype),
    window.astype(operand_dtype),
    window_strides=(1, 1),
    padding=margins,
    dimension_numbers=tuple(re.split(",|->", equation)),
    preferred_element_type=jnp.float32,
  )


_convolve.defvjp(_convolve_forward, _convolve_backward)


def convolve(
  x_BYXD: jax.Array, kernel_ZWDF: jax.Array, *, dtype: str
) -> jax.Array:
  """A convolution that keeps the grid, in `activation_dtype(dtype)`.

  The sides of the kernel are odd; zeros lie around the grid.
  """
  return _convolve(x_BYXD, kernel_ZWDF, dtype).astype(activation_dtype(dtype))


def choose(
  condition: jax.Array,
  yes: Callable[[Tree], Tree],
  no: Callable[[Tree], Tree],
  operand: Tree,
) -> Tree:
  """`yes(operand)` where the scalar `condition` is true, else `no(operand)`.

  On CPU by a branch. Without one XLA (0.10.2) joins what follows with what is
  in `yes`, computes parts of it again for each reader and, to be able to,
  copies arrays that it could have written in place: an update of the optimizer
  took twice the time, and 2 GB more for 360 M parameters (measured 2026-11).
  Elsewhere a branch may stop the host until the condition is known.
  """
  if platform() == "cpu":
    return jax.lax.cond(condition, yes, no, operand)
  return jax.tree.map(
    lambda a, b: jnp.where(condition, a, b), yes(operand), no(operand)
  )
