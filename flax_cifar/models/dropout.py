"""Dropout whose mask comes from a hash of the element's index."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, UInt32


class Dropout(nn.Module):
  """Sets each element to zero with probability `rate` and scales the others by 1 / (1 - rate).

  Source: Srivastava et al. 2014 (JMLR 15).

  Attributes:
    rate: in [0, 1).
  """

  rate: float

  @nn.compact
  def __call__(self, x: Float[Array, "*shape"], train: bool) -> Float[Array, "*shape"]:
    return _drop(x, self.make_rng("dropout"), self.rate) if train and self.rate > 0 else x

  @nn.compact
  def get_mask(self, train: bool) -> UInt32[Array, " 4"] | None:
    """Returns what kernels that drop by themselves need, or None if nothing is dropped.

    The numbers are start and step of the sequence of `hash_bits`, the least hash of what is kept,
    and the bits of the kept share as float32.
    """
    if not train or self.rate == 0:
      return None
    kept = jax.lax.bitcast_convert_type(jnp.float32(1 - self.rate), jnp.uint32)
    start, step = _get_sequence(self.make_rng("dropout"))
    return jnp.stack([start, step, _get_threshold(self.rate), kept])


def _get_threshold(rate: float) -> Array:
  return jnp.uint32(min(round(rate * 2**32), 2**32 - 1))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _drop(x: Array, key: Array, rate: float) -> Array:
  keep = hash_bits(key, x.shape) >= _get_threshold(rate)
  # In float32, because bfloat16 would round the kept share.
  return jnp.where(keep, x.astype(jnp.float32) / (1 - rate), 0).astype(x.dtype)


def _drop_forward(x: Array, key: Array, rate: float) -> Any:
  return _drop(x, key, rate), key  # hashing again is cheaper than keeping the mask


def _drop_backward(rate: float, key: Array, gradient: Array) -> Any:
  dropped = _drop(gradient, key, rate)
  if jax.default_backend() == "cpu":
    # Without the barrier XLA:CPU would hash again in each loop that reads the result.
    dropped = jax.lax.optimization_barrier(dropped)
  return dropped, None


_drop.defvjp(_drop_forward, _drop_backward)


def hash_bits(key: Key[Array, ""], shape: tuple[int, ...]) -> UInt32[Array, "*shape"]:
  """Draws random bits of `shape`, a pure function of the threefry `key` and the position.

  The key chooses the start and the odd step of a sequence that visits every uint32 once; each
  number of the sequence is then mixed. XLA fuses the hash into the operation that uses the bits, so
  they cost a tenth of `jax.random.bits` on a CPU. They are good enough for masks, not for
  cryptography.
  """
  start, step = _get_sequence(key)
  counter = jnp.broadcast_to(start, shape)
  for axis, stride in enumerate(_strides(shape)):
    counter += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * (step * jnp.uint32(stride))
  return _mix(counter)


def _get_sequence(key: Array) -> tuple[Array, Array]:
  """Returns start and step."""
  first, second = jax.random.key_data(key).astype(jnp.uint32)
  start = _mix(_mix(first) ^ second)
  return start, _mix(start ^ first) | jnp.uint32(1)


def _mix(x: Array) -> Array:
  """Maps uint32 one-to-one; a changed input bit flips each output bit with probability near 1/2.

  Source of the constants: Chris Wellons, "Prospecting for Hash Functions" (2018), lowbias32.
  """
  x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
  x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
  return x ^ (x >> 16)


def _strides(shape: tuple[int, ...]) -> list[int]:
  strides, stride = [], 1
  for size in reversed(shape):
    strides.append(stride % 2**32)
    stride *= size
  return strides[::-1]
