"""Several sums at once, in one pass over the data."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from flax_cifar.kernels import backend

ROWS = 8  # rows to add at once; XLA:CPU keeps about this many side by side
LANES = 64  # columns for which XLA:GPU takes its largest blocks of threads
BLOCK_ROWS = 256  # rows that a block adds


def sum_positions(*terms: Float32[Array, "n h w c"]) -> list[Float32[Array, "n c"]]:
  """Sums each term over its positions, H and W.

  XLA:CPU adds a few long rows at memory speed. It needs several times as long to add many rows or
  columns, or to compute one sum without another beside it.
  """
  if backend.select_backend() in backend.PLAIN:
    return sum_each(terms, (1, 2))
  count, _, _, channels = terms[0].shape
  sums = _sum_rows(terms, length=terms[0].shape[2] * channels)
  while sums[0].size > count * channels:
    sums = _sum_rows(sums, length=channels)
  return [total.reshape(count, channels) for total in sums]


def sum_images(*terms: Float32[Array, "n h w c"]) -> list[Float32[Array, " c"]]:
  """Sums each term over images and positions, in few passes that keep a GPU busy.

  XLA:GPU would take small blocks of threads for few channels, so several pixels are one row; and
  the rows are divided among blocks, whose sums are added by another pass.
  """
  channels = terms[0].shape[-1]
  pixels = terms[0].size // channels
  length = math.gcd(pixels, max(LANES // channels, 1))  # pixels in a row
  if length == 1:  # XLA divides such rows itself; a reshape could make it store them again
    return sum_each(terms, (0, 1, 2))
  parts = math.gcd(pixels // length, max(pixels // length // BLOCK_ROWS, 1))
  rows = [term.reshape(parts, -1, length * channels) for term in terms]
  sums = sum_each(sum_each(rows, (1,)), (0,))
  return sum_each([total.reshape(length, channels) for total in sums], (0,))


def sum_each(terms: Sequence[Float32[Array, "..."]], axes: tuple[int, ...]) -> list[Array]:
  """Sums each of the terms, which have the same shape, over `axes`, all in one pass."""
  zeros = [jnp.zeros((), jnp.float32)] * len(terms)
  return jax.lax.reduce(list(terms), zeros, _add_each, axes)


def _add_each(left: list[Array], right: list[Array]) -> list[Array]:
  return [a + b for a, b in zip(left, right, strict=True)]


def _sum_rows(terms: Sequence[Array], length: int) -> Sequence[Array]:
  """Sums each few rows of float32 terms (N, ...), in rows of `length`: (N, rows, length)."""
  count = len(terms[0])
  rows = terms[0].size // (count * length)
  divisors = [n for n in range(2, rows + 1) if rows % n == 0]
  few = min(divisors, key=lambda n: abs(math.log(n / ROWS)), default=1)
  parts = [term.reshape(count, rows // few, few, length) for term in terms]
  return sum_each(parts, (2,))
