"""Means and variances: which elements share them, and the normalization that they lead to."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from flax_cifar.parallel import mesh as mesh_lib


class Moments(NamedTuple):
  """Means and biased variances of each channel of each image, over its pixels."""

  mean: Float32[Array, "n c"]
  variance: Float32[Array, "n c"]
  pixels: int


class Affine(NamedTuple):
  """What a normalization comes down to: (x - center) * slope + bias, by image and channel."""

  center: Float32[Array, "n_or_1 c"]
  slope: Float32[Array, "n_or_1 c"]
  bias: Float32[Array, "n_or_1 c"]


def get_identity(channels: int) -> Affine:
  """Returns the normalization that changes nothing, for all images."""
  zeros = jnp.zeros((1, channels))
  return Affine(zeros, zeros + 1, zeros)


# ---- Which elements share mean and variance


class GhostBatches(NamedTuple):
  """Statistics per channel, of each of the `number` interleaved parts of a batch."""

  number: int

  def reduce(self, values: Float32[Array, "n c"]) -> Float32[Array, "parts c"]:
    """Averages over the examples of each part."""
    return values.reshape(-1, self.number, values.shape[-1]).mean(0)

  def broadcast(
    self, reduced: Float32[Array, "parts c"], count: int, channels: int
  ) -> Float32[Array, "n_or_1 c"]:
    """Gives each of the `count` examples the values of its part."""
    return reduced if self.number == 1 else jnp.tile(reduced, (count // self.number, 1))

  def join(
    self, means: Float32[Array, "n c"], variances: Float32[Array, "n c"]
  ) -> tuple[Float32[Array, "parts c"], Float32[Array, "parts c"]]:
    """Mean and variance of each part, from those of its examples.

    Devices that share the batch exchange both at once, each for its own examples.
    """
    shards = mesh_lib.count_shards()
    if shards == 1 or len(means) // shards % self.number:
      return _join(means, variances, self)
    own = (values.reshape(shards, -1, values.shape[-1]) for values in (means, variances))
    joined = jnp.stack(jax.vmap(partial(_join, sets=self))(*own))
    mean, var = mesh_lib.replicate(joined)  # (shards, parts, C) each
    return mean.mean(0), (var + jnp.square(mean - mean.mean(0))).mean(0)


class DeviceBatches(NamedTuple):
  """Statistics per channel, of each of the `number` parts of a batch that follow one another.

  With as many parts as devices share the batch, each device has its own statistics.
  """

  number: int

  def reduce(self, values: Float32[Array, "n c"]) -> Float32[Array, "parts c"]:
    """Averages over the examples of each part."""
    return values.reshape(self.number, -1, values.shape[-1]).mean(1)

  def broadcast(
    self, reduced: Float32[Array, "parts c"], count: int, channels: int
  ) -> Float32[Array, "n c"]:
    """Gives each of the `count` examples the values of its part."""
    return jnp.repeat(reduced, count // self.number, axis=0)

  def join(
    self, means: Float32[Array, "n c"], variances: Float32[Array, "n c"]
  ) -> tuple[Float32[Array, "parts c"], Float32[Array, "parts c"]]:
    """Mean and variance of each part, from those of its examples."""
    return _join(means, variances, self)


class ChannelGroups(NamedTuple):
  """Statistics per example, of each of the `number` groups of channels."""

  number: int

  def reduce(self, values: Float32[Array, "n c"]) -> Float32[Array, "n groups"]:
    """Averages over the channels of each group."""
    return values.reshape(len(values), self.number, -1).mean(-1)

  def broadcast(
    self, reduced: Float32[Array, "n groups"], count: int, channels: int
  ) -> Float32[Array, "n c"]:
    """Gives each of the `channels` channels the values of its group."""
    return jnp.repeat(reduced, channels // self.number, axis=-1)

  def join(
    self, means: Float32[Array, "n c"], variances: Float32[Array, "n c"]
  ) -> tuple[Float32[Array, "n groups"], Float32[Array, "n groups"]]:
    """Mean and variance of each group, from those of its channels."""
    return _join(means, variances, self)


Sets = GhostBatches | DeviceBatches | ChannelGroups


def _join(means: Array, variances: Array, sets: Sets) -> tuple[Array, Array]:
  """Mean and variance of each set, whose images or channels weigh the same."""
  mean = sets.reduce(means)
  apart = means - sets.broadcast(mean, *means.shape)
  return mean, sets.reduce(variances + jnp.square(apart))


def get_affine(
  mean: Float32[Array, "a b"],
  var: Float32[Array, "a b"],
  scale: Float32[Array, " c"],
  bias: Float32[Array, " c"],
  sets: Sets,
  epsilon: float,
  count: int,
) -> Affine:
  """Returns what `normalize` does to `count` images, with `mean` and `var` of each set."""
  mean, var = (sets.broadcast(values, count, len(scale)) for values in (mean, var))
  slope = jax.lax.rsqrt(var + epsilon) * scale
  return Affine(mean, slope, jnp.broadcast_to(bias, slope.shape))
