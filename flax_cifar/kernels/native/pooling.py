"""Max pooling, with the moments of its output next to it."""

import functools
from typing import Any

import jax
from jaxtyping import Array, Float

from flax_cifar.kernels import moments as moments_lib
from flax_cifar.kernels.native import library


def max_pool(x: Float[Array, "n h w c"], window: int) -> Float[Array, "n h2 w2 c"]:
  """Takes the maximum over adjacent windows of `window` x `window` pixels; cuts off the rest.

  Differentiable once; the first pixel that is the maximum of a window gets its gradient.
  """
  return _max_pool(x, window, False)[0]


def max_pool_and_measure(
  x: Float[Array, "n h w c"], window: int
) -> tuple[Float[Array, "n h2 w2 c"], moments_lib.Moments]:
  """Returns the result of `max_pool` and its moments, which are differentiable too."""
  y, mean, variance = _max_pool(x, window, True)
  return y, moments_lib.Moments(mean, variance, y.shape[1] * y.shape[2])


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _max_pool(x: Array, window: int, measured: bool) -> tuple[Array, Array, Array]:
  n, height, width, channels = x.shape
  rows = n if measured else 0
  results = (
    library.like(x, n, height // window, width // window, channels),
    library.floats(rows, channels),
    library.floats(rows, channels),
  )
  shape = *x.shape, window, int(measured)
  return library.call(library.MAX_POOL, x.dtype, shape, (x,), results)


def _max_pool_forward(x: Array, window: int, measured: bool) -> Any:
  y, mean, variance = _max_pool(x, window, measured)
  return (y, mean, variance), (x, mean)


def _max_pool_backward(window: int, measured: bool, saved: Any, gradients: Any) -> tuple[Array]:
  x, mean = saved
  to_y, to_mean, to_variance = gradients
  terms = library.get_moment_terms(to_y, mean, to_mean, to_variance)
  shape = *x.shape, window, int(measured)
  results = (library.like(x, *x.shape),)
  return tuple(library.call(library.MAX_POOL_BACK, x.dtype, shape, (to_y, x, *terms), results))


_max_pool.defvjp(_max_pool_forward, _max_pool_backward)
