"""Python functions called by XLA: operands, results, keys and errors."""

import concurrent.futures
import ctypes
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_cifar import errors
from flax_cifar.kernels import backend, ffi
from flax_cifar.kernels.onednn import convolution


def view(address, count):
  return np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_float)), (count,))


def add_scaled(key, addresses):
  count, factor = key
  if factor < 0:
    raise ValueError(f"factor {factor} is negative")
  first, second, result = (view(address, count) for address in addresses)
  result[:] = first + factor * second


ffi.register("test_add_scaled", add_scaled)


def call(first, second, factor):
  key = (first.size, factor)
  result = jax.ShapeDtypeStruct(first.shape, first.dtype)
  return ffi.call("test_add_scaled", key, (first, second), result)


def test_a_function_reads_operands_and_key_and_fills_the_result():
  first, second = jnp.arange(6.0).reshape(2, 3), jnp.ones((2, 3))
  got = jax.jit(lambda a, b: 2 * call(a, b, 10) + 1)(first, second)
  np.testing.assert_array_equal(got, 2 * (np.arange(6.0).reshape(2, 3) + 10) + 1)


def cut(key, addresses):
  whole, low, high = (view(*pair) for pair in zip(addresses, (sum(key), *key), strict=True))
  low[:], high[:] = np.split(whole, key[:1])


ffi.register("test_cut", cut)


def test_a_function_may_have_several_results():
  results = [jax.ShapeDtypeStruct((count,), jnp.float32) for count in (2, 3)]
  low, high = jax.jit(lambda a: ffi.call("test_cut", (2, 3), (a,), results))(jnp.arange(5.0))
  assert (low.tolist(), high.tolist()) == ([0, 1], [2, 3, 4])


def test_an_exception_becomes_an_error_of_xla_with_its_text():
  with pytest.raises(jax.errors.JaxRuntimeError, match="test_add_scaled: factor -3 is negative"):
    jax.block_until_ready(jax.jit(lambda a: call(a, a, -3))(jnp.ones(4)))


def test_vmap_calls_for_each_member():
  first, second = jnp.arange(12.0).reshape(3, 4), jnp.arange(3.0)[:, None] * jnp.ones(4)
  got = jax.vmap(lambda a, b: call(a, b, 2))(first, second)
  np.testing.assert_array_equal(got, first + 2 * second)


def test_of_threads_that_ask_at_once_one_computes():
  started = []

  @ffi.once
  def compute(value):
    started.append(value)
    time.sleep(0.1)
    return object()

  with concurrent.futures.ThreadPoolExecutor() as pool:
    first, second, third, other = pool.map(compute, [1, 1, 1, 2])
  assert first is second is third is not other
  assert sorted(started) == [1, 2]


def test_calls_from_several_devices_at_once():
  function = jax.jit(lambda a: call(a, a, 1))
  arrays = [jax.device_put(jnp.full(1000, float(i)), d) for i, d in enumerate(jax.devices())]
  results = [function(array) for _ in range(5) for array in arrays]
  for i, result in enumerate(results):
    np.testing.assert_array_equal(result, np.full(1000, 2.0 * (i % len(arrays))))


def test_another_version_of_xlas_interface_is_refused_and_not_used(monkeypatch):
  assert ffi.register("test_version", cut)
  monkeypatch.setattr(ffi, "API_VERSION", (7, 0))
  assert not ffi.register("test_other_version", cut)
  monkeypatch.setattr(convolution, "_register", lambda: ffi.register("test_third_version", cut))
  monkeypatch.delenv(backend.VARIABLE, raising=False)
  assert backend.select_backend() == "xla"
  monkeypatch.setenv(backend.VARIABLE, "onednn")
  with pytest.raises(errors.UserError, match="FLAX_CIFAR_KERNELS='onednn'"):
    backend.select_backend()
