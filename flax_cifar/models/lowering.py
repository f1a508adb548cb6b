"""Faster functions equal to the library's, for platforms where the library's are slow.

`nn.Conv` with `feature_group_count` and `kernel_dilation` remains the definition of the layers:
what stands here is tested against it.
"""

import itertools
import os
import platform
import sys
from collections.abc import Sequence
from functools import partial, reduce
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from flax_cifar.errors import choose, require
from flax_cifar.models import onednn, onednn_convolution
from flax_cifar.models.taps import get_kernel_gradient, list_taps

# How convolutions, ReLU, padding and pooling are computed: the environment variable VARIABLE holds
# a key of WAYS.
VARIABLE = "FLAX_CIFAR_KERNELS"
WAYS = {
  "auto": "onednn on a single CPU device, if it is installed; else xla on CPUs, else definition",
  "onednn": "kernels of oneDNN, from the extra `onednn`",
  "xla": "operations of XLA, put together for CPUs",
  "definition": "the plain operations of JAX",
}


def choose_way() -> str:
  """The key of WAYS, other than "auto", that holds in this process.

  Raises:
    UserError: the variable holds something else, or asks for oneDNN where it is missing.
  """
  way = os.environ.get(VARIABLE) or "auto"
  choose(VARIABLE, way, WAYS)
  available = jax.default_backend() == "cpu" and onednn.load_library() is not None
  require(available or way != "onednn", VARIABLE, way, "auto unless `.[onednn]` is installed")
  if way != "auto":
    return way
  if jax.default_backend() != "cpu":
    return "definition"
  # XLA cannot split a custom call over devices.
  return "onednn" if available and jax.local_device_count() == 1 else "xla"


def describe_way() -> str:
  """For the banner: what holds, and how to have it faster."""
  way = choose_way()
  hint = ""
  installable = sys.platform == "linux" and platform.machine() == "x86_64"
  if installable and jax.default_backend() == "cpu" and onednn.load_library() is None:
    hint = "; oneDNN would be faster: pip install -e .[onednn]"
  return f"{way}: {WAYS[way]} ({VARIABLE}){hint}"


class Conv(nn.Conv):
  """nn.Conv of two dimensions for (N, H, W, C), in the way of `choose_way`.

  The bias belongs to the convolution: with oneDNN its gradient is a by-product of the kernel's.
  """

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    ins = x.shape[-1] // self.feature_group_count
    kernel_shape = (*self.kernel_size, ins, self.features)  # type: ignore[misc]
    kernel = self.param("kernel", self.kernel_init, kernel_shape)
    bias = self.param("bias", self.bias_init, (self.features,)) if self.use_bias else None
    x, kernel = nn.dtypes.promote_dtype(x, kernel, dtype=self.dtype)
    padding = self.padding
    return conv_general_dilated(
      x,
      kernel,
      _pair(self.strides),
      [(padding, padding)] * 2 if isinstance(padding, int) else padding,
      rhs_dilation=_pair(self.kernel_dilation),
      feature_group_count=self.feature_group_count,
      bias=bias,
    )


def _pair(value: int | Sequence[int] | None) -> tuple[int, ...]:
  return (value or 1,) * 2 if isinstance(value, int | None) else tuple(value)


def conv_general_dilated(
  lhs: jax.Array,
  rhs: jax.Array,
  window_strides: Sequence[int],
  padding: Any,
  *,
  rhs_dilation: Sequence[int],
  feature_group_count: int,
  bias: jax.Array | None = None,
) -> jax.Array:
  """`lax.conv_general_dilated` for NHWC and HWIO, in the way of `choose_way`, plus a bias (O,)."""
  way = choose_way()
  if isinstance(padding, str):
    extent = [(k - 1) * d + 1 for k, d in zip(rhs.shape[:2], rhs_dilation, strict=True)]
    padding = lax.padtype_to_pads(lhs.shape[1:3], extent, window_strides, padding)
  if way == "onednn" and onednn_convolution.can_compute(lhs.dtype):
    return onednn_convolution.convolve(
      lhs, rhs, bias, window_strides, padding, rhs_dilation, feature_group_count
    )
  dense, depthwise = feature_group_count == 1, feature_group_count == lhs.shape[-1] == rhs.shape[-1]
  fast = way != "definition" and {*window_strides} == {1}
  if fast and dense:
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
  # In float32, or XLA:CPU sums the bias's gradient in bfloat16.
  return y if bias is None else (y.astype(jnp.float32) + bias).astype(y.dtype)


# ---- Dense convolution


def _convolve(
  x: jax.Array, kernel: jax.Array, padding: tuple[tuple[int, int], ...], dilation: tuple[int, int]
) -> jax.Array:
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
  x: jax.Array, kernel: jax.Array, padding: tuple[tuple[int, int], ...], dilation: tuple[int, int]
) -> Any:
  return _convolve(x, kernel, padding, dilation), (x, kernel)


def _dense_backward(
  padding: tuple[tuple[int, int], ...], dilation: tuple[int, int], saved: Any, gradient: jax.Array
) -> Any:
  x, kernel = saved
  (x_gradient,) = jax.vjp(lambda x: _convolve(x, kernel, padding, dilation), x)[1](gradient)
  return x_gradient, get_kernel_gradient(x, gradient, kernel.shape, padding, dilation)


_dense.defvjp(_dense_forward, _dense_backward)


# ---- Depthwise convolution


def _shifted_sum(x: jax.Array, kernel: jax.Array, dilation: tuple[int, int]) -> jax.Array:
  """XLA:CPU computes depthwise convolutions channel by channel, ten times slower than this."""
  weights = kernel.reshape(-1, kernel.shape[-1])
  taps = list_taps(x, kernel.shape[:2], dilation)
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
  taps = [tap.astype(jnp.float32) for tap in list_taps(x, kernel.shape[:2], dilation)]
  products = [tap * gradient.astype(jnp.float32) for tap in taps]
  zeros = [jnp.zeros((), jnp.float32)] * len(products)
  sums = lax.reduce(products, zeros, add_each, (0, 1, 2))  # all taps in one pass over the data
  return x_gradient, jnp.stack(sums).reshape(kernel.shape).astype(kernel.dtype)


def add_each(left: list[jax.Array], right: list[jax.Array]) -> list[jax.Array]:
  """What `lax.reduce` calls to make several sums at once."""
  return [a + b for a, b in zip(left, right, strict=True)]


_depthwise.defvjp(_depthwise_forward, _depthwise_backward)


# ---- ReLU


def relu(x: jax.Array) -> jax.Array:
  """max(x, 0), with the gradient 0 at 0; NaN stays NaN."""
  if choose_way() == "definition":
    return nn.relu(x)
  # XLA:CPU compares bfloat16 more slowly than float32.
  return jnp.where(x.astype(jnp.float32) <= 0, jnp.zeros_like(x), x)


# ---- Reflect padding


def pad_reflect(x: jax.Array, padding: int) -> jax.Array:
  """Pads height and width of NHWC `x` by `padding` pixels mirrored about the edge pixel."""
  # An image smaller than its padding is mirrored several times over: rare, and left to JAX.
  if choose_way() == "definition" or padding >= min(x.shape[1:3]):
    return jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)), mode="reflect")
  return _pad_reflect(jnp.asarray(x), padding)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _pad_reflect(x: jax.Array, padding: int) -> jax.Array:
  """As one gather of pixels: XLA:CPU joins the mirrored parts three times more slowly."""
  rows, columns = (_mirror(np.arange(-padding, n + padding), n) for n in x.shape[1:3])
  return _gather_pixels(x, rows, columns)


def _mirror(index: np.ndarray, size: int) -> np.ndarray:
  """The pixel inside 0..size - 1 that each index shows; size must exceed the overhang."""
  index = np.abs(index)
  return np.minimum(index, 2 * (size - 1) - index)


def _gather_pixels(x: jax.Array, rows: np.ndarray, columns: np.ndarray) -> jax.Array:
  """x[:, rows][:, :, columns] of NHWC `x`.

  From all pixels in one line, so that the result need not be transposed.
  """
  count, height, width, channels = x.shape
  index = jnp.asarray(rows[:, None] * width + columns, jnp.int32)
  index += height * width * jax.lax.broadcasted_iota(jnp.int32, (count, 1, 1), 0)
  pixels = x.reshape(-1, channels).at[index.reshape(-1)].get(mode="promise_in_bounds")
  return pixels.reshape(count, len(rows), len(columns), channels)


def _pad_reflect_forward(x: jax.Array, padding: int) -> Any:
  return _pad_reflect(x, padding), None


def _pad_reflect_backward(padding: int, saved: None, gradient: jax.Array) -> tuple[jax.Array]:
  """Adds up, for each pixel, the gradients of all places of the padded image that show it."""
  del saved
  rows, columns = (_list_places(n - 2 * padding, padding) for n in gradient.shape[1:3])
  total = jnp.zeros(())  # float32: XLA:CPU adds bfloat16 more slowly
  for (row, has_row), (column, has_column) in itertools.product(rows, columns):
    shown = (has_row[:, None] & has_column)[:, :, None]
    part = _gather_pixels(gradient, row, column).astype(jnp.float32)
    total += part if shown.all() else jnp.where(shown, part, jnp.zeros((), part.dtype))
  # One loop for all nine; XLA would split it to merge its end into what follows.
  return (lax.optimization_barrier(total.astype(gradient.dtype)),)


def _list_places(size: int, padding: int) -> list[tuple[np.ndarray, np.ndarray]]:
  """Where along an axis of the padded image pixel i stands: itself, mirrored before, after.

  Each as (index, whether there is such a place; if not the index is 0).
  """
  inside = padding + np.arange(size)
  places = [(inside, np.ones(size, bool))]
  before, after = 2 * padding - inside, 2 * (padding + size - 1) - inside
  for index, outside in ((before, before < padding), (after, after >= padding + size)):
    exists = outside & (index >= 0) & (index < size + 2 * padding)
    places.append((np.where(exists, index, 0), exists))
  return places


_pad_reflect.defvjp(_pad_reflect_forward, _pad_reflect_backward)


# ---- Max pool


def max_pool(x: jax.Array, window: int) -> jax.Array:
  """Maximum over windows of `window` x `window` pixels, side by side; what is left over is cut.

  Where several pixels of a window are the maximum, the first one gets the gradient.
  """
  if choose_way() == "definition":
    return nn.max_pool(x, (window, window), strides=(window, window))
  return _max_pool(jnp.asarray(x), window)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _max_pool(x: jax.Array, window: int) -> jax.Array:
  return reduce(jnp.maximum, _corners(x, window))


def _corners(x: jax.Array, window: int) -> list[jax.Array]:
  """Row by row, the pixels that stand at the same place of each window."""
  _, height, width, _ = x.shape
  x = x[:, : height - height % window, : width - width % window]
  return [x[:, i::window, j::window] for i in range(window) for j in range(window)]


def _max_pool_forward(x: jax.Array, window: int) -> Any:
  return _max_pool(x, window), x


def _max_pool_backward(window: int, x: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
  """XLA would search for the pixel to give the gradient to, and scatter, which is slow on a CPU.

  The winner is found anew, not as the pixel that equals the maximum: XLA may compute `x` again
  here, with other rounding, and then no pixel would.
  """
  best, *others = _corners(x, window)
  winner = jnp.zeros(best.shape, np.min_scalar_type(window**2))
  for number, corner in enumerate(others, 1):
    larger = corner > best
    best, winner = jnp.where(larger, corner, best), jnp.where(larger, number, winner)
  zero = jnp.zeros((), gradient.dtype)
  parts = [jnp.where(winner == number, gradient, zero) for number in range(window**2)]
  count, height, width, channels = gradient.shape
  grid = jnp.stack(parts).reshape(window, window, count, height, width, channels)
  whole = grid.transpose(2, 3, 0, 4, 1, 5).reshape(count, height * window, width * window, channels)
  left_over = [(0, n - m) for n, m in zip(x.shape, whole.shape, strict=True)]
  return (jnp.pad(whole, left_over),)


_max_pool.defvjp(_max_pool_forward, _max_pool_backward)
