"""Kernel gradients on CPUs: each tap of the kernel is a matrix product of its own."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from flax_cifar import environment

IMAGES_AT_A_TIME = 8  # images whose kernel gradient is computed at once
SMALL_KERNEL = 64 * 64  # weights of a tap; its product keeps all cores busy only above this


def get_kernel_gradient(
  x: Float[Array, "n h w i"],
  gradient: Float[Array, "n h2 w2 o"],
  shape: tuple[int, ...],
  padding: tuple[tuple[int, int], ...],
  dilation: tuple[int, int],
) -> Float[Array, "kh kw i o"]:
  """Computes one matrix product per tap, for a few images at a time so that they stay in the cache.

  XLA would compute a convolution with a window as large as the image, which is half as fast on a
  CPU. The gradient is the left operand, because its transposition is the cheaper one.

  Args:
    x: the images that were convolved, (N, H, W, in_channels).
    gradient: of the convolution's output, (N, H', W', out_channels); its strides must be 1.
    shape: of the kernel, (height, width, in_channels, out_channels).
    padding: ((top, bottom), (left, right)) pixels of zeros around `x`.
    dilation: of the kernel, in rows and columns.
  """
  x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
  height, width, in_channels, out_channels = shape
  positions = ((0, 1, 2), (0, 1, 2))

  def multiply_taps(x: Array, gradient: Array) -> Array:
    multiply = partial(
      lax.dot_general,
      dimension_numbers=(positions, ((), ())),
      preferred_element_type=jnp.float32,
    )
    return jnp.stack([multiply(gradient, tap) for tap in list_taps(x, (height, width), dilation)])

  def add_images(total: Array, images: tuple[Array, Array]) -> tuple[Array, None]:
    return total + jax.vmap(multiply_taps)(*images).sum(0), None

  size = IMAGES_AT_A_TIME if len(x) % IMAGES_AT_A_TIME == 0 else len(x)
  parts = _count_parts(size, in_channels * out_channels)
  x, gradient = (a.reshape(-1, parts, size // parts, *a.shape[1:]) for a in (x, gradient))
  zeros = jnp.zeros((height * width, out_channels, in_channels))
  total, _ = lax.scan(add_images, zeros, (x, gradient))
  return total.transpose(0, 2, 1).reshape(shape).astype(x.dtype)


def list_taps(
  x: Float[Array, "n h w c"],
  kernel_size: tuple[int, ...],
  dilation: tuple[int, int],
  strides: tuple[int, int] = (1, 1),
) -> list[Float[Array, "n h2 w2 c"]]:
  """Lists the part of `x` under each kernel tap, row by row, without padding."""
  height = x.shape[1] - (kernel_size[0] - 1) * dilation[0]
  width = x.shape[2] - (kernel_size[1] - 1) * dilation[1]
  return [
    x[:, i * dilation[0] :][:, : height : strides[0], j * dilation[1] :][:, :, : width : strides[1]]
    for i in range(kernel_size[0])
    for j in range(kernel_size[1])
  ]


def _count_parts(images: int, results: int) -> int:
  """Counts the products to split one over `images` into, so that each core computes one.

  XLA:CPU divides a product among cores by its results, and a small kernel has too few of them.
  """
  cores = environment.count_cores() if results <= SMALL_KERNEL else 1
  return max(parts for parts in range(1, cores + 1) if images % parts == 0)
