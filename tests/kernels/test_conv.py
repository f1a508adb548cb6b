"""Our convolution against the one of JAX, in value and gradients."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax import lax

from flax_cifar import errors
from flax_cifar.kernels import backend, norm_relu, pooling
from flax_cifar.kernels import conv as conv_lib
from flax_cifar.kernels import padding as padding_lib
from flax_cifar.kernels.onednn import library
from flax_cifar.models import blocks

NHWC = ("NHWC", "HWIO", "NHWC")
SAME, NONE, UNEVEN = [(1, 1), (1, 1)], [(0, 0), (0, 0)], [(2, 0), (1, 3)]


def compare(
  *,
  shape=(2, 9, 7, 6),
  kernel=(3, 3, 1, 6),
  strides=(1, 1),
  padding=SAME,
  dilation=(1, 1),
  groups=6,
  dtype=np.float32,
):
  """Asserts that values and both gradients agree; returns the trace of our function."""
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=shape), dtype)
  weights = jnp.asarray(rng.normal(size=kernel), dtype)

  def run(function, x, weights):
    return function(
      x,
      weights,
      strides,
      padding,
      rhs_dilation=dilation,
      feature_group_count=groups,
    )

  def get_value_and_gradients(function, x, weights):
    y, backward = jax.vjp(lambda *operands: run(function, *operands), x, weights)
    direction = jnp.sin(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
    return y, *backward(direction.astype(y.dtype))

  functions = (
    conv_lib.conv_general_dilated,
    partial(lax.conv_general_dilated, dimension_numbers=NHWC),
  )
  ours, theirs = jax.jit(
    lambda *operands: [get_value_and_gradients(function, *operands) for function in functions]
  )(x, weights)
  tolerance = 1e-4 if dtype == np.float32 else 0.1
  for actual, expected in zip(ours, theirs, strict=True):
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    actual, expected = np.asarray(actual, np.float32), np.asarray(expected, np.float32)
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)
  return str(jax.make_jaxpr(lambda x, w: run(conv_lib.conv_general_dilated, x, w))(x, weights))


@pytest.mark.parametrize("padding", [SAME, NONE, UNEVEN], ids=["same", "none", "uneven"])
@pytest.mark.parametrize("dilation", [(1, 1), (2, 2), (1, 2)])
def test_depthwise_equals_jax_without_its_convolution(dilation, padding):
  assert "conv_general_dilated" not in compare(padding=padding, dilation=dilation)


@pytest.mark.parametrize("shape", [(1, 3, 3, 6), (3, 4, 11, 6), (2, 5, 5, 6)])
def test_depthwise_equals_jax_at_odd_sizes(shape):
  assert "conv_general_dilated" not in compare(shape=shape, padding=NONE)


@pytest.mark.parametrize("sides", [(1, 1), (3, 1), (1, 3), (5, 2)])
def test_depthwise_equals_jax_for_other_kernels(sides):
  assert "conv_general_dilated" not in compare(kernel=(*sides, 1, 6), padding=UNEVEN)


def test_padding_may_have_a_name():
  assert "conv_general_dilated" not in compare(padding="SAME", dilation=(2, 1))


def test_depthwise_equals_jax_in_bfloat16():
  assert "conv_general_dilated" not in compare(dtype=jnp.bfloat16)


DENSE = {"kernel": (3, 3, 6, 5), "groups": 1}


@pytest.mark.parametrize(
  "padding", [SAME, NONE, UNEVEN, "SAME"], ids=["same", "none", "uneven", "name"]
)
@pytest.mark.parametrize("dilation", [(1, 1), (2, 2), (1, 2)])
@pytest.mark.parametrize("sides", [(3, 3), (1, 1), (3, 1), (2, 3)])
def test_dense_equals_jax(sides, dilation, padding):
  trace = compare(**{**DENSE, "kernel": (*sides, 6, 5)}, dilation=dilation, padding=padding)
  assert "custom_vjp" in trace


@pytest.mark.parametrize("count", [1, 8, 12, 16])
def test_dense_equals_jax_whatever_the_number_of_images(count):
  assert "custom_vjp" in compare(**DENSE, shape=(count, 6, 5, 6))


def test_dense_equals_jax_in_bfloat16():
  assert "custom_vjp" in compare(**DENSE, dtype=jnp.bfloat16)


@pytest.mark.parametrize(
  "changes",
  [
    {"strides": (2, 2)},
    {"strides": (1, 2)},
    {**DENSE, "strides": (2, 2)},
    {"kernel": (3, 3, 3, 6), "groups": 2},
    {"kernel": (3, 3, 1, 12)},
  ],
  ids=[
    "strided-depthwise",
    "strided-one-way",
    "strided-dense",
    "grouped",
    "multiplier",
  ],
)
def test_other_convolutions_are_left_to_jax(changes):
  trace = compare(**changes)
  assert "conv_general_dilated" in trace
  assert "custom_vjp" not in trace


def test_an_image_without_a_batch_axis_is_refused():
  pytest.importorskip("beartype")
  with pytest.raises(jaxtyping.TypeCheckError, match="parameter 'lhs'"):
    conv_lib.conv_general_dilated(
      jnp.ones((5, 5, 2)),
      jnp.ones((3, 3, 2, 2)),
      (1, 1),
      SAME,
      rhs_dilation=(1, 1),
      feature_group_count=1,
    )


@partial(jax.jit, static_argnums=0)
def apply(conv, variables, x):
  """Value and all gradients."""
  y, backward = jax.vjp(conv.apply, variables, x)
  return y, *jax.tree.leaves(backward(jnp.sin(jnp.arange(y.size)).reshape(y.shape).astype(y.dtype)))


@pytest.mark.parametrize("way", ["xla", "onednn"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
  "options",
  [
    {},
    {"use_bias": False},
    {"padding": 2, "kernel_dilation": 2, "strides": 2},
    {"padding": 3},  # beyond the reach of the kernel
    {"padding": "VALID", "kernel_dilation": (1, 2), "strides": (2, 1)},
    {"feature_group_count": 6},
    {"feature_group_count": 2, "use_bias": False},
  ],
  ids=str,
)
def test_conv_equals_that_of_flax(options, dtype, way, monkeypatch):
  if way == "onednn" and library.load_library() is None:
    pytest.skip("oneDNN is not installed: pip install .[onednn]")
  x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 9, 8, 6)), dtype)
  options = {
    "features": 12,
    "kernel_size": (3, 2),
    "bias_init": nn.initializers.normal(),
    **options,
  }
  ours, theirs = blocks.Conv(dtype=dtype, **options), nn.Conv(**options)
  monkeypatch.setenv(backend.VARIABLE, way)
  apply.clear_cache()
  variables = ours.init(jax.random.key(0), x)
  jax.tree.map(np.testing.assert_array_equal, variables, theirs.init(jax.random.key(0), x))
  actual, expected = apply(ours, variables, x), apply(theirs, variables, x.astype(jnp.float32))
  assert [actual[0].dtype, actual[-1].dtype] == [dtype, dtype]
  for a, e in zip(actual, expected, strict=True):
    tolerance = 1e-5 if dtype == jnp.float32 else 0.05  # lax sums in bfloat16
    a, e = np.asarray(a, np.float32), np.asarray(e, np.float32)
    assert np.abs(a - e).max() <= tolerance * np.abs(e).max()


@pytest.mark.parametrize("way", ["xla", "definition"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_relu_equals_flax_in_value_and_gradient(dtype, way, monkeypatch):
  monkeypatch.setenv(backend.VARIABLE, way)
  x = jnp.asarray([-jnp.inf, -2, -1e-30, -0.0, 0.0, 1e-30, 3, jnp.inf, jnp.nan], dtype)
  for ours, theirs in (
    (norm_relu.relu(x), nn.relu(x)),
    (jax.vmap(jax.grad(norm_relu.relu))(x[:-1]), x[:-1] > 0),
  ):
    assert ours.dtype == dtype
    np.testing.assert_array_equal(ours.astype(jnp.float32), theirs.astype(jnp.float32))


@pytest.mark.parametrize("window", [2, 3])
@pytest.mark.parametrize("shape", [(2, 6, 6, 3), (2, 7, 5, 3), (1, 3, 8, 1)])
def test_max_pool_and_its_gradient_equal_flax(shape, window):
  rng, sides = np.random.default_rng(0), (window, window)
  pool = partial(nn.max_pool, window_shape=sides, strides=sides)
  for x in (rng.normal(size=shape), rng.integers(0, 2, shape)):  # the second has ties
    x = x.astype(np.float32)
    y, backward = jax.vjp(jax.jit(lambda x: pooling.max_pool(x, window)), x)
    expected, expected_backward = jax.vjp(pool, x)
    np.testing.assert_array_equal(y, expected)
    direction = rng.normal(size=y.shape).astype(np.float32)
    np.testing.assert_array_equal(backward(direction)[0], expected_backward(direction)[0])


def test_max_pool_counts_the_pixels_of_a_large_window():
  x = np.zeros((1, 17, 17, 1), np.float32)
  x[0, 16, 15] = 1  # pixel 287 of 289
  np.testing.assert_array_equal(jax.grad(lambda x: pooling.max_pool(x, 17).sum())(x), x)


def test_max_pool_loses_no_gradient_where_its_input_is_computed_again():
  """XLA:CPU fuses what precedes a pool into both passes, where it may round differently."""
  from tests.models import test_models

  model = test_models.create("ghost", norm="ghost", dropout_rate=0.1)
  variables = test_models.draw_variables(model)
  images = jnp.asarray(np.random.default_rng(0).normal(size=(10, 32, 32, 3)), jnp.float32)

  def loss_fn(params, pool):
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr("flax_cifar.kernels.pooling.max_pool", pool)
      logits, _ = model.apply(
        variables | {"params": params},
        images,
        train=True,
        mutable=["batch_stats"],
        rngs={"dropout": jax.random.key(0)},
      )
    return jnp.square(logits).mean()

  def flax_pool(x, window):
    return nn.max_pool(x, (window, window), strides=(window, window))

  ours, theirs = (
    jax.jit(jax.grad(partial(loss_fn, pool=pool)))(variables["params"])
    for pool in (pooling.max_pool, flax_pool)
  )
  for a, e in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    assert np.linalg.norm(a - e) <= 1e-4 * np.linalg.norm(e)


@pytest.mark.parametrize("way", ["onednn", "xla"])
@pytest.mark.parametrize("depthwise", [False, True])
def test_gradients_in_bfloat16_are_summed_in_float32(depthwise, way, monkeypatch):
  """Against float64: a sum of so many terms in bfloat16 would be far off."""
  if way == "onednn" and library.load_library() is None:
    pytest.skip("oneDNN is not installed")
  monkeypatch.setenv(backend.VARIABLE, way)
  rng = np.random.default_rng(0)
  x, direction = (jnp.asarray(rng.normal(0.5, 1, (16, 24, 24, 8)), jnp.bfloat16) for _ in "xy")
  kernel = jnp.zeros((1, 1, 1, 8) if depthwise else (1, 1, 8, 8), jnp.bfloat16)

  def convolve(kernel, bias):
    groups = 8 if depthwise else 1
    return conv_lib.conv_general_dilated(
      x, kernel, (1, 1), NONE, rhs_dilation=(1, 1), feature_group_count=groups, bias=bias
    )

  _, backward = jax.vjp(jax.jit(convolve), kernel, jnp.zeros(8))
  to_kernel, to_bias = (np.asarray(g, np.float64) for g in backward(direction))
  x, direction = (np.asarray(a, np.float64).reshape(-1, 8) for a in (x, direction))
  expected = (x * direction).sum(0) if depthwise else x.T @ direction
  np.testing.assert_allclose(to_kernel.reshape(expected.shape), expected, rtol=1e-2)
  np.testing.assert_allclose(to_bias, direction.sum(0), rtol=1e-3)


@pytest.mark.parametrize("padding", [1, 2, 4])
def test_pad_reflect_equals_numpy_and_so_does_its_gradient(padding):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, 5, 7, 3)).astype(np.float32)
  y, backward = jax.vjp(jax.jit(lambda x: padding_lib.pad_reflect(x, padding)), x)
  np.testing.assert_array_equal(
    y, np.pad(x, ((0, 0), (padding,) * 2, (padding,) * 2, (0, 0)), mode="reflect")
  )
  direction = rng.normal(size=y.shape)
  # The gradient of a pixel is the sum over the places that show it; NumPy tells which these are.
  pixels = np.arange(35).reshape(5, 7)
  shown = np.pad(pixels, padding, mode="reflect").ravel()
  expected = np.zeros((2, 35, 3))
  for batch in range(2):
    np.add.at(expected[batch], shown, direction[batch].reshape(-1, 3))
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


def test_the_variable_names_a_way(monkeypatch):
  monkeypatch.setenv(backend.VARIABLE, "definition")
  assert backend.select_backend() == "definition"
  assert "conv_general_dilated" in compare()
  monkeypatch.setenv(backend.VARIABLE, "fast")
  with pytest.raises(errors.UserError, match="FLAX_CIFAR_KERNELS='fast'"):
    backend.select_backend()


def test_onednn_is_refused_where_it_is_missing(monkeypatch):
  monkeypatch.setattr("flax_cifar.kernels.onednn.library.load_library", lambda: None)
  monkeypatch.setenv(backend.VARIABLE, "onednn")
  with pytest.raises(errors.UserError, match="onednn"):
    backend.select_backend()
  monkeypatch.delenv(backend.VARIABLE)
  assert backend.select_backend() == "xla"
