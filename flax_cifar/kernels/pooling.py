"""Max pooling whose gradient needs no scatter."""

from functools import partial, reduce
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flax_cifar.kernels import backend
from flax_cifar.kernels.native import pooling as native

MAX_WINDOW = 4  # of ours: it has a part of the program for each pixel of a window


def max_pool(x: Float[Array, "n h w c"], window: int) -> Float[Array, "n h2 w2 c"]:
  """Takes the maximum over adjacent windows of `window` x `window` pixels; cuts off the rest.

  Where several pixels of a window are the maximum, the first one gets the gradient.
  """
  if backend.select_backend() == "definition" or window > MAX_WINDOW:
    return nn.max_pool(x, (window, window), strides=(window, window))
  if backend.uses_native(x.dtype):
    return native.max_pool(x, window)
  return _max_pool(jnp.asarray(x), window)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _max_pool(x: Array, window: int) -> Array:
  return reduce(jnp.maximum, _corners(x, window))


def _corners(x: Array, window: int) -> list[Array]:
  """Lists, row by row of a window, the pixels that have the same place in each window."""
  _, height, width, _ = x.shape
  x = x[:, : height - height % window, : width - width % window]
  return [x[:, i::window, j::window] for i in range(window) for j in range(window)]


def _max_pool_forward(x: Array, window: int) -> Any:
  return _max_pool(x, window), x


def _max_pool_backward(window: int, x: Array, gradient: Array) -> tuple[Array]:
  """Finds the pixel that gets the gradient of each window; XLA's scatter is slow on a CPU.

  The winner is not the pixel that equals the saved maximum: XLA may compute `x` again here with
  other rounding, and then no pixel would equal it. So the pixels are compared again.
  """
  best, *others = _corners(x, window)
  winner = jnp.zeros(best.shape, jnp.uint8)
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
