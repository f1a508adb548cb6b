"""Max pooling in C++ against the definition, in value and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from flax_cifar.kernels.native import library, pooling
from tests.kernels.native.definitions import compare, draw, measure, without_pixels

if not library.is_available():
  pytest.skip("there is no C++ compiler", allow_module_level=True)


def max_pool(x, window):
  """By XLA."""
  sides = (1, window, window, 1)
  return lax.reduce_window(x, -jnp.inf, lax.max, sides, sides, "VALID")


@pytest.mark.parametrize("window", [2, 3, 5])
@pytest.mark.parametrize("shape", [(3, 9, 11, 3), (2, 6, 5, 24), (32, 31, 31, 64)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_equals_the_definition(shape, window, dtype):
  x = draw(*shape, dtype=dtype)
  expected, backward = jax.vjp(lambda x: max_pool(x, window), x)
  y, ours = jax.vjp(jax.jit(lambda x: pooling.max_pool(x, window)), x)
  np.testing.assert_array_equal(y, expected)
  gradient = draw(*y.shape, seed=1, dtype=dtype)
  np.testing.assert_array_equal(ours(gradient)[0], backward(gradient)[0])


@pytest.mark.parametrize("shape", [(3, 9, 11, 3), (16, 15, 15, 48)])
def test_moments_and_their_gradients_equal_the_definition(shape):
  def ours(x):
    return without_pixels(pooling.max_pool_and_measure(x, 2))

  def theirs(x):
    y = max_pool(x, 2)
    return without_pixels([y, measure(y)])

  compare(ours, theirs, (draw(*shape),), "float32")


@pytest.mark.parametrize("value", [1.0, 3.7, 11.0])
def test_an_odd_first_pixel_leaves_the_variance_right(value):
  """All distances are to the first pixel, so their squares nearly cancel."""
  x = jnp.full((1, 256, 256, 16), value).at[0, :2, :2].set(0)
  _, (mean, variance, _) = pooling.max_pool_and_measure(x, 2)
  share = 1 / 128**2
  np.testing.assert_allclose(mean, value * (1 - share), rtol=1e-5)
  np.testing.assert_allclose(variance, value**2 * share * (1 - share), rtol=0.2)


def test_nan_is_the_maximum():
  x = draw(1, 4, 4, 16).at[0, 2, 1, 5].set(jnp.nan)
  assert np.argwhere(np.isnan(pooling.max_pool(x, 2))).tolist() == [[0, 1, 0, 5]]
