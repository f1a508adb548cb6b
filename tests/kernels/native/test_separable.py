"""Separable units in C++ against the definitions of their parts, in value and gradients."""

import concurrent.futures
import itertools
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from flax_cifar.kernels import moments as moments_lib
from flax_cifar.kernels.native import finish, library, separable
from tests.kernels.native.definitions import (
  NHWC,
  SHAPES,
  apply,
  compare,
  draw,
  draw_affine,
  measure,
  without_pixels,
)

if not library.is_available():
  pytest.skip("there is no C++ compiler", allow_module_level=True)

TRAINING = (32, 32, 32, 32)  # a part of a batch in the first stage


@pytest.mark.parametrize(
  ("shape", "stride", "dtype"),
  [*itertools.product(SHAPES, [1, 2], ["float32", "bfloat16"]), (TRAINING, 1, "float32")],
)
def test_depthwise_equals_its_definition(shape, stride, dtype):
  def ours(x, kernel):
    return without_pixels(separable.convolve_depthwise(x, kernel, stride))

  def theirs(x, kernel):
    y = lax.conv_general_dilated(
      x,
      kernel,
      (stride, stride),
      [(1, 1), (1, 1)],
      dimension_numbers=NHWC,
      feature_group_count=x.shape[-1],
    )
    return without_pixels([y, measure(y), x])

  compare(ours, theirs, (draw(*shape, dtype=dtype), draw(3, 3, 1, shape[-1], seed=9)), dtype)


@pytest.mark.parametrize(
  ("shape", "features", "dtype"),
  [*itertools.product(SHAPES, [16, 64], ["float32", "bfloat16"]), (TRAINING, 48, "float32")],
)
def test_pointwise_equals_its_definition(shape, features, dtype):
  def ours(x, affine, kernel):
    return without_pixels(separable.convolve_pointwise(x, affine, kernel))

  def theirs(x, affine, kernel):
    y = apply(affine, x) @ kernel[0, 0]
    return without_pixels([y, measure(y)])

  x = draw(*shape, dtype=dtype)
  compare(ours, theirs, (x, draw_affine(x), draw(1, 1, shape[-1], features, seed=9)), dtype)


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_number_that_is_not_finite_stays_so(value, dtype):
  x = draw(2, 3, 3, 16, dtype=dtype).at[1, 1, 1, 5].set(value)
  y, moments, _ = separable.convolve_depthwise(x, jnp.ones((3, 3, 1, 16)), 1)
  identity = moments_lib.Affine(jnp.zeros((1, 16)), jnp.ones((1, 16)), jnp.zeros((1, 16)))
  z, _ = separable.convolve_pointwise(y, identity, jnp.ones((1, 1, 16, 16)))
  end = finish.finish(x, identity, x, None, activation="none")
  for array in (y[1, :, :, 5], moments.mean[1, 5], z[1], end[1, 1, 1, 5]):
    assert not np.isfinite(np.asarray(array, np.float32)).any()
  for array in (y[0], y[1, :, :, :5], moments.mean[0], z[0], end[0]):
    assert np.isfinite(np.asarray(array, np.float32)).all()


def test_the_variance_survives_a_mean_that_is_far_from_zero():
  """E[x^2] - E[x]^2 would be negative in float32."""
  x = 1e4 + draw(2, 32, 32, 16)
  identity = jnp.zeros((3, 3, 1, 16)).at[1, 1].set(1.0)
  _, moments, _ = separable.convolve_depthwise(x, identity, 1)
  np.testing.assert_allclose(moments.variance, np.var(np.asarray(x, np.float64), (1, 2)), rtol=1e-4)


@pytest.mark.parametrize(
  ("channels", "features", "expected"), [(32, 48, True), (24, 32, False), (32, 24, False)]
)
def test_what_can_be_computed(channels, features, expected):
  assert separable.can_compute(channels, features) == expected


def test_several_seeds_at_once_equal_each_alone():
  x, depthwise = draw(3, 4, 8, 8, 16), draw(3, 3, 3, 1, 16, seed=1)
  pointwise = draw(3, 1, 1, 16, 32, seed=2)

  def run(x, depthwise, pointwise):
    y, moments, _ = separable.convolve_depthwise(x, depthwise, 1)
    affine = moments_lib.Affine(moments.mean, 1 / (1 + moments.variance), moments.mean)
    return separable.convolve_pointwise(y, affine, pointwise)[0].sum()

  gradient = jax.grad(run, (0, 1, 2))
  together = jax.jit(jax.vmap(gradient))(x, depthwise, pointwise)
  for i in range(3):
    alone = jax.jit(gradient)(x[i], depthwise[i], pointwise[i])
    for one, other in zip(together, alone, strict=True):
      np.testing.assert_allclose(one[i], other, rtol=1e-5, atol=1e-5)


def test_calls_at_the_same_time_do_not_mix():
  kernel = draw(1, 1, 32, 32)
  images = [draw(16, 16, 16, 32, seed=i) for i in range(8)]
  affine = draw_affine(images[0])
  convolve = jax.jit(lambda x: separable.convolve_pointwise(x, affine, kernel)[0])
  expected = [np.asarray(convolve(x)) for x in images]
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    for _ in range(20):
      for actual, one in zip(pool.map(convolve, images), expected, strict=True):
        np.testing.assert_array_equal(actual, one)


def test_the_same_numbers_come_from_any_number_of_threads():
  """Each sum has its own order, whoever computes it."""
  code = """
import jax, numpy as np, hashlib
from flax_cifar.kernels.native import dense, separable
from tests.kernels.native.definitions import draw, draw_affine
x = draw(37, 8, 8, 32)
def run(x, pointwise, kernel, other):
  y, _ = separable.convolve_pointwise(x, draw_affine(x), pointwise)
  window = dense.Window(1, 1, 1, 1, False, 1)
  y = dense.convolve(y, kernel, None, window, relu=True)
  return dense.convolve(y, other, None, window, relu=False).sum()
gradients = jax.jit(jax.grad(run, (0, 1, 2, 3)))(
  x, draw(1, 1, 32, 48), draw(3, 3, 48, 16), draw(2, 2, 16, 24)
)
print(hashlib.sha256(b"".join(np.asarray(g).tobytes() for g in gradients)).hexdigest())
"""
  digests = {
    subprocess.run(
      [
        sys.executable,
        "-c",
        f"from flax_cifar import environment as e; e.count_cores = lambda: {n}" + code,
      ],
      cwd=pathlib.Path(__file__).parents[3],
      check=True,
      capture_output=True,
      text=True,
    ).stdout
    for n in (1, 5)
  }
  assert len(digests) == 1
