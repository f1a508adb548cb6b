"""ReLU and its gradient against Flax, and the norm for GPUs against the plain one.

The plain one is tested with the norms of networks, in tests/models/test_norms.py.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_cifar.kernels import backend, moments, norm_relu

pytestmark = pytest.mark.usefixtures("optimized")


@pytest.mark.parametrize("backend_name", ["xla", "definition"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_relu_equals_flax_in_value_and_gradient(dtype, backend_name, monkeypatch):
  monkeypatch.setenv(backend.VARIABLE, backend_name)
  x = jnp.asarray([-jnp.inf, -2, -1e-30, -0.0, 0.0, 1e-30, 3, jnp.inf, jnp.nan], dtype)
  for ours, theirs in (
    (norm_relu.relu(x), nn.relu(x)),
    (jax.vmap(jax.grad(norm_relu.relu))(x[:-1]), x[:-1] > 0),
  ):
    assert ours.dtype == dtype
    np.testing.assert_array_equal(ours.astype(jnp.float32), theirs.astype(jnp.float32))


@pytest.mark.parametrize("value", [1.0, 3.7, 11.0])
def test_an_odd_first_pixel_leaves_the_output_finite(value, monkeypatch):
  """All distances are to the first pixel, so their squares nearly cancel."""
  monkeypatch.setenv(backend.VARIABLE, "definition")
  x = jnp.full((1, 224, 224, 16), value).at[0, 0, 0].set(0)
  normalize = jax.jit(lambda *xs: norm_relu.normalize(*xs, moments.GhostBatches(1), 1e-5, False))
  y, _, variance = normalize(x, jnp.ones(16), jnp.zeros(16))
  assert np.isfinite(y).all()
  assert (variance >= 0).all()


SHAPES = ((8, 3, 5, 4), (4, 16, 16, 32), (2, 8, 8, 64))


@pytest.mark.parametrize(
  ("shape", "sets", "relu"),
  [
    *((shape, moments.GhostBatches(1), relu) for shape in SHAPES for relu in (False, True)),
    (SHAPES[0], moments.GhostBatches(2), True),  # has the plain norm
  ],
)
def test_the_norm_for_gpus_equals_the_plain_one_in_value_and_gradient(shape, sets, relu):
  rng = np.random.default_rng(0)
  x = rng.normal(100, 2, shape).astype(np.float32)  # far from 0, where sums cancel
  weight = rng.normal(0, 1, shape).astype(np.float32)
  scale, bias = rng.normal(1, 0.5, (2, shape[-1])).astype(np.float32)

  def compute(backend_name):
    def normalize(*operands):
      return norm_relu.normalize(*operands, sets, 1e-5, relu)

    def run(*operands):
      found, pull = jax.vjp(normalize, *operands)
      return found, pull((jnp.asarray(weight), *map(jnp.zeros_like, found[1:])))

    with backend.use(backend_name):
      return jax.jit(run)(x, scale, bias)

  for ours, plain in zip(
    jax.tree.leaves(compute("gpu")), jax.tree.leaves(compute("definition")), strict=True
  ):
    assert ours.shape == plain.shape
    np.testing.assert_allclose(ours, plain, rtol=1e-3, atol=1e-3 * np.abs(plain).max())


@pytest.mark.parametrize("sets", [moments.GhostBatches(2), moments.ChannelGroups(2)])
def test_second_derivatives_equal_those_of_the_plain_formula(sets, monkeypatch):
  monkeypatch.setenv(backend.VARIABLE, "definition")
  x, direction = np.random.default_rng(0).normal(1, 2, (2, 4, 3, 5, 8)).astype(np.float32)

  def ours(x):
    y, *_ = norm_relu.normalize(x, jnp.ones(8), jnp.zeros(8), sets, 1e-5, False)
    return (y**3).sum()

  def plain(x):
    if isinstance(sets, moments.GhostBatches):
      parts, axes = x.reshape(2, 2, 3, 5, 8), (0, 2, 3)  # image i is in part i % 2
    else:
      parts, axes = x.reshape(4, 3, 5, 2, 4), (1, 2, 4)
    deviation = jnp.sqrt(parts.var(axes, keepdims=True) + 1e-5)
    return (((parts - parts.mean(axes, keepdims=True)) / deviation) ** 3).sum()

  second, expected = (
    jax.jit(lambda x, f=f: jax.jvp(jax.grad(f), (x,), (jnp.asarray(direction),))[1])(x)
    for f in (ours, plain)
  )
  np.testing.assert_allclose(second, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
