"""What the functions in C++ compute, by plain operations, and the comparison of both."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from flax_cifar.kernels import moments as moments_lib

NHWC = ("NHWC", "HWIO", "NHWC")
# Float64 sums, rounded to the type of an output, differ from float32 sums by a few roundings.
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}
VECTORIZED = {"xla_backend_optimization_level": 1}
SHAPES = [(5, 7, 9, 48), (3, 1, 1, 16), (33, 8, 8, 64)]


def halve(*axes):
  """Half of the combinations; every pair of values of two axes is among them."""
  numbered = itertools.product(*map(enumerate, axes))
  return [[v for _, v in pairs] for pairs in numbered if sum(i for i, _ in pairs) % 2 == 0]


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
    pull = jax.jit(lambda *operands: pull_back(function, *operands), compiler_options=VECTORIZED)
    return jax.tree.map(np.asarray, pull(*operands))


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


def apply(affine, x):
  center, slope, bias = (a[:, None, None] for a in affine)
  return (x - center) * slope + bias


def without_pixels(results):
  """The arrays among the results, for `jax.vjp`."""
  return [r[:2] if isinstance(r, moments_lib.Moments) else r for r in results]
