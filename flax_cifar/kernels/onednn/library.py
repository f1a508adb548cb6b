"""The library oneDNN for CPUs through its C interface; onednn-cpu-gomp has it.

XLA:CPU computes the kernel gradient of a small convolution at a tenth of the processor's rate, and
oneDNN computes it at the full rate. A primitive is one of oneDNN's kernels, made for given shapes.
A Program runs primitives on the buffers of XLA.
"""

import ctypes
import functools
import pathlib
import site
import sys
import sysconfig
import threading
from collections.abc import Mapping, Sequence
from ctypes import byref, c_char_p, c_int, c_int64, c_size_t, c_void_p
from typing import Any

import jax.numpy as jnp

# Constants of oneDNN's dnnl_types.h, version 3.
_CPU, _IN_ORDER, _OWN_SCRATCH = 1, 1, 1
_SCRATCH, _SCRATCH_LAYOUT, _IMPLEMENTATION = 80, 136, 8
_NO_ADDRESS, _ALLOCATE = c_void_p(0), c_void_p(2**64 - 1)
TRAINING = 64  # the purpose of a primitive
FLOAT32 = 3
DATA_TYPES = {jnp.dtype(jnp.float32): FLOAT32, jnp.dtype(jnp.bfloat16): 2}


@functools.cache
def load_library() -> ctypes.CDLL | None:
  """Loads oneDNN 3 of this Python environment; None without it or the libgomp that it needs."""
  for folder in (sys.prefix, sysconfig.get_path("data"), site.getuserbase()):
    path = pathlib.Path(folder, "lib", "libdnnl.so.3")
    if path.exists():
      try:
        return ctypes.CDLL(str(path))
      except OSError:
        return None
  return None


def call(name: str, *arguments: Any) -> None:
  """Calls the function `name` of the library.

  Raises:
    RuntimeError: the function refuses; the message has its name and status.
  """
  status = getattr(load_library(), name)(*arguments)
  if status:
    raise RuntimeError(f"{name} returned status {status}")


def create(name: str, *arguments: Any) -> c_void_p:
  """Calls a function that creates an object, and returns the handle in its first argument."""
  handle = c_void_p()
  call(name, byref(handle), *arguments)
  return handle


@functools.cache
def get_engine() -> c_void_p:
  """Returns the handle of the processor."""
  return create("dnnl_engine_create", c_int(_CPU), c_size_t(0))


@functools.cache
def get_attributes() -> c_void_p:
  """Returns attributes that say that the caller provides scratch memory.

  The library's own scratch memory belongs to the thread that created the primitive.
  """
  attributes = create("dnnl_primitive_attr_create")
  call("dnnl_primitive_attr_set_scratchpad_mode", attributes, c_int(_OWN_SCRATCH))
  return attributes


# ---- Layouts of arrays


def int64s(values: Sequence[int]) -> Any:
  """Returns `values` as a C array."""
  return (c_int64 * len(values))(*values)


def describe(dims: Sequence[int], strides: Sequence[int], data_type: int) -> c_void_p:
  """Describes the layout of an array; `strides` are in elements."""
  return create(
    "dnnl_memory_desc_create_with_strides", len(dims), int64s(dims), data_type, int64s(strides)
  )


def describe_images(shape: tuple[int, int, int, int], data_type: int) -> c_void_p:
  """Describes images that are NHWC in memory; oneDNN names the axes in the order NCHW."""
  n, h, w, c = shape
  return describe((n, c, h, w), (h * w * c, 1, w * c, c), data_type)


def query_layout(descriptor: c_void_p, what: int) -> c_void_p:
  """Returns the layout that a primitive's descriptor has chosen for the array `what`."""
  query = load_library().dnnl_primitive_desc_query_md  # type: ignore[union-attr]
  query.restype = c_void_p
  return c_void_p(query(descriptor, what, 0))


def query_implementation(descriptor: c_void_p) -> str:
  """Returns the library's name of the kernel that it chose, such as "jit:avx2"."""
  name = c_char_p()
  call("dnnl_primitive_desc_query", descriptor, c_int(_IMPLEMENTATION), c_int(0), byref(name))
  return (name.value or b"").decode()


# ---- Running primitives


def create_buffer(layout: c_void_p) -> c_void_p:
  """Allocates memory for an array that only a Program uses."""
  return create("dnnl_memory_create", layout, get_engine(), _ALLOCATE)


def create_slot(layout: c_void_p) -> c_void_p:
  """Creates memory whose address comes with each call of a Program."""
  return create("dnnl_memory_create", layout, get_engine(), _NO_ADDRESS)


class _Argument(ctypes.Structure):
  _fields_ = (("index", c_int), ("memory", c_void_p))


class Step:
  """A primitive with the memory that it reads and writes.

  Args:
    descriptor: of the primitive.
    memories: the memory of each argument, by the library's number of the argument.
  """

  def __init__(self, descriptor: c_void_p, memories: Mapping[int, c_void_p]):
    scratch = create_buffer(query_layout(descriptor, _SCRATCH_LAYOUT))
    arguments = {**memories, _SCRATCH: scratch}
    self._primitive = create("dnnl_primitive_create", descriptor)
    self._arguments = (_Argument * len(arguments))(*(_Argument(*a) for a in arguments.items()))

  def run(self, stream: c_void_p) -> None:
    """Enqueues the primitive."""
    arguments = self._arguments
    call("dnnl_primitive_execute", self._primitive, stream, len(arguments), arguments)


class Program:
  """Runs steps one after the other; call it with the addresses of its slots, in their order."""

  def __init__(self, slots: Sequence[c_void_p], steps: Sequence[Step]):
    self._lock = threading.Lock()  # the buffers serve one call at a time
    self._stream = create("dnnl_stream_create", get_engine(), c_int(_IN_ORDER))
    self._slots, self._steps = slots, steps

  def __call__(self, addresses: Sequence[int]) -> None:
    with self._lock:
      for slot, address in zip(self._slots, addresses, strict=True):
        call("dnnl_memory_set_data_handle", slot, c_void_p(address))
      for step in self._steps:
        step.run(self._stream)
      call("dnnl_stream_wait", self._stream)
