"""The taps of a kernel of a convolution, each a product of its own: for CPUs."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from flax_cifar.environment import count_cores

IMAGES_AT_A_TIME = 8  # whose kernel gradient is computed at once
SMALL_KERNEL = 64 * 64  # weights of a tap, up to which its product does not keep all cores busy


def list_taps(
  x: jax.Array, kernel_size: tuple[int, ...], dilation: tuple[int, int]
) -> list[jax.Array]:
  """The part of (N, H, W, C) `x` under each kernel tap, row by row; no padding."""
  height = x.shape[1] - (kernel_size[0] - 1) * dilation[0]
  width = x.shape[2] - (kernel_size[1] - 1) * dilation[1]
  return [
    x[:, i * dilation[0] :][:, :height, j * dilation[1] :][:, :, :width]
    for i in range(kernel_size[0])
    for j in range(kernel_size[1])
  ]


def get_kernel_gradient(
  x: jax.Array,
  gradient: jax.Array,
  shape: tuple[int, ...],
  padding: tuple[tuple[int, int], ...],
  dilation: tuple[int, int],
) -> jax.Array:
  """One matrix product per tap, for a few images at a time so that they stay in the cache.

  XLA would make it a convolution with a window as large as the image, which is half as fast on a
  CPU. The gradient stands on the left, because its transposition is the cheaper one.

  Args:
    x: the images that were convolved, (N, H, W, ins).
    gradient: of the convolution's output, whose strides are 1, (N, H', W', outs).
    shape: of the kernel, (height, width, ins, outs).
    padding: ((top, bottom), (left, right)) pixels of zeros around `x`.
    dilation: of the kernel, in rows and columns.
  """
  x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
  height, width, ins, outs = shape
  positions = ((0, 1, 2), (0, 1, 2))

  def multiply_taps(x: jax.Array, gradient: jax.Array) -> jax.Array:
    multiply = partial(
      lax.dot_general,
      dimension_numbers=(positions, ((), ())),
      preferred_element_type=jnp.float32,
    )
    return jnp.stack([multiply(gradient, tap) for tap in list_taps(x, (height, width), dilation)])

  def add_images(total: jax.Array, images: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
    return total + jax.vmap(multiply_taps)(*images).sum(0), None

  size = IMAGES_AT_A_TIME if len(x) % IMAGES_AT_A_TIME == 0 else len(x)
  parts = _count_parts(size, ins * outs)
  x, gradient = (a.reshape(-1, parts, size // parts, *a.shape[1:]) for a in (x, gradient))
  total, _ = lax.scan(add_images, jnp.zeros((height * width, outs, ins)), (x, gradient))
  return total.transpose(0, 2, 1).reshape(shape).astype(x.dtype)


def _count_parts(images: int, results: int) -> int:
  """Into how many products to split one of so many images, so that each core gets one.

  XLA:CPU shares a product among cores by its results, of which a small kernel has too few.
  """
  cores = count_cores() if results <= SMALL_KERNEL else 1
  return max(parts for parts in range(1, cores + 1) if images % parts == 0)
