"""Dense convolutions of stride 1: 3x3 by Winograd's algorithm where that pays, others directly.

Like the functions of `separable`, they return the moments of their output next to it. They compute
in float32. Winograd's algorithm needs down to a quarter of the multiplications, and loses one bit
of precision against the direct one.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from flax_cifar.kernels import moments as moments_lib
from flax_cifar.kernels.native import library

TILE, POINTS = 4, 36  # of Winograd's algorithm: outputs along each axis, multiplications
# Of a part of the batch. Their number does not depend on the threads, so sums are always the same.
LEAST_PARTS = 8  # so that most machines have one for each core
LEAST_OUTPUTS = 512  # products of fewer are slow
WEIGHTS_PER_OUTPUT = 72  # at most, so that the outputs take longer than the kernel
LEAST_GAIN = 2  # Winograd's algorithm must need at most half of the direct multiplications


class _Convolution(NamedTuple):
  """The fields of `Convolution` in convolution.h."""

  images: int
  height: int
  width: int
  channels: int
  features: int
  kernel_height: int
  kernel_width: int
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


def can_compute(shape: Sequence[int], kernel_size: Sequence[int], window: Window) -> bool:
  """Whether the functions below compute it: there is an output, and a padding they can reflect."""
  too_small = window.reflect and max(window[:4]) >= min(shape[1:3])
  return not too_small and all(_get_output_size(shape, kernel_size, window))


def fits_winograd(shape: Sequence[int], kernel_size: Sequence[int], window: Window) -> bool:
  """Whether the kernel is 3x3 and tiles of 4x4 fit the output of images of this shape well."""
  return _fits_tiles(kernel_size, _get_output_size(shape, kernel_size, window), window.dilation)


def _fits_tiles(kernel_size: Sequence[int], outputs: tuple[int, int], dilation: int) -> bool:
  tiles = math.prod(_count_tiles(size, dilation) for size in outputs)
  return tuple(kernel_size) == (3, 3) and LEAST_GAIN * POINTS * tiles <= 9 * math.prod(outputs)


def convolve(
  x: Float[Array, "n h w c"],
  kernel: Float32[Array, "kh kw c o"],
  bias: Float32[Array, " o"] | None,
  window: Window,
  *,
  relu: bool,
) -> Float[Array, "n h2 w2 o"]:
  """Convolves images with a kernel; differentiable once.

  Args:
    x: (N, H, W, C), float32 or bfloat16.
    kernel: (height, width, C, O).
    bias: (O,), added to the output, or None.
    window: padding and dilation.
    relu: whether ReLU follows.
  """
  return _convolve(x, kernel, _fill(bias, kernel), _describe(x, kernel, window, relu, False))[0]


def convolve_and_measure(
  x: Float[Array, "n h w c"],
  kernel: Float32[Array, "kh kw c o"],
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
  out_height, out_width = _get_output_size(x.shape, kernel.shape, w)
  return _Convolution(
    images=images,
    height=height,
    width=width,
    channels=channels,
    features=kernel.shape[-1],
    kernel_height=kernel.shape[0],
    kernel_width=kernel.shape[1],
    out_height=out_height,
    out_width=out_width,
    top=w.top,
    left=w.left,
    reflect=int(w.reflect),
    dilation=w.dilation,
    relu=int(relu),
    measured=int(measured),
    parts=_count_parts(images, out_height * out_width, kernel.size),
    to_images=1,
  )


def _get_output_size(
  shape: Sequence[int], kernel_size: Sequence[int], w: Window
) -> tuple[int, int]:
  rows, columns = shape[1] + w.top + w.bottom, shape[2] + w.left + w.right
  height, width = (w.dilation * (size - 1) for size in kernel_size[:2])
  return max(0, rows - height), max(0, columns - width)


def _count_tiles(size: int, dilation: int) -> int:
  """Along an axis: the outputs of a tile are as far apart as the taps."""
  return sum(-(-len(range(phase, size, dilation)) // TILE) for phase in range(dilation))


def _count_parts(images: int, outputs: int, weights: int) -> int:
  """Large kernels want large parts, because each part has a kernel gradient of its own."""
  least = max(LEAST_OUTPUTS, weights // WEIGHTS_PER_OUTPUT)
  return min(images, library.PARTS, max(LEAST_PARTS, images * outputs // least))


def _get_functions(c: _Convolution) -> tuple[int, int]:
  """The numbers of the functions that compute the convolution and its gradients."""
  kernel_size, outputs = (c.kernel_height, c.kernel_width), (c.out_height, c.out_width)
  if _fits_tiles(kernel_size, outputs, c.dilation):
    return library.WINOGRAD, library.WINOGRAD_BACK
  return library.DIRECT, library.DIRECT_BACK


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _convolve(x: Array, kernel: Array, bias: Array, c: _Convolution) -> tuple[Array, Array, Array]:
  output = library.like(x, c.images, c.out_height, c.out_width, c.features)
  rows = c.images if c.measured else 0
  results = output, *(library.floats(rows, c.features),) * 2
  return library.call(_get_functions(c)[0], x.dtype, c, (x, kernel, bias), results)


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
  to_x, to_kernels, to_biases = library.call(_get_functions(c)[1], x.dtype, c, operands, results)
  return to_x if c.to_images else None, to_kernels.sum(0), to_biases.sum(0)


def _fill_zeros(gradient: Any) -> Array:
  """Makes an array of the gradient of a result that nothing depends on."""
  is_zero = isinstance(gradient, jax.custom_derivatives.SymbolicZero)
  return jnp.zeros(gradient.shape, gradient.dtype) if is_zero else gradient


_convolve.defvjp(_convolve_forward, _convolve_backward, symbolic_zeros=True)
