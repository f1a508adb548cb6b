"""Normalisation layers behind one call: `norm(x_NxHxWxC, train)`; chosen by name in the config.

All of them compute in float32 and return the type of their input.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_cifar.errors import choose, require
from flax_cifar.models import onednn_norm
from flax_cifar.models.lowering import is_served_by_onednn

Norm = Callable[..., nn.Module]  # a class or partial; called as norm(name=...)(x, train)

# The name of a parameter that keeps its first value; the optimiser leaves such leaves alone.
FIXED_SCALE = "fixed_scale"


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def compute_moments(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
  """Mean and biased variance of float32 `x` over `axes`, which are kept with length 1.

  In two passes: E[x^2] - E[x]^2 can turn negative in float32. Its gradient is written out, lest
  x - mean be kept from the forward pass to the backward pass.
  """
  mean = x.mean(axes, keepdims=True)
  return mean, jnp.square(x - mean).mean(axes, keepdims=True)


def _moments_forward(x: jax.Array, axes: tuple[int, ...]) -> Any:
  mean, var = compute_moments(x, axes)
  return (mean, var), (x, mean)


def _moments_backward(axes: tuple[int, ...], saved: Any, gradients: Any) -> tuple[jax.Array]:
  x, mean = saved
  to_mean, to_var = gradients
  count = math.prod(x.shape[axis] for axis in axes)
  return ((x - mean) * (2 / count * to_var) + to_mean / count,)


compute_moments.defvjp(_moments_forward, _moments_backward)


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
  """

  momentum: float
  epsilon: float
  num_splits: int = 1
  train_scale: bool = True

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    channels = x.shape[-1]
    scale = self._create_scale(channels)
    bias = self.param("bias", nn.initializers.zeros, (channels,))
    mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,))
    var = self.variable("batch_stats", "var", jnp.ones, (channels,))
    if not train:
      slope = jax.lax.rsqrt(var.value + self.epsilon) * scale
      return ((x.astype(jnp.float32) - mean.value) * slope + bias).astype(x.dtype)

    require(
      self.num_splits > 0 and x.shape[0] % self.num_splits == 0,
      "norm.ghost.num_splits",
      self.num_splits,
      f"a divisor of the batch size {x.shape[0]}",
    )
    y, part_mean, part_var = normalize_batch(
      x, scale, bias, epsilon=self.epsilon, num_splits=self.num_splits
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


def _is_served_by_onednn(x: jax.Array) -> bool:
  return is_served_by_onednn(x.dtype) and onednn_norm.has_fast_kernels(x)


def normalize_batch(
  x: jax.Array, scale: jax.Array, bias: jax.Array, *, epsilon: float, num_splits: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Normalises each channel of each of the interleaved parts of the batch.

  Args:
    x: (N, ..., C).
    scale: float32 (C,).
    bias: float32 (C,).
    epsilon: added to the variance.
    num_splits: parts; example i belongs to part i mod num_splits.

  Returns:
    y like x; the parts' means and biased variances, float32 (num_splits, C).
  """
  parts = x.reshape(-1, num_splits, *x.shape[1:])
  if _is_served_by_onednn(x):
    results = [onednn_norm.batch_norm(parts[:, i], scale, bias, epsilon) for i in range(num_splits)]
    ys, means, variances = zip(*results, strict=True)
    return jnp.stack(ys, axis=1).reshape(x.shape), jnp.stack(means), jnp.stack(variances)
  parts = parts.astype(jnp.float32)
  mean, var = compute_moments(parts, (0, *range(2, parts.ndim - 1)))
  slope = jax.lax.rsqrt(var + epsilon) * scale
  y = (parts * slope + (bias - mean * slope)).reshape(x.shape).astype(x.dtype)
  return y, mean.reshape(num_splits, -1), var.reshape(num_splits, -1)


class GroupNorm(nn.Module):
  """Group normalisation over (H, W, C / groups) of each example, then scale and bias per channel.

  One group is what the sources call layer norm: it normalises over channels and positions
  together, unlike `nn.LayerNorm`. Source: Wu and He 2018 (arXiv:1803.08494).

  Attributes:
    num_groups: must divide the number of channels.
    epsilon: added to the variance.
    affine: False leaves out scale and bias.
  """

  num_groups: int
  epsilon: float
  affine: bool = True

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
    y = normalize_groups(x, epsilon=self.epsilon, num_groups=self.num_groups)
    if not self.affine:
      return y.astype(x.dtype)
    scale = self.param("scale", nn.initializers.ones, (channels,))
    bias = self.param("bias", nn.initializers.zeros, (channels,))
    if _is_served_by_onednn(x):
      return onednn_norm.scale_and_shift(y, scale, bias)
    return (y * scale + bias).astype(x.dtype)


def normalize_groups(x: jax.Array, *, epsilon: float, num_groups: int) -> jax.Array:
  """Normalises each example over all positions and the channels of each group.

  Args:
    x: (N, ..., C).
    epsilon: added to the variance.
    num_groups: must divide C.

  Returns:
    An array of the same shape; its type is that of x or float32.
  """
  groups = x.reshape(len(x), -1, num_groups, x.shape[-1] // num_groups)
  if is_served_by_onednn(x.dtype):
    rows = groups.swapaxes(1, 2).reshape(len(x) * num_groups, -1)
    y = onednn_norm.layer_norm(rows, epsilon).reshape(len(x), num_groups, *groups.shape[1::2])
    return y.swapaxes(1, 2).reshape(x.shape)
  groups = groups.astype(jnp.float32)
  mean, var = compute_moments(groups, (1, 3))
  return ((groups - mean) * jax.lax.rsqrt(var + epsilon)).reshape(x.shape)


class NoNorm(nn.Module):
  """The identity, so that a network can be built without normalisation."""

  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    del train
    return x


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
