"""Convolutions of oneDNN for CPUs: the optional extra `onednn`.

XLA:CPU computes the kernel gradient of a small convolution at a tenth of the processor's rate, and
oneDNN at full rate. Its library is called through its C interface on the buffers of XLA.
"""

import ctypes
import functools
import pathlib
import site
import sys
import sysconfig
import threading
from collections.abc import Mapping, Sequence
from ctypes import byref, c_int, c_int64, c_size_t, c_void_p
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flax_cifar.models import xla_ffi

TARGET = "flax_cifar_onednn_convolution"
FORWARD, INPUT_GRADIENT, KERNEL_GRADIENT = range(3)

# Constants of oneDNN's dnnl_types.h, version 3.
_CPU, _IN_ORDER, _ANY_LAYOUT, _TRAINING, _DIRECT = 1, 1, 1, 64, 1
_SRC, _DST, _WEIGHTS, _DIFF_SRC, _DIFF_DST, _DIFF_WEIGHTS, _SCRATCH = 1, 17, 33, 129, 145, 161, 80
_OWN_SCRATCH, _SCRATCH_LAYOUT = 1, 136
_KERNEL_LAYOUT = {FORWARD: 131, INPUT_GRADIENT: 131, KERNEL_GRADIENT: 132}
_NO_ADDRESS, _ALLOCATE = c_void_p(0), c_void_p(2**64 - 1)
DATA_TYPES = {jnp.dtype(jnp.float32): 3, jnp.dtype(jnp.bfloat16): 2}


# ---- The library


@functools.cache
def load_library() -> ctypes.CDLL | None:
  """oneDNN 3 of this Python environment; None where it, or the libgomp it needs, is missing."""
  for folder in (sys.prefix, sysconfig.get_path("data"), site.getuserbase()):
    path = pathlib.Path(folder, "lib", "libdnnl.so.3")
    if path.exists():
      try:
        return ctypes.CDLL(str(path))
      except OSError:
        return None
  return None


def _call(name: str, *arguments: Any) -> None:
  status = getattr(load_library(), name)(*arguments)
  if status:
    raise RuntimeError(f"{name} returned status {status}")


def _create(name: str, *arguments: Any) -> c_void_p:
  """Calls a function whose first argument receives a handle to what it creates."""
  handle = c_void_p()
  _call(name, byref(handle), *arguments)
  return handle


@functools.cache
def _engine() -> c_void_p:
  return _create("dnnl_engine_create", c_int(_CPU), c_size_t(0))


@functools.cache
def _attributes() -> c_void_p:
  """Scratch memory is ours: the library's belongs to the thread that created the primitive."""
  attributes = _create("dnnl_primitive_attr_create")
  _call("dnnl_primitive_attr_set_scratchpad_mode", attributes, c_int(_OWN_SCRATCH))
  return attributes


def _query_layout(descriptor: c_void_p, what: int) -> c_void_p:
  query = load_library().dnnl_primitive_desc_query_md  # type: ignore[union-attr]
  query.restype = c_void_p
  return c_void_p(query(descriptor, what, 0))


def _int64s(values: Sequence[int]) -> Any:
  return (c_int64 * len(values))(*values)


# ---- One convolution


class Convolution(NamedTuple):
  """All that determines a primitive, as integers, so that it travels as one key of the call."""

  kind: int  # FORWARD, INPUT_GRADIENT or KERNEL_GRADIENT
  data_type: int  # a value of DATA_TYPES
  batch: int
  height: int
  width: int
  in_channels: int
  out_channels: int
  kernel_height: int
  kernel_width: int
  stride_y: int
  stride_x: int
  top: int  # pixels of padding
  bottom: int
  left: int
  right: int
  dilation_y: int
  dilation_x: int
  groups: int

  @property
  def input_shape(self) -> tuple[int, int, int, int]:
    """NHWC."""
    return self.batch, self.height, self.width, self.in_channels

  @property
  def kernel_shape(self) -> tuple[int, int, int, int]:
    """HWIO."""
    ins = self.in_channels // self.groups
    return self.kernel_height, self.kernel_width, ins, self.out_channels

  @property
  def output_shape(self) -> tuple[int, int, int, int]:
    """NHWC."""
    extent_y = (self.kernel_height - 1) * self.dilation_y + 1
    extent_x = (self.kernel_width - 1) * self.dilation_x + 1
    height = (self.height + self.top + self.bottom - extent_y) // self.stride_y + 1
    width = (self.width + self.left + self.right - extent_x) // self.stride_x + 1
    return self.batch, height, width, self.out_channels


def _describe(dims: Sequence[int], strides: Sequence[int], data_type: int) -> c_void_p:
  return _create(
    "dnnl_memory_desc_create_with_strides", len(dims), _int64s(dims), data_type, _int64s(strides)
  )


def _describe_images(shape: tuple[int, int, int, int], data_type: int) -> c_void_p:
  """NHWC in memory; oneDNN names the axes in the order NCHW."""
  n, h, w, c = shape
  return _describe((n, c, h, w), (h * w * c, 1, w * c, c), data_type)


def _kernel_dims(c: Convolution) -> tuple[int, ...]:
  """oneDNN's order: groups, output channels and input channels of a group, height, width."""
  height, width, ins, outs = c.kernel_shape
  return c.groups, outs // c.groups, ins, height, width


def _describe_kernel(c: Convolution) -> c_void_p:
  """HWIO in memory, the groups side by side in O."""
  _, width, ins, outs = c.kernel_shape
  strides = (outs // c.groups, 1, outs, width * ins * outs, ins * outs)
  return _describe(_kernel_dims(c), strides, c.data_type)


def _create_descriptor(c: Convolution) -> c_void_p:
  """The convolution, with its kernel in the layout that oneDNN likes best."""
  dims = _kernel_dims(c)
  kernel = _create(
    "dnnl_memory_desc_create_with_tag", len(dims), _int64s(dims), c.data_type, _ANY_LAYOUT
  )
  images = _describe_images(c.input_shape, c.data_type)
  output = _describe_images(c.output_shape, c.data_type)
  window = (
    _int64s((c.stride_y, c.stride_x)),
    _int64s((c.dilation_y - 1, c.dilation_x - 1)),
    _int64s((c.top, c.left)),
    _int64s((c.bottom, c.right)),
  )
  create = "dnnl_convolution_{}_primitive_desc_create".format
  operands: tuple[c_void_p | None, ...] = (images, kernel, None, output)  # None: no bias
  forward = _create(
    create("forward"), _engine(), _TRAINING, _DIRECT, *operands, *window, _attributes()
  )
  if c.kind == FORWARD:
    return forward
  if c.kind == INPUT_GRADIENT:
    name, operands = create("backward_data"), (images, kernel, output)
  else:
    name = create("backward_weights")
  return _create(name, _engine(), _DIRECT, *operands, *window, forward, _attributes())


class _Argument(ctypes.Structure):
  _fields_ = (("index", c_int), ("memory", c_void_p))


class _Step:
  """A primitive with what it reads and writes."""

  def __init__(self, descriptor: c_void_p, memories: Mapping[int, c_void_p]):
    scratch = _create_memory(_query_layout(descriptor, _SCRATCH_LAYOUT), _ALLOCATE)
    arguments = {**memories, _SCRATCH: scratch}
    self._primitive = _create("dnnl_primitive_create", descriptor)
    self._arguments = (_Argument * len(arguments))(*(_Argument(*a) for a in arguments.items()))

  def run(self, stream: c_void_p) -> None:
    arguments = self._arguments
    _call("dnnl_primitive_execute", self._primitive, stream, len(arguments), arguments)


class _Convolver:
  """Computes one Convolution: call it with the addresses of operands and result."""

  def __init__(self, c: Convolution):
    self._lock = threading.Lock()  # its scratch memory serves one call at a time
    self._stream = _create("dnnl_stream_create", _engine(), c_int(_IN_ORDER))
    descriptor = _create_descriptor(c)
    outer_layout = _describe_kernel(c)
    inner_layout = _query_layout(descriptor, _KERNEL_LAYOUT[c.kind])
    images = _create_memory(_describe_images(c.input_shape, c.data_type), _NO_ADDRESS)
    output = _create_memory(_describe_images(c.output_shape, c.data_type), _NO_ADDRESS)
    outer = _create_memory(outer_layout, _NO_ADDRESS)
    inner = _create_memory(inner_layout, _ALLOCATE)
    if c.kind == KERNEL_GRADIENT:
      memories = {_SRC: images, _DIFF_DST: output, _DIFF_WEIGHTS: inner}
      reorder = _create_reorder(inner_layout, inner, outer_layout, outer)
      self._memories = images, output, outer
      self._steps = _Step(descriptor, memories), reorder
      return
    reorder = _create_reorder(outer_layout, outer, inner_layout, inner)
    if c.kind == FORWARD:
      memories = {_SRC: images, _WEIGHTS: inner, _DST: output}
      self._memories = images, outer, output
    else:
      memories = {_DIFF_DST: output, _WEIGHTS: inner, _DIFF_SRC: images}
      self._memories = output, outer, images
    self._steps = reorder, _Step(descriptor, memories)

  def __call__(self, addresses: Sequence[int]) -> None:
    with self._lock:
      for memory, address in zip(self._memories, addresses, strict=True):
        _call("dnnl_memory_set_data_handle", memory, c_void_p(address))
      for step in self._steps:
        step.run(self._stream)
      _call("dnnl_stream_wait", self._stream)


def _create_memory(layout: c_void_p, address: c_void_p) -> c_void_p:
  return _create("dnnl_memory_create", layout, _engine(), address)


def _create_reorder(
  from_layout: c_void_p, source: c_void_p, to_layout: c_void_p, target: c_void_p
) -> _Step:
  descriptor = _create(
    "dnnl_reorder_primitive_desc_create",
    from_layout,
    _engine(),
    to_layout,
    _engine(),
    _attributes(),
  )
  return _Step(descriptor, {_SRC: source, _DST: target})


_get_convolver = functools.cache(_Convolver)


def _execute(key: tuple[int, ...], addresses: list[int]) -> None:
  _get_convolver(Convolution(*key))(addresses)


# ---- As a function of JAX


@functools.cache
def _register() -> None:
  xla_ffi.register(TARGET, _execute)


def convolve(
  images: jax.Array,
  kernel: jax.Array,
  strides: Sequence[int],
  padding: Sequence[Sequence[int]],
  dilation: Sequence[int],
  groups: int,
) -> jax.Array:
  """The convolution of images NHWC with a kernel HWIO; differentiable once.

  Args:
    images: float32 or bfloat16 (N, H, W, C).
    kernel: of the same type, (height, width, C / groups, out).
    strides: of rows and columns.
    padding: ((top, bottom), (left, right)) pixels of zeros.
    dilation: distance of the kernel's taps in rows and columns.
    groups: into which the channels are split.
  """
  _register()
  window = (*strides, *padding[0], *padding[1], *dilation)
  shape = (*images.shape, kernel.shape[-1], *kernel.shape[:2])
  key = (FORWARD, DATA_TYPES[images.dtype], *shape, *window, groups)
  return _convolve(images, kernel, Convolution(*key))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolve(images: jax.Array, kernel: jax.Array, c: Convolution) -> jax.Array:
  return xla_ffi.call(TARGET, c.output_shape, images.dtype, c, images, kernel)


def _convolve_forward(images: jax.Array, kernel: jax.Array, c: Convolution) -> Any:
  return _convolve(images, kernel, c), (images, kernel)


def _convolve_backward(c: Convolution, saved: Any, gradient: jax.Array) -> Any:
  images, kernel = saved
  to_images, to_kernel = c._replace(kind=INPUT_GRADIENT), c._replace(kind=KERNEL_GRADIENT)
  return (
    xla_ffi.call(TARGET, c.input_shape, images.dtype, to_images, gradient, kernel),
    xla_ffi.call(TARGET, c.kernel_shape, kernel.dtype, to_kernel, images, gradient),
  )


_convolve.defvjp(_convolve_forward, _convolve_backward)
