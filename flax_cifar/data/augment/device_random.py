"""Uniform random numbers per example, and draws from them, for the augmentation on the device."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import threefry2x32_p
from jaxtyping import Array, Bool, Float32, Int, Int32, Key, Shaped

Params = dict[str, Shaped[Array, "n ..."]]  # name -> a value per example
Drawn = tuple[Bool[Array, " n"], Params]  # which images an op is applied to; its parameters


def draw_uniforms(
  key: Key[Array, ""],
  epoch: Int[Array, ""],
  example: Int[Array, " n"],
  *,
  redraw: Sequence[bool],
) -> Float32[Array, "n {len(redraw)}"]:
  """Draws multiples of 2^-23 in [0, 1).

  The function calls threefry only once, because it is slow to compile. Its counter consists of the
  example, the epoch and the column.

  Args:
    key: a typed threefry key.
    epoch: from 0.
    example: the number of each image in the training split.
    redraw: for each column, whether its numbers depend on the epoch.
  """
  columns = len(redraw)
  # The highest bit keeps the counters apart from those of `jax.random` under the same key.
  high = (example.astype(jnp.uint32) | jnp.uint32(1 << 31))[:, None]
  epochs = jnp.where(np.array(redraw, bool), epoch.astype(jnp.uint32), jnp.uint32(0))
  low = epochs * jnp.uint32(columns) + jnp.arange(columns, dtype=jnp.uint32)
  counter = jnp.broadcast_arrays(high, low)
  # The primitive, because JAX's function around it flattens its arguments, which would gather a
  # batch that is split over devices.
  bits, _ = threefry2x32_p.bind(*jax.random.key_data(key), *counter)
  # 23 bits, so that floor(uniform * n) never rounds up to n.
  return (bits >> 9).astype(jnp.float32) * jnp.float32(2**-23)


def draw_coin(uniforms: Float32[Array, "*shape"], p: float) -> Bool[Array, "*shape"]:
  """True with probability `p`."""
  return uniforms < jnp.float32(p)


def draw_within(
  uniforms: Float32[Array, "*shape"], center: float, limit: float
) -> Float32[Array, "*shape"]:
  """Uniform numbers in [center - limit, center + limit)."""
  return center + jnp.float32(limit) * (2 * uniforms - 1)


def draw_integer(uniforms: Float32[Array, "*shape"], count: int) -> Int32[Array, "*shape"]:
  """Uniform integers in 0..count - 1."""
  return (uniforms * count).astype(jnp.int32)
