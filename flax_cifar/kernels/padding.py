"""Reflect padding as one gather."""

import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from flax_cifar.kernels import backend


def pad_reflect(x: Float[Array, "n h w c"], padding: int) -> Float[Array, "n h2 w2 c"]:
  """Pads height and width by `padding` pixels, mirrored about the edge pixel."""
  # An image smaller than its padding is mirrored several times: rare, so JAX does it.
  if backend.select_backend() == "definition" or padding >= min(x.shape[1:3]):
    return jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)), mode="reflect")
  return _pad_reflect(jnp.asarray(x), padding)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _pad_reflect(x: Array, padding: int) -> Array:
  """Gathers all pixels at once: XLA:CPU concatenates the mirrored parts three times more slowly."""
  rows, columns = (_mirror(np.arange(-padding, n + padding), n) for n in x.shape[1:3])
  return _gather_pixels(x, rows, columns)


def _pad_reflect_forward(x: Array, padding: int) -> Any:
  return _pad_reflect(x, padding), None


def _pad_reflect_backward(padding: int, saved: None, gradient: Array) -> tuple[Array]:
  """Adds up, for each pixel, the gradients at all places of the padded image that show it."""
  del saved
  rows, columns = (_list_places(n - 2 * padding, padding) for n in gradient.shape[1:3])
  total = jnp.zeros(())  # float32: XLA:CPU adds bfloat16 more slowly
  for (row, has_row), (column, has_column) in itertools.product(rows, columns):
    shown = (has_row[:, None] & has_column)[:, :, None]
    part = _gather_pixels(gradient, row, column).astype(jnp.float32)
    total += part if shown.all() else jnp.where(shown, part, jnp.zeros((), part.dtype))
  # The barrier keeps all nine parts in one loop; XLA would split it to fuse its end with what
  # follows.
  return (lax.optimization_barrier(total.astype(gradient.dtype)),)


_pad_reflect.defvjp(_pad_reflect_forward, _pad_reflect_backward)


def _mirror(index: np.ndarray, size: int) -> np.ndarray:
  """Maps each index to the pixel in 0..size - 1 that it shows; `size` must exceed the overhang."""
  index = np.abs(index)
  return np.minimum(index, 2 * (size - 1) - index)


def _gather_pixels(x: Array, rows: np.ndarray, columns: np.ndarray) -> Array:
  """Returns x[:, rows][:, :, columns] of NHWC `x`.

  It gathers along one axis of all pixels, so that the result needs no transposition.
  """
  count, height, width, channels = x.shape
  index = jnp.asarray(rows[:, None] * width + columns, jnp.int32)
  index += height * width * jax.lax.broadcasted_iota(jnp.int32, (count, 1, 1), 0)
  pixels = x.reshape(-1, channels).at[index.reshape(-1)].get(mode="promise_in_bounds")
  return pixels.reshape(count, len(rows), len(columns), channels)


def _list_places(size: int, padding: int) -> list[tuple[np.ndarray, np.ndarray]]:
  """Lists where pixel i stands along an axis of the padded image: itself, mirrored before, after.

  Each entry is (index, whether there is such a place); where there is none the index is 0.
  """
  inside = padding + np.arange(size)
  places = [(inside, np.ones(size, bool))]
  before, after = 2 * padding - inside, 2 * (padding + size - 1) - inside
  for index, outside in ((before, before < padding), (after, after >= padding + size)):
    exists = outside & (index >= 0) & (index < size + 2 * padding)
    places.append((np.where(exists, index, 0), exists))
  return places
