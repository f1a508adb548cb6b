"""Faster functions equal to the library's, for platforms where the library's are slow.

`feature_group_count` and `kernel_dilation` remain the definition of the layers: what stands here is
passed to `nn.Conv` and tested against it.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def conv_general_dilated(
  lhs: jax.Array,
  rhs: jax.Array,
  window_strides: Sequence[int],
  padding: Any,
  *,
  lhs_dilation: Sequence[int],
  rhs_dilation: Sequence[int],
  feature_group_count: int,
  **others: Any,
) -> jax.Array:
  """`lax.conv_general_dilated` for NHWC and HWIO; depthwise ones on CPU as shifted sums.

  XLA:CPU computes depthwise convolutions channel by channel, ten times slower than that.
  """
  depthwise = feature_group_count == lhs.shape[-1] == rhs.shape[-1]
  plain = {*window_strides, *lhs_dilation} == {1} and not isinstance(padding, str)
  if depthwise and plain and jax.default_backend() == "cpu":
    padded = jnp.pad(lhs, ((0, 0), *padding, (0, 0)))
    return _depthwise(padded, rhs[:, :, 0], tuple(rhs_dilation))
  return lax.conv_general_dilated(
    lhs,
    rhs,
    window_strides,
    padding,
    lhs_dilation=lhs_dilation,
    rhs_dilation=rhs_dilation,
    feature_group_count=feature_group_count,
    **others,
  )


def _taps(x: jax.Array, kernel_size: tuple[int, ...], dilation: tuple[int, int]) -> list[jax.Array]:
  """The part of (N, H, W, C) `x` under each kernel tap, row by row; no padding."""
  height = x.shape[1] - (kernel_size[0] - 1) * dilation[0]
  width = x.shape[2] - (kernel_size[1] - 1) * dilation[1]
  return [
    x[:, i * dilation[0] :][:, :height, j * dilation[1] :][:, :, :width]
    for i in range(kernel_size[0])
    for j in range(kernel_size[1])
  ]


def _shifted_sum(x: jax.Array, kernel: jax.Array, dilation: tuple[int, int]) -> jax.Array:
  weights = kernel.reshape(-1, kernel.shape[-1])
  taps = _taps(x, kernel.shape[:2], dilation)
  return sum(
    (tap * weight for tap, weight in zip(taps, weights, strict=True)), jnp.zeros((), x.dtype)
  )


# Not differentiated as it stands: the gradient of the kernel would be one slow reduction per tap.
_depthwise = jax.custom_vjp(_shifted_sum, nondiff_argnums=(2,))


def _depthwise_forward(x: jax.Array, kernel: jax.Array, dilation: tuple[int, int]) -> Any:
  return _shifted_sum(x, kernel, dilation), (x, kernel)


def _depthwise_backward(dilation: tuple[int, int], saved: Any, gradient: jax.Array) -> Any:
  x, kernel = saved
  (x_gradient,) = jax.vjp(lambda x: _shifted_sum(x, kernel, dilation), x)[1](gradient)
  products = [tap * gradient for tap in _taps(x, kernel.shape[:2], dilation)]
  zeros = [jnp.zeros((), x.dtype)] * len(products)
  sums = lax.reduce(products, zeros, _add_each, (0, 1, 2))  # all taps in one pass over the data
  return x_gradient, jnp.stack(sums).reshape(kernel.shape)


def _add_each(left: list[jax.Array], right: list[jax.Array]) -> list[jax.Array]:
  return [a + b for a, b in zip(left, right, strict=True)]


_depthwise.defvjp(_depthwise_forward, _depthwise_backward)
