"""Sums over positions against float64 NumPy."""

import jax
import numpy as np
import pytest

from flax_cifar.kernels import backend, sums

pytestmark = pytest.mark.usefixtures("optimized")

SHAPES = [
  (1, 1, 1, 1),
  (5, 7, 3, 3),  # no row of several pixels divides an image
  (4, 16, 16, 16),
  (6, 32, 32, 32),
  (3, 9, 11, 48),
  (2, 8, 8, 256),
]


def draw(shape):
  return np.random.default_rng(0).normal(1, 2, (2, *shape)).astype(np.float32)


@pytest.mark.parametrize("shape", SHAPES)
def test_sum_images_adds_up_images_and_positions(shape):
  terms = draw(shape)
  found = jax.jit(sums.sum_images)(*terms)
  expected = terms.astype(np.float64).sum((1, 2, 3))
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("backend_name", ["xla", "gpu"])
@pytest.mark.parametrize("shape", SHAPES)
def test_sum_positions_adds_up_the_positions_of_each_image(shape, backend_name, monkeypatch):
  monkeypatch.setenv(backend.VARIABLE, backend_name)
  terms = draw(shape)
  found = jax.jit(lambda *terms: sums.sum_positions(*terms))(*terms)  # no trace of another case
  expected = terms.astype(np.float64).sum((2, 3))
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-3)
