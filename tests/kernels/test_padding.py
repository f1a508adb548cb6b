"""Reflection padding against NumPy, in value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_cifar.kernels import backend
from flax_cifar.kernels import padding as padding_lib

pytestmark = pytest.mark.usefixtures("optimized")


@pytest.mark.parametrize("padding", [0, 1, 2, 4])
def test_pad_reflect_equals_numpy_and_so_does_its_gradient(padding):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, 5, 7, 3)).astype(np.float32)
  y, backward = jax.vjp(jax.jit(lambda x: padding_lib.pad_reflect(x, padding)), x)
  np.testing.assert_array_equal(
    y, np.pad(x, ((0, 0), (padding,) * 2, (padding,) * 2, (0, 0)), mode="reflect")
  )
  direction = rng.normal(size=y.shape)
  # The gradient of a pixel is the sum over its copies in the padded image; NumPy locates them.
  pixels = np.arange(35).reshape(5, 7)
  copied_pixels = np.pad(pixels, padding, mode="reflect").ravel()
  expected = np.zeros((2, 35, 3))
  for batch in range(2):
    np.add.at(expected[batch], copied_pixels, direction[batch].reshape(-1, 3))
  (gradient,) = backward(direction.astype(np.float32))
  np.testing.assert_allclose(gradient, expected.reshape(x.shape), rtol=1e-5, atol=1e-5)


def test_the_gradient_of_pad_reflect_in_bfloat16_is_rounded_once(monkeypatch):
  monkeypatch.setenv(backend.VARIABLE, "xla")
  x = jnp.ones((2, 8, 8, 3), jnp.bfloat16)
  y, backward = jax.vjp(lambda x: padding_lib.pad_reflect(x, 3), x)
  direction = jnp.cos(jnp.arange(y.size)).reshape(y.shape).astype(jnp.bfloat16)
  _, exact = jax.vjp(lambda x: padding_lib.pad_reflect(x, 3), x.astype(jnp.float32))
  (expected,) = exact(direction.astype(jnp.float32))
  np.testing.assert_array_equal(backward(direction)[0], expected.astype(jnp.bfloat16))


def test_pad_reflect_of_an_image_smaller_than_its_padding_equals_numpy():
  x = jnp.arange(9.0).reshape(1, 3, 3, 1)
  expected = np.pad(x, ((0, 0), (5, 5), (5, 5), (0, 0)), mode="reflect")
  np.testing.assert_array_equal(padding_lib.pad_reflect(x, 5), expected)
