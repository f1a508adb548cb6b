"""Python functions as XLA custom calls on the CPU.

XLA calls a C function with a struct, the call frame of xla/ffi/api/c_api.h. `ctypes` makes that
function and reads the struct, so nothing has to be compiled. A call holds the GIL until the
Python function releases it, as calls through `ctypes` do.
"""

import ctypes
import functools
import threading
from collections.abc import Callable, Sequence
from ctypes import POINTER, c_char_p, c_int, c_int64, c_size_t, c_uint32, c_void_p
from typing import Any, ParamSpec, TypeVar

import jax
import numpy as np

# (the integers given to `call`, the addresses of the operands and then of the results) -> None
Function = Callable[[tuple[int, ...], list[int]], None]
Results = jax.ShapeDtypeStruct | Sequence[jax.ShapeDtypeStruct]
P = ParamSpec("P")
R = TypeVar("R")

# The version of the interface that the structs below belong to: that of jaxlib 0.10.2, which
# jaxlib 0.12 (version 0.5) still accepts. XLA refuses a handler of a version it does not support.
API_VERSION = (0, 3)
_METADATA, _EXECUTE, _INTERNAL = 1, 3, 13
_HEAD = (("struct_size", c_size_t), ("extension", c_void_p))


class _Buffer(ctypes.Structure):
  _fields_ = (*_HEAD, ("dtype", c_int), ("data", c_void_p), ("rank", c_int64), ("dims", c_void_p))


class _Buffers(ctypes.Structure):
  _fields_ = (*_HEAD, ("size", c_int64), ("types", c_void_p), ("items", POINTER(POINTER(_Buffer))))


class _Array(ctypes.Structure):
  _fields_ = (("dtype", c_int), ("size", c_size_t), ("data", POINTER(c_int64)))


class _Attributes(ctypes.Structure):
  _fields_ = (
    *_HEAD,
    ("size", c_int64),
    ("types", c_void_p),
    ("names", c_void_p),
    ("items", POINTER(POINTER(_Array))),
  )


class _Version(ctypes.Structure):
  _fields_ = (*_HEAD, ("major", c_int), ("minor", c_int))


class _Api(ctypes.Structure):
  _fields_ = (*_HEAD, ("version", _Version), ("internal", c_void_p), ("create_error", c_void_p))


class _Metadata(ctypes.Structure):
  _fields_ = (("struct_size", c_size_t), ("version", _Version), ("traits", c_uint32))


class _MetadataExtension(ctypes.Structure):
  _fields_ = (
    ("struct_size", c_size_t),
    ("type", c_int),
    ("next", c_void_p),
    ("metadata", POINTER(_Metadata)),
  )


class _CallFrame(ctypes.Structure):
  _fields_ = (
    *_HEAD,
    ("api", POINTER(_Api)),
    ("context", c_void_p),
    ("stage", c_int),
    ("operands", _Buffers),
    ("results", _Buffers),
    ("attributes", _Attributes),
  )


class _Error(ctypes.Structure):
  _fields_ = (*_HEAD, ("message", c_char_p), ("code", c_int))


_Handler = ctypes.CFUNCTYPE(c_void_p, POINTER(_CallFrame))
_registered: list[Any] = []  # handlers must outlive the programs that call them


def once(function: Callable[P, R]) -> Callable[P, R]:
  """Like functools.cache; but of threads that call it at once, one computes and the others wait.

  XLA takes a target once, and refuses the second registration.
  """
  lock, cached = threading.RLock(), functools.cache(function)

  @functools.wraps(function)
  def call_locked(*args: P.args, **kwargs: P.kwargs) -> R:
    with lock:
      return cached(*args, **kwargs)  # type: ignore[arg-type]

  return call_locked


def register(target: str, function: Function) -> bool:
  """Lets the XLA programs of this process call `function` under the name `target`.

  Returns:
    Whether XLA accepts API_VERSION; if not, `target` cannot be called.
  """

  def handle(pointer: Any) -> int | None:
    """Returns null, or the address of an error object of XLA."""
    frame = pointer.contents
    if frame.extension and _answer_metadata(frame):
      return None
    if frame.stage != _EXECUTE:
      return None
    try:
      function(*_read(frame))
    except BaseException as error:  # no exception may reach the C code, not even Ctrl-C
      return _create_error(frame, f"{target}: {error}")
    return None

  handler = _Handler(handle)
  _registered.append(handler)
  capsule = jax.ffi.pycapsule(ctypes.cast(handler, c_void_p))
  jax.local_devices(backend="cpu")  # XLA looks at a handler only once its CPU client exists
  try:
    jax.ffi.register_ffi_target(target, capsule, platform="cpu")
  except Exception as error:  # XLA raises a type of its own
    if "API version" not in str(error):
      raise
    return False
  return True


def call(target: str, key: Sequence[int], operands: Sequence[jax.Array], results: Results) -> Any:
  """Returns arrays like `results`, filled by the function that is registered as `target`.

  Args:
    target: the name of the function.
    key: integers for the function.
    operands: arrays that the function reads.
    results: shape and type of the array, or a sequence of them for a sequence of arrays.
  """
  caller = jax.ffi.ffi_call(target, results, vmap_method="sequential")
  return caller(*operands, key=np.asarray(key, np.int64))


def _read(frame: _CallFrame) -> tuple[tuple[int, ...], list[int]]:
  key = frame.attributes.items[0].contents
  buffers = [
    *frame.operands.items[: frame.operands.size],
    *frame.results.items[: frame.results.size],
  ]
  return tuple(key.data[: key.size]), [buffer.contents.data for buffer in buffers]


def _answer_metadata(frame: _CallFrame) -> bool:
  """Tells XLA the interface version of the handler, if it asks, as it does at registration."""
  extension = ctypes.cast(frame.extension, POINTER(_MetadataExtension)).contents
  if extension.type != _METADATA:
    return False
  version = extension.metadata.contents.version
  version.major, version.minor = API_VERSION
  return True


def _create_error(frame: _CallFrame, message: str) -> int:
  error = _Error(ctypes.sizeof(_Error), None, message.encode(), _INTERNAL)
  create = ctypes.CFUNCTYPE(c_void_p, c_void_p)(frame.api.contents.create_error)
  return create(ctypes.addressof(error))
