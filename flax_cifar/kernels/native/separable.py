"""Depthwise and pointwise convolutions that normalize while they read and measure while they write.

Normalization needs the mean and variance of a whole batch, but only a few bytes of them. So a
convolution returns the moments of its output next to it, its consumer normalizes what it reads, and
no normalized array is ever stored. Everything is differentiable, the moments too. The functions
exist on CPUs, in float32 and bfloat16; they compute in float32.
"""

import ctypes
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from flax_cifar import environment
from flax_cifar.kernels import ffi
from flax_cifar.kernels import moments as moments_lib
from flax_cifar.kernels.native import compiler

TARGET = "flax_cifar_separable"
SOURCE = pathlib.Path(__file__).with_name("separable.cc")
CHANNELS = 16  # the numbers of channels are multiples of this
PARTS = 32  # of a batch, whose kernel gradients are computed side by side and then added
DTYPES = {jnp.dtype(jnp.float32): 0, jnp.dtype(jnp.bfloat16): 1}

# The numbers of the functions in SOURCE.
_DEPTHWISE, _DEPTHWISE_BACK, _POINTWISE, _POINTWISE_BACK = range(4)
_FINISH, _FINISH_WITH_SHORTCUT, _FINISH_BACK = range(4, 7)


@functools.cache
def is_available() -> bool:
  """Whether a compiler is here and XLA accepts calls of what it compiled."""
  library = compiler.load(SOURCE)
  if library is None:
    return False
  library.flax_cifar_start(environment.count_cores())

  def execute(key: tuple[int, ...], addresses: list[int]) -> None:
    numbers = (ctypes.c_int64 * len(key))(*key)
    arrays = (ctypes.c_void_p * len(addresses))(*addresses)
    library.flax_cifar_separable(numbers, arrays)

  return ffi.register(TARGET, execute)


def can_compute(dtype: jnp.dtype, channels: int, features: int) -> bool:
  """Whether the functions below compute in `dtype` from `channels` to `features` channels."""
  return dtype in DTYPES and channels % CHANNELS == features % CHANNELS == 0


def _call(
  function: int,
  x: Array,
  operands: tuple[Array, ...],
  results: tuple[jax.ShapeDtypeStruct, ...],
  *,
  features: int,
  stride: int = 1,
  relu: bool = False,
) -> Any:
  """Calls a function of SOURCE; `x` is the input of the convolution, whose shape is its shape."""
  key = (function, DTYPES[x.dtype], *x.shape, features, stride, int(relu), _count_parts(x))
  return ffi.call(TARGET, key, operands, results)


def _count_parts(x: Array) -> int:
  return min(PARTS, len(x))


def _like(x: Array, *shape: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, x.dtype)


def _floats(*shape: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def _spread(affine: moments_lib.Affine, x: Array) -> moments_lib.Affine:
  """Gives each image of `x` numbers of its own."""
  return moments_lib.Affine(*(jnp.broadcast_to(a, (len(x), x.shape[-1])) for a in affine))


def _get_moment_terms(
  y: Array, mean: Array, to_mean: Array, to_variance: Array
) -> moments_lib.Affine:
  """What the gradients of the moments of `y` add to its own: (y - center) * slope + bias."""
  pixels = y.shape[1] * y.shape[2]
  return moments_lib.Affine(mean, 2 * to_variance / pixels, to_mean / pixels)


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
  results = _like(x, *shape), _floats(n, c), _floats(n, c)
  y, mean, variance = _call(_DEPTHWISE, x, (x, kernel), results, features=c, stride=stride)
  return y, mean, variance, x


def _depthwise_forward(x: Array, kernel: Array, stride: int) -> Any:
  y, mean, variance, _ = _depthwise(x, kernel, stride)
  return (y, mean, variance, x), (x, kernel, y, mean)


def _depthwise_backward(stride: int, saved: Any, gradients: Any) -> Any:
  x, kernel, y, mean = saved
  to_y, to_mean, to_variance, shortcut = gradients
  terms = _get_moment_terms(y, mean, to_mean, to_variance)
  c = x.shape[-1]
  results = _like(x, *x.shape), _floats(_count_parts(x), *kernel.shape)
  operands = to_y, y, *terms, x, kernel, shortcut
  to_x, to_kernels = _call(_DEPTHWISE_BACK, x, operands, results, features=c, stride=stride)
  return to_x, to_kernels.sum(0)


_depthwise.defvjp(_depthwise_forward, _depthwise_backward)


# ---- Pointwise


def convolve_pointwise(
  x: Float[Array, "n h w c"],
  affine: moments_lib.Affine,
  kernel: Float32[Array, "1 1 c o"],
  *,
  relu: bool,
) -> tuple[Float[Array, "n h w o"], moments_lib.Moments]:
  """Convolves `affine.apply(x)`, with ReLU if `relu`, with a 1x1 kernel.

  Args:
    x: (N, H, W, C).
    affine: normalizes x.
    kernel: (1, 1, C, O).
    relu: whether ReLU follows the normalization.

  Returns:
    The output and its moments.
  """
  y, mean, variance = _pointwise(x, _spread(affine, x), kernel, relu)
  return y, moments_lib.Moments(mean, variance, y.shape[1] * y.shape[2])


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _pointwise(
  x: Array, affine: moments_lib.Affine, kernel: Array, relu: bool
) -> tuple[Array, Array, Array]:
  n, h, w, _ = x.shape
  o = kernel.shape[-1]
  results = _like(x, n, h, w, o), _floats(n, o), _floats(n, o)
  return _call(_POINTWISE, x, (x, *affine, kernel), results, features=o, relu=relu)


def _pointwise_forward(x: Array, affine: moments_lib.Affine, kernel: Array, relu: bool) -> Any:
  y, mean, variance = _pointwise(x, affine, kernel, relu)
  return (y, mean, variance), (x, affine, kernel, y, mean)


def _pointwise_backward(relu: bool, saved: Any, gradients: Any) -> Any:
  x, affine, kernel, y, mean = saved
  to_y, to_mean, to_variance = gradients
  terms = _get_moment_terms(y, mean, to_mean, to_variance)
  n, c, o = len(x), x.shape[-1], y.shape[-1]
  results = _like(x, *x.shape), _floats(n, c), _floats(n, c), _floats(_count_parts(x), c, o)
  operands = to_y, y, *terms, x, *affine, kernel[0, 0].T
  to_x, to_slope, to_bias, to_kernels = _call(
    _POINTWISE_BACK, x, operands, results, features=o, relu=relu
  )
  to_affine = moments_lib.Affine(-affine.slope * to_bias, to_slope, to_bias)
  return to_x, to_affine, to_kernels.sum(0).reshape(kernel.shape)


_pointwise.defvjp(_pointwise_forward, _pointwise_backward)


# ---- The end of a unit


def finish(
  x: Float[Array, "n h w c"],
  affine: moments_lib.Affine,
  shortcut: Float[Array, "n h w c"] | None,
  *,
  relu: bool,
) -> Float[Array, "n h w c"]:
  """Returns `affine.apply(x)`, with ReLU if `relu`, plus `shortcut` if there is one."""
  return _finish(x, _spread(affine, x), shortcut, relu)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _finish(x: Array, affine: moments_lib.Affine, shortcut: Array | None, relu: bool) -> Array:
  operands = (x, *affine) if shortcut is None else (x, *affine, shortcut)
  function = _FINISH if shortcut is None else _FINISH_WITH_SHORTCUT
  (y,) = _call(function, x, operands, (_like(x, *x.shape),), features=x.shape[-1], relu=relu)
  return y


def _finish_forward(
  x: Array, affine: moments_lib.Affine, shortcut: Array | None, relu: bool
) -> Any:
  return _finish(x, affine, shortcut, relu), (x, affine, shortcut is None)


def _finish_backward(relu: bool, saved: Any, gradient: Array) -> Any:
  x, affine, alone = saved
  n, c = len(x), x.shape[-1]
  results = _like(x, *x.shape), _floats(n, c), _floats(n, c)
  operands = gradient, x, *affine
  to_x, to_slope, to_bias = _call(_FINISH_BACK, x, operands, results, features=c, relu=relu)
  to_affine = moments_lib.Affine(-affine.slope * to_bias, to_slope, to_bias)
  return to_x, to_affine, None if alone else gradient


_finish.defvjp(_finish_forward, _finish_backward)
