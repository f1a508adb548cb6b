"""Depthwise and pointwise convolutions that normalize while they read and measure while they write.

Normalization needs the mean and variance of a whole batch, but only a few bytes of them. So a
convolution returns the moments of its output next to it, its consumer normalizes what it reads, and
no normalized array is ever stored. Everything is differentiable, the moments too. The functions
exist on CPUs, in float32 and bfloat16; they compute in float32.
"""

import functools
from typing import Any

import jax
from jaxtyping import Array, Float, Float32

from flax_cifar.kernels import moments as moments_lib
from flax_cifar.kernels.native import library

CHANNELS = 16  # the numbers of channels are multiples of this


def can_compute(channels: int, features: int) -> bool:
  """Whether the functions below compute from `channels` to `features` channels."""
  return channels % CHANNELS == features % CHANNELS == 0


def _call(
  function: int,
  x: Array,
  operands: tuple[Array, ...],
  results: tuple[jax.ShapeDtypeStruct, ...],
  *,
  features: int,
  stride: int = 1,
) -> Any:
  """Calls a function of C++; `x` is the input of the convolution, whose shape is its shape."""
  shape = (*x.shape, features, stride, _count_parts(x))
  return library.call(function, x.dtype, shape, operands, results)


def _count_parts(x: Array) -> int:
  return min(library.PARTS, len(x))


# ---- Depthwise


def convolve_depthwise(
  x: Float[Array, "n h w c"], kernel: Float32[Array, "3 3 1 c"], stride: int
) -> tuple[Float[Array, "n h2 w2 c"], moments_lib.Moments, Float[Array, "n h w c"]]:
  """Convolves each channel with its 3x3 filter, with one pixel of zeros around the image.

  Args:
    x: (N, H, W, C).
    kernel: (3, 3, 1, C).
    stride: of rows and columns.

  Returns:
    The output; its moments; and `x`. A shortcut that uses this `x` saves a pass over its gradient,
    which is added in the pass that computes it.
  """
  y, mean, variance, x = _depthwise(x, kernel, stride)
  return y, moments_lib.Moments(mean, variance, y.shape[1] * y.shape[2]), x


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _depthwise(x: Array, kernel: Array, stride: int) -> tuple[Array, Array, Array, Array]:
  n, h, w, c = x.shape
  shape = n, (h - 1) // stride + 1, (w - 1) // stride + 1, c
  results = library.like(x, *shape), library.floats(n, c), library.floats(n, c)
  y, mean, variance = _call(library.DEPTHWISE, x, (x, kernel), results, features=c, stride=stride)
  return y, mean, variance, x


def _depthwise_forward(x: Array, kernel: Array, stride: int) -> Any:
  y, mean, variance, _ = _depthwise(x, kernel, stride)
  return (y, mean, variance, x), (x, kernel, y, mean)


def _depthwise_backward(stride: int, saved: Any, gradients: Any) -> Any:
  x, kernel, y, mean = saved
  to_y, to_mean, to_variance, shortcut = gradients
  terms = library.get_moment_terms(y, mean, to_mean, to_variance)
  c = x.shape[-1]
  results = library.like(x, *x.shape), library.floats(_count_parts(x), *kernel.shape)
  operands = to_y, y, *terms, x, kernel, shortcut
  to_x, to_kernels = _call(library.DEPTHWISE_BACK, x, operands, results, features=c, stride=stride)
  return to_x, to_kernels.sum(0)


_depthwise.defvjp(_depthwise_forward, _depthwise_backward)


# ---- Pointwise


def convolve_pointwise(
  x: Float[Array, "n h w c"],
  affine: moments_lib.Affine,
  kernel: Float32[Array, "1 1 c o"],
) -> tuple[Float[Array, "n h w o"], moments_lib.Moments]:
  """Convolves `x`, normalized by `affine`, with a 1x1 kernel.

  Args:
    x: (N, H, W, C).
    affine: normalizes x.
    kernel: (1, 1, C, O).

  Returns:
    The output and its moments.
  """
  y, mean, variance = _pointwise(x, library.broadcast(affine, x), kernel)
  return y, moments_lib.Moments(mean, variance, y.shape[1] * y.shape[2])


@jax.custom_vjp
def _pointwise(x: Array, affine: moments_lib.Affine, kernel: Array) -> tuple[Array, Array, Array]:
  n, h, w, _ = x.shape
  o = kernel.shape[-1]
  results = library.like(x, n, h, w, o), library.floats(n, o), library.floats(n, o)
  return _call(library.POINTWISE, x, (x, *affine, kernel), results, features=o)


def _pointwise_forward(x: Array, affine: moments_lib.Affine, kernel: Array) -> Any:
  y, mean, variance = _pointwise(x, affine, kernel)
  return (y, mean, variance), (x, affine, kernel, y, mean)


def _pointwise_backward(saved: Any, gradients: Any) -> Any:
  x, affine, kernel, y, mean = saved
  to_y, to_mean, to_variance = gradients
  terms = library.get_moment_terms(y, mean, to_mean, to_variance)
  n, c, o = len(x), x.shape[-1], y.shape[-1]
  results = (
    library.like(x, *x.shape),
    library.floats(n, c),
    library.floats(n, c),
    library.floats(_count_parts(x), c, o),
  )
  operands = to_y, y, *terms, x, *affine, kernel[0, 0].T
  to_x, to_slope, to_bias, to_kernels = _call(
    library.POINTWISE_BACK, x, operands, results, features=o
  )
  to_affine = moments_lib.Affine(-affine.slope * to_bias, to_slope, to_bias)
  return to_x, to_affine, to_kernels.sum(0).reshape(kernel.shape)


_pointwise.defvjp(_pointwise_forward, _pointwise_backward)
