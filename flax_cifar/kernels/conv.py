"""Convolutions equal to JAX's that are faster on CPUs and GPUs.

`lax.conv_general_dilated` is their definition, and the tests compare them with it.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32

from flax_cifar.kernels import backend
from flax_cifar.kernels import sums as sums_lib
from flax_cifar.kernels import taps as taps_lib
from flax_cifar.kernels.native import dense
from flax_cifar.kernels.onednn import convolution

Pair = tuple[int, int]  # of rows and columns
Sides = tuple[Pair, Pair]  # (top, bottom), (left, right)

GPU_SUMS = 5  # XLA:GPU keeps 8,320 bytes for each sum, of 48 KiB


def conv_general_dilated(
  lhs: Float[Array, "n h w c"],
  rhs: Float[Array, "kh kw i o"],
  window_strides: Sequence[int],
  padding: Any,
  *,
  rhs_dilation: Sequence[int],
  feature_group_count: int,
  bias: Float32[Array, " o"] | None = None,
) -> Float[Array, "n h2 w2 o"]:
  """Computes `lax.conv_general_dilated` for NHWC and HWIO by the selected backend; adds `bias`."""
  if isinstance(padding, str):
    extent = [(k - 1) * d + 1 for k, d in zip(rhs.shape[:2], rhs_dilation, strict=True)]
    padding = lax.padtype_to_pads(lhs.shape[1:3], extent, window_strides, padding)
  strides: Any = tuple(window_strides)
  dilation: Any = tuple(rhs_dilation)
  padding = tuple(map(tuple, padding))
  if feature_group_count == 1 and {*strides} == {1} and len({*dilation}) == 1:
    (top, bottom), (left, right) = padding
    window = dense.Window(top, bottom, left, right, False, dilation[0])
    if fits_native(lhs.shape, rhs.shape[:2], window, lhs.dtype):
      return dense.convolve(lhs, rhs.astype(jnp.float32), bias, window, relu=False)
  dtype = _choose_onednn_dtype(lhs.dtype, feature_group_count == lhs.shape[-1])
  if backend.uses_onednn(dtype):
    x, kernel = lhs.astype(dtype), rhs.astype(dtype)
    y = convolution.convolve(x, kernel, bias, strides, padding, dilation, feature_group_count)
    return y.astype(lhs.dtype)
  y = _convolve_by_xla(lhs, rhs, strides, padding, dilation, feature_group_count)
  # The sum is in float32, because XLA:CPU would otherwise sum the bias's gradient in bfloat16.
  return y if bias is None else (y.astype(jnp.float32) + bias).astype(y.dtype)


def _choose_onednn_dtype(dtype: jnp.dtype, depthwise: bool) -> jnp.dtype:
  """The type in which oneDNN computes arrays of `dtype` fastest on this processor.

  Without instructions for products of bfloat16 it emulates them at a third of the speed of float32,
  though not in depthwise convolutions, or refuses bfloat16.
  """
  if dtype != jnp.bfloat16 or backend.has_fast_bfloat16():
    return dtype
  return dtype if depthwise and backend.uses_onednn(dtype) else jnp.dtype(jnp.float32)


def _convolve_by_xla(
  x: Array, kernel: Array, strides: Pair, padding: Sides, dilation: Pair, groups: int
) -> Array:
  """Convolves by the operations of XLA that are fastest on this device."""
  selected, by_ones = backend.select_backend(), {*strides} == {1}
  depthwise, pointwise = groups == x.shape[-1] == kernel.shape[-1], kernel.shape[:2] == (1, 1)
  if depthwise and (selected == "gpu" or (selected != "definition" and by_ones)):
    padded = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    return _depthwise(padded, kernel[:, :, 0], strides, dilation)
  if groups == 1 and by_ones and selected not in backend.PLAIN:
    return _dense(x, kernel, padding, dilation)
  if groups == 1 and by_ones and selected == "gpu" and pointwise and {*padding} == {(0, 0)}:
    return x @ kernel[0, 0]  # several seeds make a batch of it, and a grouped convolution otherwise
  return _convolve(x, kernel, strides, padding, dilation, groups)


def _convolve(
  x: Array,
  kernel: Array,
  strides: Pair,
  padding: Sides,
  dilation: Pair,
  groups: int = 1,
) -> Array:
  return lax.conv_general_dilated(
    x,
    kernel,
    strides,
    padding,
    rhs_dilation=dilation,
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    feature_group_count=groups,
  )


# ---- Dense convolution


def fits_native(
  shape: Sequence[Any], kernel_size: Sequence[int], window: dense.Window, dtype: jnp.dtype
) -> bool:
  """Whether the kernels in C++ compute a dense convolution of stride 1, and as fast as any here.

  In a program for any number of images, that number in `shape` is a symbol.

  oneDNN is faster where it can multiply bfloat16 and Winograd's algorithm does not fit.
  """
  if not backend.uses_native(dtype) or not dense.can_compute(shape, kernel_size, window):
    return False
  slower = dtype == jnp.bfloat16 and backend.has_fast_bfloat16() and backend.uses_onednn(dtype)
  return not slower or dense.fits_winograd(shape, kernel_size, window)


def _convolve_by_ones(x: Array, kernel: Array, padding: Sides, dilation: Pair) -> Array:
  return _convolve(x, kernel, (1, 1), padding, dilation)


_dense = jax.custom_vjp(_convolve_by_ones, nondiff_argnums=(2, 3))


def _dense_forward(x: Array, kernel: Array, padding: Sides, dilation: Pair) -> Any:
  return _convolve_by_ones(x, kernel, padding, dilation), (x, kernel)


def _dense_backward(padding: Sides, dilation: Pair, saved: Any, gradient: Array) -> Any:
  x, kernel = saved
  (x_gradient,) = jax.vjp(lambda x: _convolve_by_ones(x, kernel, padding, dilation), x)[1](gradient)
  return x_gradient, taps_lib.get_kernel_gradient(x, gradient, kernel.shape, padding, dilation)


_dense.defvjp(_dense_forward, _dense_backward)


# ---- Depthwise convolution


def _shifted_sum(x: Array, kernel: Array, strides: Pair, dilation: Pair) -> Array:
  """Adds up the taps times their weights, ten times faster than the convolution of XLA:CPU.

  That one works channel by channel.
  """
  weights = kernel.reshape(-1, kernel.shape[-1])
  taps = taps_lib.list_taps(x, kernel.shape[:2], dilation, strides)
  return sum(
    (tap * weight for tap, weight in zip(taps, weights, strict=True)), jnp.zeros((), x.dtype)
  )


# JAX's own gradient of the kernel would be one slow reduction per tap.
_depthwise = jax.custom_vjp(_shifted_sum, nondiff_argnums=(2, 3))


def _depthwise_forward(x: Array, kernel: Array, strides: Pair, dilation: Pair) -> Any:
  return _shifted_sum(x, kernel, strides, dilation), (x, kernel)


def _depthwise_backward(strides: Pair, dilation: Pair, saved: Any, gradient: Array) -> Any:
  x, kernel = saved
  (x_gradient,) = jax.vjp(lambda x: _shifted_sum(x, kernel, strides, dilation), x)[1](gradient)
  taps = taps_lib.list_taps(x, kernel.shape[:2], dilation, strides)
  gradient = gradient.astype(jnp.float32)
  products = [tap.astype(jnp.float32) * gradient for tap in taps]
  sums = _sum_products(products)
  return x_gradient, jnp.stack(sums).reshape(kernel.shape).astype(kernel.dtype)


def _sum_products(products: list[Array]) -> list[Array]:
  """Sums over images and positions, all in one pass over the data or, on a GPU, few.

  The shared memory of a GPU has room for the sums of a few.
  """
  if backend.select_backend() != "gpu":
    return sums_lib.sum_each(products, (0, 1, 2))
  parts = [products[i : i + GPU_SUMS] for i in range(0, len(products), GPU_SUMS)]
  return [total for part in parts for total in sums_lib.sum_images(*part)]


_depthwise.defvjp(_depthwise_forward, _depthwise_backward)
