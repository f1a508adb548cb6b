"""The kernel backend, which computes convolutions, ReLU, padding and pooling.

The environment variable FLAX_CIFAR_KERNELS holds a key of BACKENDS.
"""

import os
import platform
import sys

import jax

from flax_cifar import errors
from flax_cifar.kernels.onednn import convolution, library

VARIABLE = "FLAX_CIFAR_KERNELS"
BACKENDS = {
  "auto": "onednn on a single CPU device, if it is installed; else xla on CPUs, else definition",
  "onednn": "kernels of oneDNN",
  "xla": "operations of XLA, put together for CPUs",
  "definition": "the plain operations of JAX",
}


def select_backend() -> str:
  """Returns the key of BACKENDS that this process uses; "auto" is resolved.

  Raises:
    UserError: the variable holds another value, or asks for oneDNN where it is missing.
  """
  name = os.environ.get(VARIABLE) or "auto"
  errors.choose(VARIABLE, name, BACKENDS)
  available = jax.default_backend() == "cpu" and convolution.is_available()
  expected = "auto unless onednn-cpu-gomp is installed and fits this JAX"
  errors.require(available or name != "onednn", VARIABLE, name, expected)
  if name != "auto":
    return name
  if jax.default_backend() != "cpu":
    return "definition"
  # XLA cannot split a custom call over devices.
  return "onednn" if available and jax.device_count() == 1 else "xla"


def describe_backend() -> str:
  """Describes the backend in use for the banner, and how to get a faster one."""
  name = select_backend()
  return f"{name}: {BACKENDS[name]} ({VARIABLE}){_get_hint()}"


def _get_hint() -> str:
  installable = sys.platform == "linux" and platform.machine() == "x86_64"
  if not installable or jax.default_backend() != "cpu" or convolution.is_available():
    return ""
  if library.load_library() is None:
    return "; oneDNN would be faster: pip install onednn-cpu-gomp"
  return "; oneDNN is installed but does not fit this version of JAX"
