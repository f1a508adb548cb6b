"""Normalization with ReLU as one differentiable function, and ReLU alone."""

from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from flax_cifar.kernels import backend, sums
from flax_cifar.parallel import mesh as mesh_lib


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


# ---- Normalization with ReLU


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def normalize(
  x: Float[Array, "n h w c"],
  scale: Float32[Array, " c"],
  bias: Float32[Array, " c"],
  sets: Sets,
  epsilon: float,
  relu: bool,
) -> tuple[Float[Array, "n h w c"], Float32[Array, "a b"], Float32[Array, "a b"]]:
  """Subtracts the mean and divides by the standard deviation of each set; differentiable once.

  Args:
    x: (N, H, W, C).
    scale: a factor of the result for each channel.
    bias: added at the end, for each channel.
    sets: which elements share mean and variance.
    epsilon: added to the variance.
    relu: whether ReLU comes last.

  Returns:
    y of the type of x; means and biased variances as `sets.reduce` returns them, which pass no
    gradient on.
  """
  mean, var = _compute_moments(x, sets)
  slope = jax.lax.rsqrt(_broadcast(var, x, sets) + epsilon) * scale
  return scale_and_shift(x, _broadcast(mean, x, sets), slope, bias, relu), mean, var


def _normalize_forward(x: Array, scale: Array, bias: Array, *arguments: Any) -> Any:
  y, mean, var = normalize(x, scale, bias, *arguments)
  return (y, mean, var), (x, scale, bias, mean, var)


def _normalize_backward(sets: Sets, epsilon: float, relu: bool, saved: Any, gradients: Any) -> Any:
  """With v = (x - mean) / sd: scale / sd * gradient, less its projections on 1 and on v."""
  x, scale, bias, mean, var = saved
  gradient = gradients[0].astype(jnp.float32)
  inverse = jax.lax.rsqrt(_broadcast(var, x, sets) + epsilon)
  distance = x.astype(jnp.float32) - _as_row(_broadcast(mean, x, sets), x)
  if relu:
    y = distance * _as_row(inverse * scale, x) + _as_row(bias, x)
    gradient = jnp.where(y > 0, gradient, 0.0)
  to_bias, products = sums.sum_positions(gradient, gradient * distance)  # (N, C)
  to_scale = products * inverse[:, 0, 0]
  positions = x.shape[1] * x.shape[2]
  shift, slope = (
    _broadcast(sets.reduce(g * scale), x, sets) / positions for g in (to_bias, to_scale)
  )
  to_x = inverse * (gradient * scale - shift - distance * (inverse * slope))
  return to_x.astype(x.dtype), to_scale.sum(0), to_bias.sum(0)


normalize.defvjp(_normalize_forward, _normalize_backward)


def scale_and_shift(
  x: Float[Array, "n h w c"],
  mean: Float32[Array, "... c"],
  slope: Float32[Array, "... c"],
  bias: Float32[Array, " c"],
  relu: bool,
) -> Float[Array, "n h w c"]:
  """Normalizes `x` in float32 with given statistics, the last step of every norm."""
  y = (x.astype(jnp.float32) - mean) * slope + bias
  return (nn.relu(y) if relu else y).astype(x.dtype)


def _compute_moments(x: Array, sets: Sets) -> tuple[Array, Array]:
  """Computes mean and biased variance of each set, in one pass over the data.

  It first computes them for each channel of an image, from the distance to the image's first
  pixel, because E[x^2] - E[x]^2 can turn negative in float32. Then it joins the channels and images
  of a set, which weigh the same. Source: Chan, Golub and LeVeque 1983 (The American Statistician
  37).
  """
  first = x[:, :1, :1].astype(jnp.float32)
  distance = x.astype(jnp.float32) - _as_row(first, x)
  positions = x.shape[1] * x.shape[2]
  shift, square = (
    total / positions for total in sums.sum_positions(distance, jnp.square(distance))
  )
  means, variances = first[:, 0, 0] + shift, square - jnp.square(shift)  # (N, C)
  return sets.join(means, variances)


def _broadcast(reduced: Array, x: Array, sets: Sets) -> Array:
  """Gives each element of (N, H, W, C) `x` the value of its set: (N or 1, 1, 1, C)."""
  return sets.broadcast(reduced, x.shape[0], x.shape[-1])[:, None, None]


def _as_row(values: Array, x: Array) -> Array:
  """Stores a row of `x` with `values` in memory, the form that terms of `sum_positions` may use."""
  shape = jnp.broadcast_shapes(values.shape, (1, 1, *x.shape[2:]))
  return jax.lax.optimization_barrier(jnp.broadcast_to(values, shape))


# ---- ReLU


def relu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
  """max(x, 0), with the gradient 0 at 0; NaN stays NaN."""
  if backend.select_backend() == "definition":
    return nn.relu(x)
  # XLA:CPU compares bfloat16 more slowly than float32.
  return jnp.where(x.astype(jnp.float32) <= 0, jnp.zeros_like(x), x)
