"""Normalisation layers behind one call: `norm(x_NxHxWxC, train)`; chosen by name in the config.

All of them compute in float32 and return the type of their input, of which ReLU may be a part: in
`normalize` it costs no pass over the data of its own.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_cifar.errors import choose, require
from flax_cifar.models.lowering import add_each, relu

# A class or partial; called as norm(relu=..., name=...)(x, train).
Norm = Callable[..., nn.Module]

# The name of a parameter that keeps its first value; the optimiser leaves such leaves alone.
FIXED_SCALE = "fixed_scale"

ROWS = 8  # to add at once: so few XLA:CPU keeps side by side


class Parts(NamedTuple):
  """Statistics per channel of each of the interleaved parts of a batch."""

  number: int

  def pool(self, values: jax.Array) -> jax.Array:
    """Means over each part of (N, C), as (parts, C)."""
    return values.reshape(-1, self.number, values.shape[-1]).mean(0)

  def spread(self, pooled: jax.Array, count: int, channels: int) -> jax.Array:
    """What each example has of (parts, C): (N or 1, C)."""
    return pooled if self.number == 1 else jnp.tile(pooled, (count // self.number, 1))


class Groups(NamedTuple):
  """Statistics per example of each group of channels."""

  number: int

  def pool(self, values: jax.Array) -> jax.Array:
    """Means over each group of (N, C), as (N, groups)."""
    return values.reshape(len(values), self.number, -1).mean(-1)

  def spread(self, pooled: jax.Array, count: int, channels: int) -> jax.Array:
    """What each channel has of (N, groups): (N, C)."""
    return jnp.repeat(pooled, channels // self.number, axis=-1)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def normalize(
  x: jax.Array,
  scale: jax.Array,
  bias: jax.Array,
  sets: Parts | Groups,
  epsilon: float,
  relu: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Subtracts the mean and divides by the standard deviation of each set; differentiable once.

  Args:
    x: (N, H, W, C).
    scale: float32 (C,), a factor of the result.
    bias: float32 (C,), added at the end.
    sets: which elements share mean and variance.
    epsilon: added to the variance.
    relu: whether ReLU comes last.

  Returns:
    y like x; means and biased variances, float32 as `sets.pool` has them, through which no
    gradient flows.
  """
  mean, var = _compute_moments(x, sets)
  slope = jax.lax.rsqrt(_spread(var, x, sets) + epsilon) * scale
  return _transform(x, _spread(mean, x, sets), slope, bias, relu), mean, var


def _transform(
  x: jax.Array, mean: jax.Array, slope: jax.Array, bias: jax.Array, relu: bool
) -> jax.Array:
  """What every norm does to an element once it has its statistics."""
  y = (x.astype(jnp.float32) - mean) * slope + bias
  return (nn.relu(y) if relu else y).astype(x.dtype)


def _spread(pooled: jax.Array, x: jax.Array, sets: Parts | Groups) -> jax.Array:
  """What holds for each element of (N, H, W, C) `x`: (N or 1, 1, 1, C)."""
  return sets.spread(pooled, x.shape[0], x.shape[-1])[:, None, None]


def _compute_moments(x: jax.Array, sets: Parts | Groups) -> tuple[jax.Array, jax.Array]:
  """Mean and biased variance of each set, in one pass over the data.

  First of each channel of an image, from the distance to its first pixel, because E[x^2] - E[x]^2
  can turn negative in float32; then of those that share, which weigh the same. Source: Chan, Golub
  and LeVeque 1983 (The American Statistician 37).
  """
  first = x[:, :1, :1].astype(jnp.float32)
  distance = x.astype(jnp.float32) - _as_row(first, x)
  positions = x.shape[1] * x.shape[2]
  shift, square = (total / positions for total in _sum_positions(distance, jnp.square(distance)))
  means, variances = first[:, 0, 0] + shift, square - jnp.square(shift)  # (N, C)
  mean = sets.pool(means)
  return mean, sets.pool(variances + jnp.square(means - _spread(mean, x, sets)[:, 0, 0]))


def _as_row(values: jax.Array, x: jax.Array) -> jax.Array:
  """A row of `x` with `values`, in memory: what `_sum_positions` may find in its terms."""
  shape = jnp.broadcast_shapes(values.shape, (1, 1, *x.shape[2:]))
  return jax.lax.optimization_barrier(jnp.broadcast_to(values, shape))


def _sum_positions(*terms: jax.Array) -> list[jax.Array]:
  """Sums over H and W of float32 (N, H, W, C), several at once, as (N, C).

  XLA:CPU adds a few long rows at the speed of memory, and takes several times as long for a sum
  of many rows, of columns, or without another sum beside it.
  """
  count, _, _, channels = terms[0].shape
  sums = _sum_rows(terms, length=terms[0].shape[2] * channels)
  while sums[0].size > count * channels:
    sums = _sum_rows(sums, length=channels)
  return [total.reshape(count, channels) for total in sums]


def _sum_rows(terms: Sequence[jax.Array], length: int) -> Sequence[jax.Array]:
  """Of float32 terms (N, ...) in rows of `length`, the sums of each few rows, (N, rows, length)."""
  count = len(terms[0])
  rows = terms[0].size // (count * length)
  divisors = [n for n in range(2, rows + 1) if rows % n == 0]
  few = min(divisors, key=lambda n: abs(math.log(n / ROWS)), default=1)
  parts = [term.reshape(count, rows // few, few, length) for term in terms]
  return jax.lax.reduce(parts, [jnp.zeros((), jnp.float32)] * len(parts), add_each, (2,))


def _normalize_forward(x: jax.Array, scale: jax.Array, bias: jax.Array, *arguments: Any) -> Any:
  y, mean, var = normalize(x, scale, bias, *arguments)
  return (y, mean, var), (x, scale, bias, mean, var)


def _normalize_backward(
  sets: Parts | Groups, epsilon: float, relu: bool, saved: Any, gradients: Any
) -> Any:
  """With v = (x - mean) / sd: scale / sd * gradient, less its projections on 1 and on v."""
  x, scale, bias, mean, var = saved
  gradient = gradients[0].astype(jnp.float32)
  inverse = jax.lax.rsqrt(_spread(var, x, sets) + epsilon)
  distance = x.astype(jnp.float32) - _as_row(_spread(mean, x, sets), x)
  if relu:
    y = distance * _as_row(inverse * scale, x) + _as_row(bias, x)
    gradient = jnp.where(y > 0, gradient, 0.0)
  to_bias, products = _sum_positions(gradient, gradient * distance)  # (N, C)
  to_scale = products * inverse[:, 0, 0]
  positions = x.shape[1] * x.shape[2]
  shift, slope = (_spread(sets.pool(g * scale), x, sets) / positions for g in (to_bias, to_scale))
  to_x = inverse * (gradient * scale - shift - distance * (inverse * slope))
  return to_x.astype(x.dtype), to_scale.sum(0), to_bias.sum(0)


normalize.defvjp(_normalize_forward, _normalize_backward)


class BatchNorm(nn.Module):
  """Batch normalisation with PyTorch's statistics, over `num_splits` ghost batches.

  In training each of the `num_splits` interleaved parts of the batch (example i belongs to part
  i mod num_splits) is normalised by its own biased variance; the running variance is the unbiased
  one. In evaluation the running values, averaged over the parts, are used.

  Sources: Ioffe and Szegedy 2015 (arXiv:1502.03167); ghost batches: Hoffer et al. 2017
  (arXiv:1705.08741).

  Attributes:
    momentum: share of the old running value kept at each step (torch's momentum is 1 - this).
    epsilon: added to the variance.
    num_splits: ghost batches per batch; must divide the batch size.
    train_scale: False keeps the scale at 1, a parameter called FIXED_SCALE.
    relu: whether ReLU comes last.
  """

  momentum: float
  epsilon: float
  num_splits: int = 1
  train_scale: bool = True
  relu: bool = False

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    channels = x.shape[-1]
    scale = self._create_scale(channels)
    bias = self.param("bias", nn.initializers.zeros, (channels,))
    mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,))
    var = self.variable("batch_stats", "var", jnp.ones, (channels,))
    if not train:
      slope = jax.lax.rsqrt(var.value + self.epsilon) * scale
      return _transform(x, mean.value, slope, bias, self.relu)

    require(
      self.num_splits > 0 and x.shape[0] % self.num_splits == 0,
      "norm.ghost.num_splits",
      self.num_splits,
      f"a divisor of the batch size {x.shape[0]}",
    )
    y, part_mean, part_var = normalize(
      x, scale, bias, Parts(self.num_splits), self.epsilon, self.relu
    )
    count = x.size // (self.num_splits * channels)
    self._update(mean, part_mean)
    self._update(var, part_var * (count / max(count - 1, 1)))
    return y

  def _create_scale(self, channels: int) -> jax.Array:
    if self.train_scale:
      return self.param("scale", nn.initializers.ones, (channels,))
    return jax.lax.stop_gradient(self.param(FIXED_SCALE, nn.initializers.ones, (channels,)))

  def _update(self, running: nn.Variable, parts: jax.Array) -> None:
    running.value = self.momentum * running.value + (1 - self.momentum) * parts.mean(0)


class GroupNorm(nn.Module):
  """Group normalisation over (H, W, C / groups) of each example, then scale and bias per channel.

  One group is what the sources call layer norm: it normalises over channels and positions
  together, unlike `nn.LayerNorm`. Source: Wu and He 2018 (arXiv:1803.08494).

  Attributes:
    num_groups: must divide the number of channels.
    epsilon: added to the variance.
    affine: False leaves out scale and bias.
    relu: whether ReLU comes last.
  """

  num_groups: int
  epsilon: float
  affine: bool = True
  relu: bool = False

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    del train  # the same in training and evaluation
    channels = x.shape[-1]
    require(
      self.num_groups > 0 and channels % self.num_groups == 0,
      "norm.group.num_groups",
      self.num_groups,
      f"a divisor of the layer's {channels} channels",
    )
    scale, bias = jnp.ones(channels), jnp.zeros(channels)
    if self.affine:
      scale = self.param("scale", nn.initializers.ones, (channels,))
      bias = self.param("bias", nn.initializers.zeros, (channels,))
    return normalize(x, scale, bias, Groups(self.num_groups), self.epsilon, self.relu)[0]


class NoNorm(nn.Module):
  """The identity, or ReLU alone, so that a network can be built without normalisation."""

  relu: bool = False

  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    del train
    return relu(x) if self.relu else x


NORMS: dict[str, Norm] = {
  "batch": BatchNorm,
  "ghost": BatchNorm,
  "layer": partial(GroupNorm, num_groups=1),
  "group": GroupNorm,
  "none": NoNorm,
}


def get_norm(name: str, arguments: Mapping[str, Mapping[str, Any]]) -> Norm:
  """The norm called `name`, with `arguments[name]` as its attributes.

  Raises:
    UserError: `name` is not in NORMS, or a momentum or epsilon is out of range. What depends on
      the layer the norm checks itself.
  """
  norm = choose("model.norm", name, NORMS)
  for key, value in arguments[name].items():
    if key == "momentum":
      require(0 <= value < 1, f"norm.{name}.momentum", value, "at least 0 and below 1")
    if key == "epsilon":
      check_epsilon(f"norm.{name}.epsilon", value)
  return partial(norm, **arguments[name])


def check_epsilon(key: str, epsilon: float) -> None:
  """A UserError unless float32 can divide by `epsilon`, or by its root."""
  require(1e-30 <= epsilon <= 1e30, key, epsilon, "from 1e-30 to 1e30")
