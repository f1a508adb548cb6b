"""Normalization with ReLU as one differentiable function, and ReLU alone."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from flax_cifar.kernels import backend, sums
from flax_cifar.kernels import moments as moments_lib
from flax_cifar.parallel import mesh as mesh_lib

# ---- Normalization with ReLU


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def normalize(
  x: Float[Array, "n h w c"],
  scale: Float32[Array, " c"],
  bias: Float32[Array, " c"],
  sets: moments_lib.Sets,
  epsilon: float,
  relu: bool,
) -> tuple[Float[Array, "n h w c"], Float32[Array, "a b"], Float32[Array, "a b"]]:
  """Subtracts the mean and divides by the standard deviation of each set.

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
  return _normalize(x, scale, bias, sets, epsilon, relu)


def _normalize(
  x: Array, scale: Array, bias: Array, sets: moments_lib.Sets, epsilon: float, relu: bool
) -> tuple[Array, Array, Array]:
  mean, var = _compute_moments(x, sets)
  slope = jax.lax.rsqrt(_broadcast(var, x, sets) + epsilon) * scale
  return scale_and_shift(x, _broadcast(mean, x, sets), slope, bias, relu), mean, var


def _normalize_forward(x: Array, scale: Array, bias: Array, *arguments: Any) -> Any:
  # Not by `normalize`: the moments that are saved have gradients, which second derivatives need.
  y, mean, var = _normalize(x, scale, bias, *arguments)
  return (y, mean, var), (x, scale, bias, mean, var)


def _normalize_backward(
  sets: moments_lib.Sets, epsilon: float, relu: bool, saved: Any, gradients: Any
) -> Any:
  """With v = (x - mean) / sd: scale / sd * gradient, less its projections on 1 and on v."""
  x, scale, bias, mean, var = saved
  gradient = gradients[0].astype(jnp.float32)
  inverse = jax.lax.rsqrt(_broadcast(var, x, sets) + epsilon)
  distance = x.astype(jnp.float32) - _as_row(_broadcast(mean, x, sets), x)
  if relu:
    y = distance * _as_row(inverse * scale, x) + _as_row(bias, x)
    gradient = jnp.where(y > 0, gradient, 0.0)
  to_bias, products = _sum(sets, gradient, gradient * distance)
  to_scale = products * inverse[:, 0, 0]
  positions = x.size // to_bias.size
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


def _compute_moments(x: Array, sets: moments_lib.Sets) -> tuple[Array, Array]:
  """Computes mean and biased variance of each set, in one pass over the data.

  It first computes them for each channel of an image, from the distance to the image's first
  pixel, because E[x^2] - E[x]^2 cancels in float32 where the mean is large. Then it joins the
  channels and images of a set, which weigh the same. Source: Chan, Golub and LeVeque 1983 (The
  American Statistician 37). Where `_sum` adds up all images, they count as one.
  """
  first = (x[:1] if _sums_images(sets) else x)[:, :1, :1].astype(jnp.float32)
  distance = x.astype(jnp.float32) - _as_row(first, x)
  totals = _sum(sets, distance, jnp.square(distance))
  shift, square = (total / (x.size // total.size) for total in totals)
  means = first[:, 0, 0] + shift
  variances = jnp.maximum(square - jnp.square(shift), 0)  # an odd first pixel can make it negative
  return sets.join(means, variances)


def _sum(sets: moments_lib.Sets, *terms: Array) -> list[Float32[Array, "n_or_1 c"]]:
  """Sums each term over its positions, and over the images too where `_sums_images` says so."""
  if _sums_images(sets):
    return [total[None] for total in sums.sum_images(*terms)]
  return sums.sum_positions(*terms)


def _sums_images(sets: moments_lib.Sets) -> bool:
  """Whether all images are one set, and a sum for each of them is a detour: on one GPU."""
  is_whole = isinstance(sets, moments_lib.GhostBatches) and sets.number == 1
  return is_whole and backend.select_backend() == "gpu" and mesh_lib.count_shards() == 1


def _broadcast(reduced: Array, x: Array, sets: moments_lib.Sets) -> Array:
  """Gives each element of (N, H, W, C) `x` the value of its set: (N or 1, 1, 1, C)."""
  return sets.broadcast(reduced, x.shape[0], x.shape[-1])[:, None, None]


def _as_row(values: Array, x: Array) -> Array:
  """Stores a row of `x` with `values` in memory, the form that terms of `sum_positions` may use."""
  if backend.select_backend() in backend.PLAIN:
    return values
  shape = jnp.broadcast_shapes(values.shape, (1, 1, *x.shape[2:]))
  return jax.lax.optimization_barrier(jnp.broadcast_to(values, shape))


# ---- ReLU


def relu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
  """max(x, 0), with the gradient 0 at 0; NaN stays NaN."""
  if backend.select_backend() in backend.PLAIN:
    return nn.relu(x)
  # XLA:CPU compares bfloat16 more slowly than float32.
  return jnp.where(x.astype(jnp.float32) <= 0, jnp.zeros_like(x), x)
