"""The taps of a kernel of a convolution, each a product of its own: for CPUs."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

IMAGES_AT_A_TIME = 8  # whose kernel gradient is computed at once


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
  x: jax.Array, gradient: jax.Array, shape: tuple[int, ...], dilation: tuple[int, int]
) -> jax.Array:
  """One matrix product per tap, for a few images at a time so that they stay in the cache.

  XLA would make it a convolution with a window as large as the image, which is half as fast on a
  CPU. The gradient stands on the left, because its transposition is the cheaper one.
  """
  size = IMAGES_AT_A_TIME if len(x) % IMAGES_AT_A_TIME == 0 else len(x)
  height, width, ins, outs = shape
  positions = ((0, 1, 2), (0, 1, 2))

  def add_part(total: jax.Array, part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
    x, gradient = part
    taps = list_taps(x, (height, width), dilation)
    multiply = partial(
      lax.dot_general,
      dimension_numbers=(positions, ((), ())),
      preferred_element_type=jnp.float32,
    )
    return total + jnp.stack([multiply(gradient, tap) for tap in taps]), None

  x, gradient = (a.reshape(-1, size, *a.shape[1:]) for a in (x, gradient))
  total, _ = lax.scan(add_part, jnp.zeros((height * width, outs, ins)), (x, gradient))
  return total.transpose(0, 2, 1).reshape(shape).astype(x.dtype)
