"""Convolutions of oneDNN against those of JAX, in value and gradients."""

import os
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from flax_cifar.kernels import backend, conv, ffi
from flax_cifar.kernels.onednn import convolution, library

if library.load_library() is None:
  pytest.skip("oneDNN is not installed: pip install onednn-cpu-gomp", allow_module_level=True)

SAME, NONE, UNEVEN = ((1, 1), (1, 1)), ((0, 0), (0, 0)), ((2, 0), (1, 3))


def get_operands(shape, kernel, dtype=jnp.float32):
  rng = np.random.default_rng(0)
  return (jnp.asarray(rng.normal(size=size), dtype) for size in (shape, kernel))


def skip_unless_computed(dtype):
  if not convolution.can_compute(jnp.dtype(dtype)):
    pytest.skip(f"oneDNN does not convolve {jnp.dtype(dtype)} on this processor")


def get_value_and_gradients(convolve, images, kernel):
  y, backward = jax.vjp(convolve, images, kernel)
  direction = jnp.sin(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape)
  return y, *backward(direction.astype(y.dtype))


CASES = {
  "dense": ((3, 9, 7, 5), (3, 3, 5, 4), (1, 1), SAME, (1, 1), 1),
  "dilated": ((2, 12, 11, 32), (3, 3, 32, 32), (1, 1), NONE, (4, 4), 1),
  "dilation differs by axis": ((2, 12, 11, 8), (3, 3, 8, 8), (1, 1), SAME, (1, 3), 1),
  "strided": ((2, 9, 8, 6), (3, 3, 6, 4), (2, 1), SAME, (1, 1), 1),
  "uneven padding": ((2, 9, 7, 6), (3, 3, 6, 4), (1, 1), UNEVEN, (1, 1), 1),
  "pointwise": ((2, 5, 5, 16), (1, 1, 16, 32), (1, 1), NONE, (1, 1), 1),
  "padded pointwise": ((2, 5, 5, 16), (1, 1, 16, 32), (1, 1), SAME, (1, 1), 1),
  "3x1": ((2, 6, 5, 4), (3, 1, 4, 8), (1, 1), SAME, (1, 1), 1),
  "grouped": ((2, 8, 8, 6), (3, 3, 3, 4), (1, 1), SAME, (2, 2), 2),
  "depthwise": ((2, 8, 8, 32), (3, 3, 1, 32), (1, 1), SAME, (1, 1), 32),
  "depthwise, two filters a channel": ((2, 8, 8, 4), (3, 3, 1, 8), (1, 1), SAME, (1, 1), 4),
  "one image": ((1, 3, 3, 1), (3, 3, 1, 1), (1, 1), NONE, (1, 1), 1),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_lax_in_value_and_gradients(case, dtype):
  skip_unless_computed(dtype)
  check_against_lax(case, dtype)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_lax_where_onednn_would_copy_patches(case, dtype, monkeypatch):
  """As on a processor without AVX-512, but for every kind of convolution."""
  skip_unless_computed(dtype)
  monkeypatch.setattr(convolution, "copies_patches", lambda c: True)
  check_against_lax(case, dtype)


def check_against_lax(case, dtype):
  shape, kernel_shape, strides, padding, dilation, groups = case
  images, kernel = get_operands(shape, kernel_shape, dtype)

  def ours(images, kernel):
    return convolution.convolve(images, kernel, None, strides, padding, dilation, groups)

  def theirs(images, kernel):
    return lax.conv_general_dilated(
      images.astype(jnp.float32),
      kernel.astype(jnp.float32),
      strides,
      padding,
      rhs_dilation=dilation,
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
      feature_group_count=groups,
    ).astype(dtype)

  actual = jax.jit(lambda *operands: get_value_and_gradients(ours, *operands))(images, kernel)
  expected = get_value_and_gradients(theirs, images, kernel)
  for a, e in zip(actual, expected, strict=True):
    assert (a.shape, a.dtype) == (e.shape, dtype)
    a, e = np.asarray(a, np.float32), np.asarray(e, np.float32)
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    assert np.abs(a - e).max() <= tolerance * max(1.0, np.abs(e).max())


def test_is_bit_for_bit_repeatable():
  images, kernel = get_operands((4, 16, 16, 32), (3, 3, 32, 32))
  function = jax.jit(
    lambda *operands: get_value_and_gradients(
      lambda i, k: convolution.convolve(i, k, None, (1, 1), SAME, (1, 1), 1), *operands
    )
  )
  first, second = function(images, kernel), function(images, kernel)
  for a, b in zip(first, second, strict=True):
    np.testing.assert_array_equal(a, b)


def test_vmap_equals_one_by_one():
  images, kernels = get_operands((2, 3, 6, 6, 4), (2, 3, 3, 4, 5))

  def convolve(i, k):
    return convolution.convolve(i, k, None, (1, 1), SAME, (1, 1), 1)

  both = jax.vmap(lambda i, k: get_value_and_gradients(convolve, i, k))(images, kernels)
  for member in range(2):
    single = get_value_and_gradients(convolve, images[member], kernels[member])
    for b, s in zip(both, single, strict=True):
      np.testing.assert_array_equal(b[member], s)


def test_an_error_of_onednn_has_the_target_and_the_status():
  images, kernel = get_operands((1, 3, 3, 2), (3, 3, 2, 2))
  convolution.convolve(images, kernel, None, (1, 1), SAME, (1, 1), 1)  # registers the target
  no_type = 99
  key = convolution.Convolution(
    convolution.FORWARD, no_type, *images.shape, 2, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0
  )
  like = jax.ShapeDtypeStruct(images.shape, images.dtype)
  with pytest.raises(jax.errors.JaxRuntimeError, match=f"{convolution.TARGET}: dnnl_.*status"):
    jax.block_until_ready(ffi.call(convolution.TARGET, key, (images, kernel), like))


def test_the_variable_selects_the_backend(monkeypatch):
  images, kernel = get_operands((1, 5, 5, 2), (3, 3, 2, 2))

  def trace(name):
    monkeypatch.setenv(backend.VARIABLE, name)
    return str(
      jax.make_jaxpr(
        lambda i, k: conv.conv_general_dilated(
          i,
          k,
          (1, 1),
          "SAME",
          rhs_dilation=(1, 1),
          feature_group_count=1,
        )
      )(images, kernel)
    )

  assert convolution.TARGET in trace("onednn")
  assert convolution.TARGET not in trace("xla")
  # XLA cannot split a custom call over the four devices of the tests.
  assert convolution.TARGET not in trace("auto")


def test_a_primitive_may_run_in_another_thread_than_the_one_that_created_it():
  """XLA has its own threads, but oneDNN's scratch memory would be that of the creating thread."""
  images, kernel = get_operands((8, 12, 12, 32), (3, 3, 32, 64))
  output = jnp.sin(jnp.arange(8 * 12 * 12 * 64.0)).reshape(8, 12, 12, 64)
  key = convolution.Convolution(
    convolution.KERNEL_GRADIENT, 3, *images.shape, 64, 3, 3, 1, 1, 2, 2, 2, 2, 2, 2, 1, 0
  )
  operands = [np.asarray(images), np.asarray(output), np.empty((3, 3, 32, 64), np.float32)]
  convolution._get_program(key)
  thread = threading.Thread(
    target=convolution._execute, args=(tuple(key), [array.ctypes.data for array in operands])
  )
  thread.start()
  thread.join()
  padding, dilation = ((2, 2), (2, 2)), (2, 2)
  _, backward = jax.vjp(
    lambda k: convolution.convolve(images, k, None, (1, 1), padding, dilation, 1), kernel
  )
  np.testing.assert_allclose(operands[2], backward(output)[0], rtol=1e-5, atol=1e-4)


def run_without_avx512(code):
  """Whether `code` succeeds in a process where oneDNN does not use AVX-512."""
  changes = {"ONEDNN_MAX_CPU_ISA": "AVX2", backend.VARIABLE: "onednn"}
  return subprocess.run([sys.executable, "-c", code], env=os.environ | changes).returncode == 0


def test_without_avx512_kernel_gradients_of_dilated_convolutions_would_copy_patches():
  assert run_without_avx512("""
from flax_cifar.kernels.onednn import convolution, library
for kind in range(3):
  for dilation in (1, 2):
    c = convolution.Convolution(
      kind, library.FLOAT32, 8, 36, 36, 32, 32, 3, 3, 1, 1, 0, 0, 0, 0, dilation, dilation, 1, 0
    )
    slow = kind == convolution.KERNEL_GRADIENT and dilation == 2
    assert convolution.copies_patches(c) == slow, c
""")


def test_a_bias_has_the_gradient_of_a_sum_where_onednn_would_copy_patches(monkeypatch):
  monkeypatch.setattr(convolution, "copies_patches", lambda c: True)
  images, kernel = get_operands((2, 7, 6, 3), (3, 3, 3, 5))
  direction = np.random.default_rng(1).normal(size=(2, 5, 4, 5)).astype(np.float32)
  _, backward = jax.vjp(
    lambda b: convolution.convolve(images, kernel, b, (1, 1), NONE, (1, 1), 1), jnp.ones(5)
  )
  expected = direction.astype(np.float64).sum((0, 1, 2))
  np.testing.assert_allclose(backward(jnp.asarray(direction))[0], expected, rtol=1e-5, atol=1e-5)


def test_xla_computes_bfloat16_where_onednn_does_not():
  """oneDNN does not compute in bfloat16 without AVX-512."""
  assert run_without_avx512("""
import jax, jax.numpy as jnp
from flax_cifar.kernels import conv
from flax_cifar.kernels.onednn import convolution
assert convolution.can_compute(jnp.dtype("float32"))
assert not convolution.can_compute(jnp.dtype("bfloat16"))
x, kernel = jnp.ones((2, 5, 5, 8), jnp.bfloat16), jnp.ones((3, 3, 8, 8), jnp.bfloat16)
y = conv.conv_general_dilated(
  x, kernel, (1, 1), [(0, 0)] * 2, rhs_dilation=(1, 1), feature_group_count=1
)
assert (y == 72).all()
""")
