"""Dense convolutions in C++ against the definition, in value and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from flax_cifar.kernels.native import dense, library
from tests.kernels.native.definitions import (
  NHWC,
  compare,
  draw,
  halve,
  measure,
  without_pixels,
)

if not library.is_available():
  pytest.skip("there is no C++ compiler", allow_module_level=True)

SAME = dense.Window(1, 1, 1, 1, False, 1)
WINDOWS = {
  "same": SAME,
  "none": dense.Window(0, 0, 0, 0, False, 1),
  "uneven": dense.Window(2, 0, 1, 3, False, 1),
  "dilated": dense.Window(2, 2, 2, 2, False, 2),
  "reflected": dense.Window(3, 3, 3, 3, True, 3),
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


def draw_operands(shape, features, dtype, *, size=(3, 3)):
  x, kernel = draw(*shape, dtype=dtype), draw(*size, shape[-1], features, seed=9)
  return x, kernel / (3 * shape[-1] ** 0.5), draw(features, seed=10)


@pytest.mark.parametrize(
  ("window", "shape", "operands"),
  halve(
    WINDOWS,
    [(3, 9, 11, 3), (5, 8, 8, 24), (2, 33, 6, 16)],
    [(10, "float32"), (32, "bfloat16")],
  ),
)
def test_it_equals_the_definition(window, shape, operands):
  window, (features, dtype) = WINDOWS[window], operands

  def ours(*operands):
    return dense.convolve(*operands, window, relu=True)

  def theirs(*operands):
    return convolve(*operands, window, relu=True)

  compare(ours, theirs, draw_operands(shape, features, dtype), dtype)


@pytest.mark.parametrize(
  ("size", "window"),
  [
    ((1, 1), "none"),
    ((2, 2), "same"),
    ((3, 1), "dilated"),
    ((1, 3), "reflected"),
    ((5, 5), "uneven"),
  ],
)
@pytest.mark.parametrize(
  ("shape", "features", "dtype"),
  [((3, 9, 11, 3), 10, "float32"), ((5, 8, 13, 24), 48, "bfloat16")],
)
def test_kernels_of_other_sizes_equal_the_definition(window, size, shape, features, dtype):
  window = WINDOWS[window]
  assert dense.can_compute(shape, size, window)

  def ours(*operands):
    return dense.convolve(*operands, window, relu=True)

  def theirs(*operands):
    return convolve(*operands, window, relu=True)

  compare(ours, theirs, draw_operands(shape, features, dtype, size=size), dtype)


@pytest.mark.parametrize(
  ("shape", "size", "features", "window", "relu"),
  [
    ((4, 12, 12, 16), (3, 3), 24, "same", False),
    ((4, 12, 12, 16), (3, 3), 24, "reflected", True),
    ((4, 12, 10, 12), (1, 3), 20, "same", True),
    ((17, 5, 5, 40), (3, 3), 40, "same", True),  # several images in a block
    ((32, 32, 32, 16), (3, 3), 32, "same", False),  # a part of a batch of `pyramid`
    ((32, 7, 7, 128), (3, 3), 128, "same", False),  # one of `wide`
    ((32, 18, 20, 64), (1, 3), 64, "same", True),  # one of `ghost`
  ],
)
def test_moments_and_their_gradients_equal_the_definition(shape, size, features, window, relu):
  window = WINDOWS[window]

  def ours(*operands):
    return without_pixels(dense.convolve_and_measure(*operands, window, relu=relu))

  def theirs(*operands):
    y = convolve(*operands, window, relu=relu)
    return without_pixels([y, measure(y)])

  compare(ours, theirs, draw_operands(shape, features, "float32", size=size), "float32")


@pytest.mark.parametrize("size", [(3, 3), (1, 1)])
def test_without_a_bias(size):
  x, kernel, bias = draw_operands((2, 8, 8, 16), 16, "float32", size=size)
  expected = dense.convolve(x, kernel, jnp.zeros_like(bias), SAME, relu=False)
  np.testing.assert_array_equal(dense.convolve(x, kernel, None, SAME, relu=False), expected)


@pytest.mark.parametrize("size", [(3, 3), (2, 2)])
def test_the_gradient_of_the_kernel_alone_is_the_same(size):
  """As in the first layer of a network, whose images need no gradient."""
  operands = draw_operands((3, 8, 9, 3), 16, "float32", size=size)

  def add_up(*operands):
    return jnp.sum(dense.convolve(*operands, SAME, relu=True) ** 2)

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
  ours = dense.convolve(x, kernel, None, SAME, relu=False)
  plain_error, error = (np.sqrt(np.mean(np.square(np.asarray(y) - exact))) for y in (plain, ours))
  assert error < 4 * plain_error
  assert error / np.std(exact) < 1e-6


@pytest.mark.parametrize("size", [(3, 3), (3, 1)])
@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf])
def test_a_number_that_is_not_finite_stays_so(value, size):
  """Also when ReLU follows; it may reach the other outputs of its tiles, but no other image."""
  x, kernel, bias = draw_operands((2, 12, 12, 16), 16, "float32", size=size)
  x = x.at[1, 5, 5, 3].set(value)
  y = dense.convolve(x, kernel, bias, SAME, relu=True)
  lost = ~np.isfinite(convolve(x, kernel, bias, SAME, relu=True))
  assert lost.any()
  assert not np.isfinite(y)[lost].any()
  assert np.isfinite(y[0]).all()


@pytest.mark.parametrize(
  ("size", "window", "expected"),
  [
    ((32, 32), SAME, True),
    ((7, 7), SAME, True),
    ((5, 5), SAME, False),  # 64 outputs for 25
    ((30, 30), dense.Window(8, 8, 8, 8, True, 8), True),
  ],
)
def test_winograd_fits_where_its_tiles_do(size, window, expected):
  assert dense.fits_winograd((2, *size, 16), (3, 3), window) == expected
  assert not dense.fits_winograd((2, *size, 16), (3, 1), window)


@pytest.mark.parametrize(
  ("size", "window", "expected"),
  [
    ((3, 3), dense.Window(0, 0, 0, 0, False, 1), True),
    ((2, 3), dense.Window(0, 0, 0, 0, False, 1), False),  # no output
    ((9, 9), dense.Window(8, 8, 8, 8, True, 1), True),
    ((8, 8), dense.Window(8, 8, 8, 8, True, 1), False),  # too small to be reflected
  ],
)
def test_what_has_no_output_is_not_computed(size, window, expected):
  assert dense.can_compute((2, *size, 16), (3, 3), window) == expected
