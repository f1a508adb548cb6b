"""The choice of a kernel backend."""

import concurrent.futures
import types

import jax.numpy as jnp
import numpy as np
import pytest

from flax_cifar import errors
from flax_cifar.kernels import backend


def test_the_variable_selects_a_backend(monkeypatch):
  monkeypatch.setenv(backend.VARIABLE, "definition")
  assert backend.select_backend() == "definition"
  monkeypatch.setenv(backend.VARIABLE, "fast")
  with pytest.raises(errors.UserError, match="FLAX_CIFAR_KERNELS='fast'"):
    backend.select_backend()


def test_onednn_is_refused_where_it_is_missing(monkeypatch):
  monkeypatch.setattr("flax_cifar.kernels.onednn.library.load_library", lambda: None)
  monkeypatch.setenv(backend.VARIABLE, "onednn")
  with pytest.raises(errors.UserError, match="onednn"):
    backend.select_backend()
  monkeypatch.delenv(backend.VARIABLE)
  monkeypatch.setattr(backend.jax, "device_count", lambda: 1)
  monkeypatch.setattr(backend.native, "is_available", lambda: False)
  assert backend.select_backend() == "xla"


@pytest.mark.parametrize(
  ("platform", "capability", "features", "expected"),
  [
    ("cpu", None, ["avx2", "avx512f"], "float32"),
    ("cpu", None, ["avx512f", "avx512_bf16"], "bfloat16"),
    ("cpu", None, ["amx_bf16"], "bfloat16"),
    ("cpu", None, [], "float32"),  # not Linux
    ("gpu", "7.5", [], "float32"),
    ("gpu", "8.0", [], "bfloat16"),
    ("gpu", "10.0", [], "bfloat16"),
    ("gpu", "gfx942", [], "bfloat16"),  # AMD's
    ("tpu", None, [], "bfloat16"),
  ],
)
def test_auto_is_bfloat16_where_the_device_is_fast_at_it(
  platform, capability, features, expected, monkeypatch
):
  device = types.SimpleNamespace(platform=platform)
  if capability:
    device.compute_capability = capability
  monkeypatch.setattr(backend.jax, "local_devices", lambda: [device])
  monkeypatch.setattr(backend.environment, "list_processor_features", lambda: features)
  monkeypatch.setattr(backend, "uses_onednn", lambda dtype: True)
  assert backend.settle_dtype("auto") == expected
  assert backend.settle_dtype("float32") == "float32"
  monkeypatch.setattr(backend, "uses_onednn", lambda dtype: False)
  assert backend.settle_dtype("auto") == ("float32" if platform == "cpu" else expected)


def test_a_selection_ends_with_its_block_and_is_of_one_thread(monkeypatch):
  monkeypatch.setenv(backend.VARIABLE, "xla")
  with backend.use("definition"), concurrent.futures.ThreadPoolExecutor() as pool:
    assert backend.select_backend() == "definition"
    assert pool.submit(backend.select_backend).result() == "xla"
  assert backend.select_backend() == "xla"


def test_auto_is_float32_where_onednn_is_not_selected(monkeypatch):
  monkeypatch.setattr(backend.environment, "list_processor_features", lambda: ["amx_bf16"])
  with backend.use("xla"):
    assert backend.settle_dtype("auto") == "float32"


def test_native_is_refused_without_a_compiler(monkeypatch):
  monkeypatch.setattr("flax_cifar.kernels.native.library.is_available", lambda: False)
  monkeypatch.setattr("flax_cifar.kernels.native.library.get_failure", lambda: "no space left")
  monkeypatch.setenv(backend.VARIABLE, "native")
  with pytest.raises(errors.UserError, match=r"'native'.*C\+\+ compiler.*no space left"):
    backend.select_backend()


def test_native_computes_only_types_whose_library_works(monkeypatch):
  monkeypatch.setattr(backend, "select_backend", lambda: "native")
  monkeypatch.setattr(backend.native, "_register", lambda dtype: dtype == "float32")
  assert backend.uses_native(np.dtype("float32"))
  assert not backend.uses_native(jnp.dtype(jnp.bfloat16))
  assert not backend.uses_native(np.dtype("float64"))


def test_the_banner_says_what_would_be_faster(monkeypatch):
  monkeypatch.setattr(backend.jax, "default_backend", lambda: "cpu")
  monkeypatch.setattr(backend.jax, "device_count", lambda: 1)
  monkeypatch.setattr(backend, "select_backend", lambda: "xla")
  monkeypatch.setattr(backend.native, "is_available", lambda: False)
  monkeypatch.setattr(backend.native, "get_failure", lambda: "")
  monkeypatch.setattr(backend.convolution, "is_available", lambda: False)
  monkeypatch.setattr(backend.library, "load_library", lambda: None)
  monkeypatch.setattr(backend.sys, "platform", "linux")
  monkeypatch.setattr(backend.platform, "machine", lambda: "x86_64")
  text = backend.describe_backend()
  assert text.startswith("xla: ")
  assert "; most networks would be faster with a C++ compiler" in text
  assert text.endswith("; oneDNN would be faster: pip install onednn-cpu-gomp")
  monkeypatch.setattr(backend.library, "load_library", lambda: "there")
  assert backend.describe_backend().endswith("; oneDNN does not fit this version of JAX")
  monkeypatch.setattr(backend.native, "is_available", lambda: True)
  monkeypatch.setattr(backend.convolution, "is_available", lambda: True)
  assert backend.describe_backend().endswith(f"({backend.VARIABLE})")


@pytest.mark.parametrize(("platform", "expected"), [("gpu", "gpu"), ("tpu", "definition")])
def test_accelerators_get_what_was_put_together_for_them(platform, expected, monkeypatch):
  monkeypatch.setattr(backend.jax, "default_backend", lambda: platform)
  monkeypatch.delenv(backend.VARIABLE, raising=False)
  assert backend.select_backend() == expected
