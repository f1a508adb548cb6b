"""Dense 3x3 convolutions by Winograd's algorithm, with a quarter of the multiplications.

Like the functions of `separable`, they return the moments of their output next to it. They compute
in float32; the result is as exact as that of a plain convolution but for one bit.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from flax_cifar.kernels import moments as moments_lib
from flax_cifar.kernels.native import library

TILE, POINTS = 4, 36  # outputs along each axis; multiplications for a tile
# Of a part of the batch. Their number does not depend on the threads, so sums are always the same.
LEAST_PARTS = 8  # so that most machines have one for each core
LEAST_TILES = 32  # products of fewer are slow
WEIGHTS_PER_TILE = 128  # at most, so that the tiles take longer than the kernel
LEAST_GAIN = 2  # multiplications of a plain convolution for each one here


class _Convolution(NamedTuple):
  """The fields of `Convolution` in winograd.h."""

  images: int
  height: int
  width: int
  channels: int
  features: int
  out_height: int
  out_width: int
  top: int
  left: int
  reflect: int
  dilation: int
  relu: int
  measured: int
  parts: int
  to_images: int  # whether the gradient of the images is computed


class Window(NamedTuple):
  """What a convolution reads: pixels of padding, and the distance of the kernel's taps."""

  top: int
  bottom: int
  left: int
  right: int
  reflect: bool  # whether the padding reflects the image; else it is zero
  dilation: int


def is_efficient(shape: Sequence[int], kernel_size: Sequence[int], window: Window) -> bool:
  """Whether the kernel is 3x3 and tiles of 4x4 fit the output of images of this shape well."""
  too_small = window.reflect and max(window[:4]) >= min(shape[1:3])  # to be reflected
  if tuple(kernel_size) != (3, 3) or too_small:
    return False
  rows, columns = _get_output_size(shape[1], shape[2], window)
  tiles = _count_tiles(rows, window.dilation) * _count_tiles(columns, window.dilation)
  return 0 < LEAST_GAIN * POINTS * tiles <= 9 * rows * columns


def convolve(
  x: Float[Array, "n h w c"],
  kernel: Float32[Array, "3 3 c o"],
  bias: Float32[Array, " o"] | None,
  window: Window,
  *,
  relu: bool,
) -> Float[Array, "n h2 w2 o"]:
  """Convolves images with a 3x3 kernel; differentiable once.

  Args:
    x: (N, H, W, C), float32 or bfloat16.
    kernel: (3, 3, C, O).
    bias: (O,), added to the output, or None.
    window: padding and dilation.
    relu: whether ReLU follows.
  """
  return _convolve(x, kernel, _fill(bias, kernel), _describe(x, kernel, window, relu, False))[0]


def convolve_and_measure(
  x: Float[Array, "n h w c"],
  kernel: Float32[Array, "3 3 c o"],
  bias: Float32[Array, " o"] | None,
  window: Window,
  *,
  relu: bool,
) -> tuple[Float[Array, "n h2 w2 o"], moments_lib.Moments]:
  """Returns the result of `convolve` and its moments, which are differentiable too."""
  c = _describe(x, kernel, window, relu, True)
  y, mean, variance = _convolve(x, kernel, _fill(bias, kernel), c)
  return y, moments_lib.Moments(mean, variance, c.out_height * c.out_width)


def _fill(bias: Array | None, kernel: Array) -> Array:
  return jnp.zeros(kernel.shape[-1]) if bias is None else bias


def _describe(x: Array, kernel: Array, w: Window, relu: bool, measured: bool) -> _Convolution:
  images, height, width, channels = x.shape
  out_height, out_width = _get_output_size(height, width, w)
  tiles = images * _count_tiles(out_height, w.dilation) * _count_tiles(out_width, w.dilation)
  return _Convolution(
    images,
    height,
    width,
    channels,
    kernel.shape[-1],
    out_height,
    out_width,
    w.top,
    w.left,
    int(w.reflect),
    w.dilation,
    int(relu),
    int(measured),
    parts=_count_parts(images, tiles, channels * kernel.shape[-1]),
    to_images=1,
  )


def _get_output_size(height: int, width: int, w: Window) -> tuple[int, int]:
  rows, columns = height + w.top + w.bottom, width + w.left + w.right
  return max(0, rows - 2 * w.dilation), max(0, columns - 2 * w.dilation)


def _count_tiles(size: int, dilation: int) -> int:
  """Along an axis: the outputs of a tile are as far apart as the taps."""
  return sum(-(-len(range(phase, size, dilation)) // TILE) for phase in range(dilation))


def _count_parts(images: int, tiles: int, weights: int) -> int:
  """Large kernels want large parts, because each part has a kernel gradient of its own."""
  least_tiles = max(LEAST_TILES, weights // WEIGHTS_PER_TILE)
  return min(images, library.PARTS, max(LEAST_PARTS, tiles // least_tiles))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _convolve(x: Array, kernel: Array, bias: Array, c: _Convolution) -> tuple[Array, Array, Array]:
  output = library.like(x, c.images, c.out_height, c.out_width, c.features)
  rows = c.images if c.measured else 0
  results = output, *(library.floats(rows, c.features),) * 2
  return library.call(library.WINOGRAD, x.dtype, c, (x, kernel, bias), results)


def _convolve_forward(x: Any, kernel: Any, bias: Any, c: _Convolution) -> Any:
  y, mean, variance = _convolve(x.value, kernel.value, bias.value, c)
  # Without ReLU and moments the gradient does not depend on the output.
  output = y if c.relu or c.measured else None
  # The first layer of a network gets no gradient of its images; an empty tuple has no arrays.
  return (y, mean, variance), (x.value, kernel.value, mean, output, () if x.perturbed else None)


def _convolve_backward(c: _Convolution, saved: Any, gradients: Any) -> Any:
  x, kernel, mean, y, perturbed = saved
  c = c._replace(to_images=int(perturbed is not None))
  to_y, to_mean, to_variance = map(_fill_zeros, gradients)
  terms = library.get_moment_terms(to_y, mean, to_mean, to_variance)
  results = (
    library.like(x, *(x.shape if c.to_images else (0,))),
    library.floats(c.parts, *kernel.shape),
    library.floats(c.parts, c.features),
  )
  operands = to_y, to_y if y is None else y, *terms, x, kernel
  to_x, to_kernels, to_biases = library.call(library.WINOGRAD_BACK, x.dtype, c, operands, results)
  return to_x if c.to_images else None, to_kernels.sum(0), to_biases.sum(0)


def _fill_zeros(gradient: Any) -> Array:
  """Makes an array of the gradient of a result that nothing depends on."""
  is_zero = isinstance(gradient, jax.custom_derivatives.SymbolicZero)
  return jnp.zeros(gradient.shape, gradient.dtype) if is_zero else gradient


_convolve.defvjp(_convolve_forward, _convolve_backward, symbolic_zeros=True)
