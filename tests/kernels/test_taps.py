"""Kernel gradients, as one matrix product per tap, against a float64 sum over positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_cifar import environment
from flax_cifar.kernels import taps

pytestmark = pytest.mark.usefixtures("optimized")

NO_PADDING = ((0, 0), (0, 0))


def sum_over_positions(x, gradient, shape, dilation):
  """The definition: each weight multiplies the pixel under its tap at every kernel position."""
  height, width = gradient.shape[1:3]
  total = np.zeros(shape)
  for i in range(shape[0]):
    for j in range(shape[1]):
      top, left = i * dilation[0], j * dilation[1]
      part = x[:, top : top + height, left : left + width].astype(np.float64)
      total[i, j] = np.einsum("nhwc,nhwo->co", part, gradient.astype(np.float64))
  return total


@pytest.mark.parametrize("cores", [1, 2, 3, 8, 64])
@pytest.mark.parametrize(
  ("images", "shape", "padding", "dilation"),
  [
    (16, (3, 3, 4, 5), ((1, 1), (1, 1)), (1, 1)),
    (8, (3, 3, 4, 5), ((1, 0), (3, 2)), (2, 3)),
    (6, (1, 3, 2, 3), NO_PADDING, (1, 2)),  # not a multiple of IMAGES_AT_A_TIME
    (8, (3, 1, 65, 64), ((0, 0), (1, 1)), (2, 1)),  # beyond SMALL_KERNEL
  ],
)
def test_a_kernel_gradient_is_the_sum_over_positions(
  images, shape, padding, dilation, cores, monkeypatch
):
  monkeypatch.setattr(environment, "count_cores", lambda: cores)
  rng = np.random.default_rng(0)
  x = rng.normal(size=(images, 9, 10, shape[2])).astype(np.float32)
  padded = np.pad(x, ((0, 0), *padding, (0, 0)))
  reach = [(k - 1) * d for k, d in zip(shape[:2], dilation, strict=True)]
  size = images, padded.shape[1] - reach[0], padded.shape[2] - reach[1], shape[3]
  gradient = rng.normal(size=size).astype(np.float32)
  expected = sum_over_positions(padded, gradient, shape, dilation)
  # A function of its own, because JAX would take the trace of another number of cores.
  function = jax.jit(lambda *arrays: taps.get_kernel_gradient(*arrays, shape, padding, dilation))
  result = function(x, gradient)
  np.testing.assert_allclose(result, expected, atol=1e-3)


def test_bfloat16_is_added_in_float32():
  ones = jnp.ones((8, 32, 32, 2), jnp.bfloat16)
  gradient = taps.get_kernel_gradient(ones, ones, (1, 1, 2, 2), NO_PADDING, (1, 1))
  assert gradient.dtype == jnp.bfloat16
  assert (gradient == 8 * 32 * 32).all()  # in bfloat16 the sum would stop at 256


@pytest.mark.parametrize(
  ("images", "results", "cores", "parts"),
  [(8, 32 * 32, 2, 2), (8, 32 * 32, 3, 2), (8, 32 * 32, 64, 8), (5, 1, 4, 1), (8, 128 * 64, 4, 1)],
)
def test_a_product_with_few_results_is_split_over_the_cores(
  images, results, cores, parts, monkeypatch
):
  monkeypatch.setattr(environment, "count_cores", lambda: cores)
  assert taps._count_parts(images, results) == parts
