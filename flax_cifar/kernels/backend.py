"""The kernel backend, which computes convolutions, ReLU, padding and pooling.

The environment variable FLAX_CIFAR_KERNELS holds a key of BACKENDS.
"""

import contextlib
import contextvars
import os
import platform
import sys
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from flax_cifar import environment, errors
from flax_cifar.kernels.native import library as native
from flax_cifar.kernels.onednn import convolution, library

VARIABLE = "FLAX_CIFAR_KERNELS"
BACKENDS = {
  "auto": "the fastest: native or onednn on one CPU, if they work; xla on several; gpu on GPUs",
  "native": "C++ where there is a kernel, else oneDNN where it is installed, else XLA",
  "onednn": "kernels of oneDNN",
  "xla": "operations of XLA, put together for CPUs",
  "gpu": "operations of XLA, put together for GPUs",
  "definition": "the plain operations of JAX",
}
_selected: contextvars.ContextVar[str] = contextvars.ContextVar(VARIABLE, default="")
PLAIN = ("definition", "gpu")  # without the detours that make XLA faster on CPUs
FAST_BFLOAT16 = ("avx512_bf16", "amx_bf16")  # instruction sets

# Those that may be missing, fastest first: whether they work, and what they need.
OPTIONAL: dict[str, tuple[Callable[[], bool], Callable[[], str]]] = {
  "native": (
    lambda: native.is_available(),
    lambda: f"a C++ compiler is installed: c++, or CXX names it{_get_reason()}",
  ),
  "onednn": (
    lambda: convolution.is_available(),
    lambda: "onednn-cpu-gomp is installed and fits this JAX",
  ),
}


def select_backend() -> str:
  """Returns the key of BACKENDS that this process uses; "auto" is resolved.

  Raises:
    UserError: the variable holds another value, or asks for what is missing here.
  """
  name = _selected.get() or os.environ.get(VARIABLE) or "auto"
  errors.choose(VARIABLE, name, BACKENDS)
  on_cpu = jax.default_backend() == "cpu"
  if name == "auto":
    if not on_cpu:
      return "gpu" if jax.default_backend() == "gpu" else "definition"
    if jax.device_count() > 1:  # XLA cannot split a custom call over devices
      return "xla"
    return next((name for name, (works, _) in OPTIONAL.items() if works()), "xla")
  if name in OPTIONAL:
    works, get_need = OPTIONAL[name]
    errors.require(on_cpu and works(), VARIABLE, name, f"auto unless {get_need()}")
  return name


@contextlib.contextmanager
def use(name: str) -> Iterator[None]:
  """Selects the backend `name` for what this thread traces within it."""
  token = _selected.set(name)
  try:
    yield
  finally:
    _selected.reset(token)


def uses_onednn(dtype: jnp.dtype) -> bool:
  """Whether oneDNN convolves arrays of `dtype` in this process."""
  selected = select_backend() in OPTIONAL and convolution.is_available()
  return selected and convolution.can_compute(dtype)


def uses_native(dtype: jnp.dtype) -> bool:
  """Whether the kernels in C++ compute arrays of `dtype` in this process."""
  return select_backend() == "native" and native.can_compute(dtype)


def settle_dtype(name: str) -> str:
  """Returns `name`, or for "auto" the type in which this process computes fastest.

  That is bfloat16 where the devices have instructions for it, else float32.
  """
  if name != "auto":
    return name
  device = jax.local_devices()[0]
  if device.platform == "cpu":
    fast = uses_onednn(jnp.dtype(jnp.bfloat16)) and has_fast_bfloat16()
  else:
    fast = not _is_before_ampere(getattr(device, "compute_capability", None))
  return "bfloat16" if fast else "float32"


def _is_before_ampere(capability: str | None) -> bool:
  """Whether a GPU is of NVIDIA's generations without bfloat16; AMD's capability is a name."""
  try:
    return float(capability or 8) < 8
  except ValueError:
    return False


def has_fast_bfloat16() -> bool:
  """Whether the processor has instructions for products of bfloat16, which oneDNN uses."""
  return any(name in FAST_BFLOAT16 for name in environment.list_processor_features())


def describe_backend() -> str:
  """Describes the backend in use for the banner, and how to get a faster one."""
  name = select_backend()
  return f"{name}: {BACKENDS[name]} ({VARIABLE}){_get_hint()}"


def _get_reason() -> str:
  failure = native.get_failure()
  return f" (it failed: {failure})" if failure else ""


def _get_hint() -> str:
  if jax.default_backend() != "cpu" or jax.device_count() > 1:  # neither would be used
    return ""
  hints = []
  if not native.is_available():
    reason = _get_reason()
    hints.append(f"most networks would be faster with a C++ compiler (c++, or CXX){reason}")
  if sys.platform == "linux" and platform.machine() == "x86_64" and not convolution.is_available():
    missing = library.load_library() is None
    remedy = "would be faster: pip install onednn-cpu-gomp"
    hints.append(f"oneDNN {remedy if missing else 'does not fit this version of JAX'}")
  return "".join(f"; {hint}" for hint in hints)
