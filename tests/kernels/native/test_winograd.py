"""Winograd's 3x3 convolutions in C++ against the definition, in value and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from flax_cifar.kernels.native import library, winograd
from tests.kernels.native.definitions import (
  NHWC,
  compare,
  draw,
  measure,
  without_pixels,
)

if not library.is_available():
  pytest.skip("there is no C++ compiler", allow_module_level=True)

SAME = winograd.Window(1, 1, 1, 1, False, 1)
WINDOWS = {
  "same": SAME,
  "none": winograd.Window(0, 0, 0, 0, False, 1),
  "uneven": winograd.Window(2, 0, 1, 3, False, 1),
  "dilated": winograd.Window(2, 2, 2, 2, False, 2),
  "reflected": winograd.Window(3, 3, 3, 3, True, 3),
}


def convolve(x, kernel, bias, window, *, relu):
  """By XLA."""
  padding = ((0, 0), window[:2], window[2:4], (0, 0))
  x = jnp.pad(x, padding, mode="reflect" if window.reflect else "constant")
  y = lax.conv_general_dilated(
    x, kernel, (1, 1), "VALID", rhs_dilation=(window.dilation,) * 2, dimension_numbers=NHWC
  )
  y = y if bias is None else y + bias
  return jnp.maximum(y, 0) if relu else y


def draw_operands(shape, features, dtype):
  x, kernel = draw(*shape, dtype=dtype), draw(3, 3, shape[-1], features, seed=9)
  return x, kernel / (3 * shape[-1] ** 0.5), draw(features, seed=10)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("shape", [(3, 9, 11, 3), (5, 8, 8, 24), (2, 33, 6, 16)])
@pytest.mark.parametrize(("features", "dtype"), [(10, "float32"), (32, "bfloat16")])
def test_it_equals_the_definition(window, shape, features, dtype):
  window = WINDOWS[window]

  def ours(*operands):
    return winograd.convolve(*operands, window, relu=True)

  def theirs(*operands):
    return convolve(*operands, window, relu=True)

  compare(ours, theirs, draw_operands(shape, features, dtype), dtype)


@pytest.mark.parametrize(
  ("shape", "features", "window", "relu"),
  [
    ((4, 12, 12, 16), 24, "same", False),
    ((4, 12, 12, 16), 24, "reflected", True),
    ((17, 4, 4, 40), 40, "none", True),
    ((128, 32, 32, 16), 32, "same", False),  # a batch of `pyramid`
    ((128, 7, 7, 128), 128, "same", False),  # one of `wide`
  ],
)
def test_moments_and_their_gradients_equal_the_definition(shape, features, window, relu):
  window = WINDOWS[window]

  def ours(*operands):
    return without_pixels(winograd.convolve_and_measure(*operands, window, relu=relu))

  def theirs(*operands):
    y = convolve(*operands, window, relu=relu)
    return without_pixels([y, measure(y)])

  compare(ours, theirs, draw_operands(shape, features, "float32"), "float32")


def test_without_a_bias():
  x, kernel, bias = draw_operands((2, 8, 8, 16), 16, "float32")
  expected = winograd.convolve(x, kernel, jnp.zeros_like(bias), SAME, relu=False)
  np.testing.assert_array_equal(winograd.convolve(x, kernel, None, SAME, relu=False), expected)


def test_the_gradient_of_the_kernel_alone_is_the_same():
  """As in the first layer of a network, whose images need no gradient."""
  operands = draw_operands((3, 8, 9, 3), 16, "float32")

  def add_up(*operands):
    return jnp.sum(winograd.convolve(*operands, SAME, relu=True) ** 2)

  _, *expected = jax.jit(jax.grad(add_up, (0, 1, 2)))(*operands)
  for one, other in zip(jax.jit(jax.grad(add_up, (1, 2)))(*operands), expected, strict=True):
    np.testing.assert_array_equal(one, other)


def test_it_is_nearly_as_exact_as_a_plain_convolution():
  """The usual points 0, +-1 and +-2 would cost two bits more."""
  x, kernel, _ = draw_operands((8, 32, 32, 32), 32, "float32")
  with jax.enable_x64(True):
    double = (jnp.asarray(np.asarray(a, np.float64)) for a in (x, kernel))
    exact = np.asarray(convolve(*double, None, SAME, relu=False))
    assert exact.dtype == np.float64
  plain = convolve(x, kernel, None, SAME, relu=False)
  ours = winograd.convolve(x, kernel, None, SAME, relu=False)
  plain_error, error = (np.sqrt(np.mean(np.square(np.asarray(y) - exact))) for y in (plain, ours))
  assert error < 4 * plain_error
  assert error / np.std(exact) < 1e-6


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf])
def test_a_number_that_is_not_finite_stays_so(value):
  """Also when ReLU follows; it reaches the other outputs of its tiles, but no other image."""
  x, kernel, bias = draw_operands((2, 12, 12, 16), 16, "float32")
  y = winograd.convolve(x.at[1, 5, 5, 3].set(value), kernel, bias, SAME, relu=True)
  assert not np.isfinite(y[1, 4:7, 4:7]).any()
  assert np.isfinite(y[0]).all()


@pytest.mark.parametrize(
  ("size", "window", "expected"),
  [
    ((32, 32), SAME, True),
    ((7, 7), SAME, True),
    ((5, 5), SAME, False),  # 64 outputs for 25
    ((2, 2), winograd.Window(0, 0, 0, 0, False, 1), False),  # none
    ((30, 30), winograd.Window(8, 8, 8, 8, True, 8), True),
    ((9, 9), winograd.Window(8, 8, 8, 8, True, 1), True),
    ((8, 8), winograd.Window(8, 8, 8, 8, True, 1), False),  # too small to be reflected
  ],
)
def test_it_is_efficient_where_tiles_fit(size, window, expected):
  assert winograd.is_efficient((2, *size, 16), (3, 3), window) == expected
