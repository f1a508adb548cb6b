"""Convolutions equal to JAX's that are faster on CPUs.

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
  selected = backend.select_backend()
  if isinstance(padding, str):
    extent = [(k - 1) * d + 1 for k, d in zip(rhs.shape[:2], rhs_dilation, strict=True)]
    padding = lax.padtype_to_pads(lhs.shape[1:3], extent, window_strides, padding)
  is_dense, depthwise = (
    feature_group_count == 1,
    feature_group_count == lhs.shape[-1] == rhs.shape[-1],
  )
  by_ones = {*window_strides} == {1}
  if is_dense and by_ones and len({*rhs_dilation}) == 1:
    (top, bottom), (left, right) = padding
    window = dense.Window(top, bottom, left, right, False, rhs_dilation[0])
    if fits_native(lhs.shape, rhs.shape[:2], window, lhs.dtype):
      return dense.convolve(lhs, rhs.astype(jnp.float32), bias, window, relu=False)
  if backend.uses_onednn(lhs.dtype):
    return convolution.convolve(
      lhs, rhs, bias, window_strides, padding, rhs_dilation, feature_group_count
    )
  fast = selected != "definition" and by_ones
  if fast and is_dense:
    y = _dense(lhs, rhs, tuple(map(tuple, padding)), tuple(rhs_dilation))
  elif fast and depthwise:
    y = _depthwise(jnp.pad(lhs, ((0, 0), *padding, (0, 0))), rhs[:, :, 0], tuple(rhs_dilation))
  else:
    y = lax.conv_general_dilated(
      lhs,
      rhs,
      window_strides,
      padding,
      rhs_dilation=rhs_dilation,
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
      feature_group_count=feature_group_count,
    )
  # The sum is in float32, because XLA:CPU would otherwise sum the bias's gradient in bfloat16.
  return y if bias is None else (y.astype(jnp.float32) + bias).astype(y.dtype)


# ---- Dense convolution


def fits_native(
  shape: Sequence[int], kernel_size: Sequence[int], window: dense.Window, dtype: jnp.dtype
) -> bool:
  """Whether the kernels in C++ compute a dense convolution of stride 1, and as fast as any here.

  oneDNN is faster where it can multiply bfloat16 and Winograd's algorithm does not fit.
  """
  if not backend.uses_native(dtype) or not dense.can_compute(shape, kernel_size, window):
    return False
  slower = dtype == jnp.bfloat16 and backend.has_fast_bfloat16() and backend.uses_onednn(dtype)
  return not slower or dense.fits_winograd(shape, kernel_size, window)


def _convolve(
  x: Array, kernel: Array, padding: tuple[tuple[int, int], ...], dilation: tuple[int, int]
) -> Array:
  return lax.conv_general_dilated(
    x,
    kernel,
    (1, 1),
    padding,
    rhs_dilation=dilation,
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )


_dense = jax.custom_vjp(_convolve, nondiff_argnums=(2, 3))


def _dense_forward(
  x: Array, kernel: Array, padding: tuple[tuple[int, int], ...], dilation: tuple[int, int]
) -> Any:
  return _convolve(x, kernel, padding, dilation), (x, kernel)


def _dense_backward(
  padding: tuple[tuple[int, int], ...], dilation: tuple[int, int], saved: Any, gradient: Array
) -> Any:
  x, kernel = saved
  (x_gradient,) = jax.vjp(lambda x: _convolve(x, kernel, padding, dilation), x)[1](gradient)
  return x_gradient, taps_lib.get_kernel_gradient(x, gradient, kernel.shape, padding, dilation)


_dense.defvjp(_dense_forward, _dense_backward)


# ---- Depthwise convolution


def _shifted_sum(x: Array, kernel: Array, dilation: tuple[int, int]) -> Array:
  """Adds up the taps times their weights, ten times faster than the convolution of XLA:CPU.

  That one works channel by channel.
  """
  weights = kernel.reshape(-1, kernel.shape[-1])
  taps = taps_lib.list_taps(x, kernel.shape[:2], dilation)
  return sum(
    (tap * weight for tap, weight in zip(taps, weights, strict=True)), jnp.zeros((), x.dtype)
  )


# JAX's own gradient of the kernel would be one slow reduction per tap.
_depthwise = jax.custom_vjp(_shifted_sum, nondiff_argnums=(2,))


def _depthwise_forward(x: Array, kernel: Array, dilation: tuple[int, int]) -> Any:
  return _shifted_sum(x, kernel, dilation), (x, kernel)


def _depthwise_backward(dilation: tuple[int, int], saved: Any, gradient: Array) -> Any:
  x, kernel = saved
  (x_gradient,) = jax.vjp(lambda x: _shifted_sum(x, kernel, dilation), x)[1](gradient)
  taps = [tap.astype(jnp.float32) for tap in taps_lib.list_taps(x, kernel.shape[:2], dilation)]
  products = [tap * gradient.astype(jnp.float32) for tap in taps]
  zeros = [jnp.zeros((), jnp.float32)] * len(products)
  # All taps in one pass over the data.
  sums = lax.reduce(products, zeros, sums_lib.add_each, (0, 1, 2))
  return x_gradient, jnp.stack(sums).reshape(kernel.shape).astype(kernel.dtype)


_depthwise.defvjp(_depthwise_forward, _depthwise_backward)
