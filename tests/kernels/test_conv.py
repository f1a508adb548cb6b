"""Our convolution against that of JAX, in value and gradients."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax import lax

from flax_cifar.kernels import backend
from flax_cifar.kernels import conv as conv_lib
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


@pytest.mark.parametrize("padding", [NONE, UNEVEN, "SAME"], ids=["none", "uneven", "name"])
@pytest.mark.parametrize("dilation", [(1, 1), (2, 2), (1, 2)])
@pytest.mark.parametrize("sides", [(3, 3), (1, 1), (2, 3)])
def test_dense_equals_jax(sides, dilation, padding):
  trace = compare(**{**DENSE, "kernel": (*sides, 6, 5)}, dilation=dilation, padding=padding)
  assert "custom_vjp" in trace


@pytest.mark.parametrize("count", [1, 8, 12, 16])
def test_dense_equals_jax_for_any_number_of_images(count):
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
    "strided-one-axis",
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


@pytest.mark.parametrize(
  ("backend_name", "dtype"),
  [
    *[(name, dtype) for name in ("xla", "onednn") for dtype in (jnp.float32, jnp.bfloat16)],
    ("gpu", jnp.float32),
  ],
)
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
    {"kernel_size": (1, 1)},
    {"features": 6, "feature_group_count": 6, "kernel_size": (3, 3), "strides": 2, "padding": 1},
  ],
  ids=str,
)
def test_conv_equals_that_of_flax(options, dtype, backend_name, monkeypatch):
  if backend_name == "onednn" and library.load_library() is None:
    pytest.skip("oneDNN is not installed: pip install onednn-cpu-gomp")
  x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 9, 8, 6)), dtype)
  options = {
    "features": 12,
    "kernel_size": (3, 2),
    "bias_init": nn.initializers.normal(),
    **options,
  }
  ours, theirs = blocks.Conv(dtype=dtype, **options), nn.Conv(**options)
  monkeypatch.setenv(backend.VARIABLE, backend_name)
  apply.clear_cache()
  variables = ours.init(jax.random.key(0), x)
  jax.tree.map(np.testing.assert_array_equal, variables, theirs.init(jax.random.key(0), x))
  actual, expected = apply(ours, variables, x), apply(theirs, variables, x.astype(jnp.float32))
  assert [actual[0].dtype, actual[-1].dtype] == [dtype, dtype]
  for a, e in zip(actual, expected, strict=True):
    tolerance = 1e-5 if dtype == jnp.float32 else 0.05  # lax sums in bfloat16
    a, e = np.asarray(a, np.float32), np.asarray(e, np.float32)
    assert np.abs(a - e).max() <= tolerance * np.abs(e).max()


@pytest.mark.parametrize("backend_name", ["onednn", "xla", "gpu"])
@pytest.mark.parametrize("depthwise", [False, True])
def test_gradients_in_bfloat16_are_summed_in_float32(depthwise, backend_name, monkeypatch):
  """Compares with float64: a sum of so many terms in bfloat16 would be far off."""
  if backend_name == "onednn" and library.load_library() is None:
    pytest.skip("oneDNN is not installed")
  monkeypatch.setenv(backend.VARIABLE, backend_name)
  rng = np.random.default_rng(0)
  x, direction = (jnp.asarray(rng.normal(0.5, 1, (16, 24, 24, 8)), jnp.bfloat16) for _ in "xy")
  kernel = jnp.zeros((1, 1, 1, 8) if depthwise else (1, 1, 8, 8), jnp.bfloat16)

  def convolve(kernel, bias):
    groups = 8 if depthwise else 1
    return conv_lib.conv_general_dilated(
      x, kernel, (1, 1), NONE, rhs_dilation=(1, 1), feature_group_count=groups, bias=bias
    )

  _, backward = jax.vjp(jax.jit(convolve), kernel, jnp.zeros(8))
  kernel_gradient, bias_gradient = (np.asarray(g, np.float64) for g in backward(direction))
  x, direction = (np.asarray(a, np.float64).reshape(-1, 8) for a in (x, direction))
  expected = (x * direction).sum(0) if depthwise else x.T @ direction
  np.testing.assert_allclose(kernel_gradient.reshape(expected.shape), expected, rtol=1e-2)
  np.testing.assert_allclose(bias_gradient, direction.sum(0), rtol=1e-3)


@pytest.mark.parametrize(
  ("fast", "takes_bfloat16", "depthwise", "expected"),
  [
    (True, True, False, jnp.bfloat16),
    (False, True, False, jnp.float32),  # it would emulate bfloat16
    (False, True, True, jnp.bfloat16),
    (False, False, True, jnp.float32),  # it would refuse bfloat16
  ],
)
def test_onednn_computes_bfloat16_in_the_faster_type(
  monkeypatch, fast, takes_bfloat16, depthwise, expected
):
  monkeypatch.setattr(backend, "has_fast_bfloat16", lambda: fast)
  monkeypatch.setattr(backend, "uses_onednn", lambda dtype: takes_bfloat16)
  chosen = conv_lib._choose_onednn_dtype(jnp.dtype(jnp.bfloat16), depthwise)
  assert chosen == expected
  single = jnp.dtype(jnp.float32)
  assert conv_lib._choose_onednn_dtype(single, depthwise) == single


def test_the_definition_backend_uses_the_convolution_of_jax(monkeypatch):
  monkeypatch.setenv(backend.VARIABLE, "definition")
  assert "conv_general_dilated" in compare()
