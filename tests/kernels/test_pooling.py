"""Max pooling against Flax, in value and gradient. Within networks: tests/test_numerics.py."""

from functools import partial

import flax.linen as nn
import jax
import numpy as np
import pytest

from flax_cifar.kernels import pooling

pytestmark = pytest.mark.usefixtures("optimized")


@pytest.mark.parametrize("window", [2, 3])
@pytest.mark.parametrize("shape", [(2, 6, 6, 3), (2, 7, 5, 3), (1, 3, 8, 1)])
def test_max_pool_and_its_gradient_equal_flax(shape, window):
  rng, sides = np.random.default_rng(0), (window, window)
  pool = partial(nn.max_pool, window_shape=sides, strides=sides)
  for x in (rng.normal(size=shape), rng.integers(0, 2, shape)):  # the second has ties
    x = x.astype(np.float32)
    y, backward = jax.vjp(jax.jit(lambda x: pooling.max_pool(x, window)), x)
    expected, expected_backward = jax.vjp(pool, x)
    np.testing.assert_array_equal(y, expected)
    direction = rng.normal(size=y.shape).astype(np.float32)
    np.testing.assert_array_equal(backward(direction)[0], expected_backward(direction)[0])


def test_a_large_window_has_a_small_program():
  x = np.zeros((1, 17, 17, 1), np.float32)
  x[0, 16, 15] = 1  # pixel 287 of 289
  gradient = jax.jit(jax.grad(lambda x: pooling.max_pool(x, 17).sum()))
  assert len(gradient.lower(x).as_text().splitlines()) < 100
  np.testing.assert_array_equal(gradient(x), x)
