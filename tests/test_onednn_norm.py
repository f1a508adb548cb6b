"""Norms of oneDNN against float64, in value and gradients, and as functions of JAX."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_cifar.models import lowering, onednn, onednn_norm
from flax_cifar.models.norms import normalize_batch

if onednn.load_library() is None:
  pytest.skip("oneDNN is not installed: pip install .[onednn]", allow_module_level=True)

EPSILON = 1e-3  # large enough to be seen
TOLERANCE = {jnp.float32: 2e-6, jnp.bfloat16: 1e-2}
SHAPES = [(8, 5, 7, 32), (2, 3, 3, 5), (6, 16), (1, 2, 2, 64)]


def get_operands(shape, dtype):
  """x, its gradient's direction, scale and bias."""
  rng = np.random.default_rng(0)
  x, direction = rng.normal(1.5, 2, shape), rng.normal(size=shape)
  scale, bias = rng.normal(1, 0.5, (2, shape[-1]))
  return (jnp.asarray(x, dtype), jnp.asarray(direction, dtype), *jnp.float32([scale, bias]))


def assert_close(actual, expected, tolerance):
  actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
  assert actual.shape == expected.shape
  assert np.abs(actual - expected).max() <= tolerance * max(1, np.abs(expected).max())


def normalize_backward(x, direction, axes, slope):
  """The textbook gradient, in float64."""
  deviation = x - x.mean(axes, keepdims=True)
  inverse = 1 / np.sqrt(np.square(deviation).mean(axes, keepdims=True) + EPSILON)
  normal, direction = deviation * inverse, direction * slope
  along = (direction * normal).mean(axes, keepdims=True)
  return normal, inverse * (direction - direction.mean(axes, keepdims=True) - normal * along)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_batch_norm_equals_float64_in_value_and_gradients(shape, dtype):
  operands = get_operands(shape, dtype)

  @jax.jit
  def run(x, direction, scale, bias):
    (y, mean, var), backward = jax.vjp(
      lambda *a: onednn_norm.batch_norm(*a, EPSILON), x, scale, bias
    )
    return y, mean, var, *backward((direction, jnp.ones_like(mean), jnp.ones_like(var)))

  y, mean, var, *gradients = run(*operands)
  assert (y.dtype, gradients[0].dtype, mean.dtype, var.dtype) == (dtype, dtype, *2 * (jnp.float32,))
  x, direction, scale, bias = (np.asarray(a, np.float64) for a in operands)
  axes = tuple(range(x.ndim - 1))
  normal, to_x = normalize_backward(x, direction, axes, scale)
  tolerance = TOLERANCE[dtype]
  assert_close(y, normal * scale + bias, tolerance)
  assert_close(mean, x.mean(axes), 1e-6)
  assert_close(var, x.var(axes), 1e-6)
  # Were the gradients of mean and var not ignored, those of x would differ.
  for actual, expected in zip(
    gradients, (to_x, (direction * normal).sum(axes), direction.sum(axes)), strict=True
  ):
    assert_close(actual, expected, tolerance)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(4, 30), (1, 7), (64, 1000)])
def test_layer_norm_equals_float64_in_value_and_gradient(shape, dtype):
  x, direction, *_ = get_operands(shape, dtype)

  @jax.jit
  def run(x, direction):
    y, backward = jax.vjp(lambda x: onednn_norm.layer_norm(x, EPSILON), x)
    return y, *backward(direction)

  actual = run(x, direction)
  expected = normalize_backward(np.float64(x), np.float64(direction), (1,), 1)
  for a, e in zip(actual, expected, strict=True):
    assert a.dtype == dtype
    assert_close(a, e, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_scale_and_shift_equals_float64_in_value_and_gradients(shape, dtype):
  operands = get_operands(shape, dtype)

  @jax.jit
  def run(x, direction, scale, bias):
    y, backward = jax.vjp(onednn_norm.scale_and_shift, x, scale, bias)
    return y, *backward(direction)

  actual = run(*operands)
  assert [a.dtype for a in actual] == [dtype, dtype, jnp.float32, jnp.float32]
  x, direction, scale, bias = (np.asarray(a, np.float64) for a in operands)
  axes = tuple(range(x.ndim - 1))
  sums = (direction * x).sum(axes), direction.sum(axes)
  for a, e in zip(actual, (x * scale + bias, direction * scale, *sums), strict=True):
    assert_close(a, e, TOLERANCE[dtype])


def test_what_is_slow_in_the_library_is_left_to_xla(monkeypatch):
  """24 channels of bfloat16 take it ten times as long."""
  monkeypatch.setenv(lowering.VARIABLE, "onednn")

  def is_served(channels, dtype):
    x, _, scale, bias = get_operands((2, 3, 3, channels), dtype)
    normalize = partial(normalize_batch, epsilon=EPSILON, num_splits=1)
    return onednn_norm.BATCH_TARGET in str(jax.make_jaxpr(normalize)(x, scale, bias))

  assert is_served(32, jnp.bfloat16)
  assert is_served(24, jnp.float32)
  assert not is_served(24, jnp.bfloat16)


def test_is_bit_for_bit_repeatable():
  x, _, scale, bias = get_operands((64, 8, 8, 32), jnp.float32)
  function = jax.jit(
    jax.grad(
      lambda x: jnp.sin(
        onednn_norm.batch_norm(x, scale, bias, EPSILON)[0]
        + onednn_norm.layer_norm(x.reshape(64, -1), EPSILON).reshape(x.shape)
      ).sum()
    )
  )
  np.testing.assert_array_equal(function(x), function(x))


def test_vmap_equals_one_by_one():
  x, _, scale, bias = get_operands((3, 4, 5, 5, 8), jnp.float32)
  scales = scale * jnp.arange(1, 4)[:, None]
  together = jax.vmap(lambda x, s: onednn_norm.batch_norm(x, s, bias, EPSILON))(x, scales)
  for member in range(3):
    alone = onednn_norm.batch_norm(x[member], scales[member], bias, EPSILON)
    for t, a in zip(together, alone, strict=True):
      np.testing.assert_array_equal(t[member], a)


def test_the_statistics_carry_no_gradient():
  x, _, scale, bias = get_operands((4, 3, 3, 8), jnp.float32)
  gradient = jax.grad(lambda x: sum(map(jnp.sum, onednn_norm.batch_norm(x, scale, bias, 1.0)[1:])))
  assert not gradient(x).any()
