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
from flax_cifar.kernels.native import separable

if not separable.is_available():
  pytest.skip("there is no C++ compiler", allow_module_level=True)

NHWC = ("NHWC", "HWIO", "NHWC")
# Float64 sums, rounded to the type of an output, differ from float32 sums by a few roundings.
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}
SHAPES = [(5, 7, 9, 48), (3, 1, 1, 16), (33, 8, 8, 64)]
TRAINING = (128, 32, 32, 32)  # a batch in the first stage


def draw(*shape, seed=0, dtype="float32"):
  values = np.random.default_rng(seed).normal(0.5, 1.0, shape)
  return jnp.asarray(values, dtype)


def draw_affine(x, seed=1):
  shape = (len(x), x.shape[-1])
  return moments_lib.Affine(*(draw(*shape, seed=seed + i) for i in range(3)))


def in_double(function, *operands):
  """Value and gradients of `function` in float64, for the gradients that `direct` draws."""
  with jax.enable_x64(True):
    operands = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), operands)
    return jax.tree.map(np.asarray, pull_back(function, *operands))


def pull_back(function, *operands):
  results, backward = jax.vjp(function, *operands)
  return results, backward(jax.tree.map(direct, results))


def direct(array):
  """A gradient for `array`, of its type, the same for every precision."""
  values = np.random.default_rng(array.size).normal(size=array.shape)
  return jnp.asarray(jnp.asarray(values, jnp.bfloat16), array.dtype)


def compare(ours, theirs, operands, dtype):
  actual = jax.jit(lambda *operands: pull_back(ours, *operands))(*operands)
  expected = in_double(theirs, *operands)
  for one, two in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    scale = np.abs(two).max() or 1.0
    np.testing.assert_allclose(
      np.asarray(one, np.float64) / scale, two / scale, atol=TOLERANCE[dtype]
    )


def measure(y):
  return moments_lib.Moments(y.mean((1, 2)), y.var((1, 2)), y.shape[1] * y.shape[2])


def apply(affine, x, relu):
  center, slope, bias = (a[:, None, None] for a in affine)
  y = (x - center) * slope + bias
  return jnp.where(y > 0, y, 0) if relu else y


def without_pixels(results):
  """The arrays among the results, for `jax.vjp`."""
  return [r[:2] if isinstance(r, moments_lib.Moments) else r for r in results]


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
  ("shape", "features", "relu", "dtype"),
  [
    *itertools.product(SHAPES, [16, 64], [False, True], ["float32", "bfloat16"]),
    (TRAINING, 48, True, "float32"),
  ],
)
def test_pointwise_equals_its_definition(shape, features, relu, dtype):
  def ours(x, affine, kernel):
    return without_pixels(separable.convolve_pointwise(x, affine, kernel, relu=relu))

  def theirs(x, affine, kernel):
    y = apply(affine, x, relu) @ kernel[0, 0]
    return without_pixels([y, measure(y)])

  x = draw(*shape, dtype=dtype)
  compare(ours, theirs, (x, draw_affine(x), draw(1, 1, shape[-1], features, seed=9)), dtype)


@pytest.mark.parametrize(
  ("shape", "with_shortcut", "relu", "dtype"),
  [
    *itertools.product(SHAPES, [False, True], [False, True], ["float32", "bfloat16"]),
    (TRAINING, True, True, "float32"),
  ],
)
def test_the_end_of_a_unit_equals_its_definition(shape, with_shortcut, relu, dtype):
  def ours(x, affine, *shortcut):
    return separable.finish(x, affine, *(shortcut or [None]), relu=relu)

  def theirs(x, affine, *shortcut):
    return sum(shortcut, apply(affine, x, relu))

  x = draw(*shape, dtype=dtype)
  shortcut = [draw(*shape, seed=9, dtype=dtype)] if with_shortcut else []
  compare(ours, theirs, (x, draw_affine(x), *shortcut), dtype)


def test_an_affine_may_be_the_same_for_all_images():
  x = draw(5, 7, 9, 48)
  own = draw_affine(x[:1])

  def run(affine):
    return separable.finish(x, affine, None, relu=True).sum()

  shared, spread = jax.grad(run)(own), jax.grad(run)(jax.tree.map(lambda a: a.repeat(5, 0), own))
  for one, all_images in zip(shared, spread, strict=True):
    np.testing.assert_allclose(one[0], all_images.sum(0), rtol=1e-5)


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_number_that_is_not_finite_stays_so(value, dtype):
  x = draw(2, 3, 3, 16, dtype=dtype).at[1, 1, 1, 5].set(value)
  y, moments, _ = separable.convolve_depthwise(x, jnp.ones((3, 3, 1, 16)), 1)
  identity = moments_lib.Affine(jnp.zeros((1, 16)), jnp.ones((1, 16)), jnp.zeros((1, 16)))
  z, _ = separable.convolve_pointwise(y, identity, jnp.ones((1, 1, 16, 16)), relu=False)
  end = separable.finish(x, identity, x, relu=False)
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
  ("dtype", "channels", "features", "expected"),
  [
    ("float32", 32, 48, True),
    ("bfloat16", 16, 16, True),
    ("float16", 32, 32, False),
    ("float32", 24, 32, False),
    ("float32", 32, 24, False),
  ],
)
def test_what_can_be_computed(dtype, channels, features, expected):
  assert separable.can_compute(jnp.dtype(dtype), channels, features) == expected


def test_several_seeds_at_once_equal_each_alone():
  x, depthwise = draw(3, 4, 8, 8, 16), draw(3, 3, 3, 1, 16, seed=1)
  pointwise = draw(3, 1, 1, 16, 32, seed=2)

  def run(x, depthwise, pointwise):
    y, moments, _ = separable.convolve_depthwise(x, depthwise, 1)
    affine = moments_lib.Affine(moments.mean, 1 / (1 + moments.variance), moments.mean)
    return separable.convolve_pointwise(y, affine, pointwise, relu=True)[0].sum()

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
  convolve = jax.jit(lambda x: separable.convolve_pointwise(x, affine, kernel, relu=True)[0])
  expected = [np.asarray(convolve(x)) for x in images]
  with concurrent.futures.ThreadPoolExecutor(4) as pool:
    for _ in range(20):
      for actual, one in zip(pool.map(convolve, images), expected, strict=True):
        np.testing.assert_array_equal(actual, one)


def test_the_same_numbers_come_from_any_number_of_threads():
  """Each sum has its own order, whoever computes it."""
  code = """
import jax, numpy as np, hashlib
from flax_cifar.kernels.native import separable
from tests.kernels.native.test_separable import draw, draw_affine
x = draw(37, 8, 8, 32)
def run(x, kernel):
  return separable.convolve_pointwise(x, draw_affine(x), kernel, relu=True)[0].sum()
gradients = jax.jit(jax.grad(run, (0, 1)))(x, draw(1, 1, 32, 48))
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
