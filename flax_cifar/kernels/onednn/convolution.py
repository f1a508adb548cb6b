"""Convolutions by oneDNN, forward and backward, for float32 and bfloat16."""

import functools
from collections.abc import Sequence
from ctypes import c_void_p
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from flax_cifar.kernels import ffi, taps
from flax_cifar.kernels.onednn import library

TARGET = "flax_cifar_onednn_convolution"
FORWARD, INPUT_GRADIENT, KERNEL_GRADIENT = range(3)

# Constants of oneDNN's dnnl_types.h, version 3.
_DIRECT, _ANY_LAYOUT = 1, 1
_SRC, _DST, _WEIGHTS, _BIAS = 1, 17, 33, 41
_DIFF_SRC, _DIFF_DST, _DIFF_WEIGHTS, _DIFF_BIAS = 129, 145, 161, 169
_KERNEL_LAYOUT = {FORWARD: 131, INPUT_GRADIENT: 131, KERNEL_GRADIENT: 132}


# ---- One convolution


class Convolution(NamedTuple):
  """All that determines a primitive, as integers, so that it can be the key of an FFI call."""

  kind: int  # FORWARD, INPUT_GRADIENT or KERNEL_GRADIENT
  data_type: int  # a value of library.DATA_TYPES
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
  has_bias: int  # 0 or 1

  @property
  def input_shape(self) -> tuple[int, int, int, int]:
    """NHWC."""
    return self.batch, self.height, self.width, self.in_channels

  @property
  def kernel_shape(self) -> tuple[int, int, int, int]:
    """HWIO."""
    in_channels = self.in_channels // self.groups
    return self.kernel_height, self.kernel_width, in_channels, self.out_channels

  @property
  def output_shape(self) -> tuple[int, int, int, int]:
    """NHWC."""
    extent_y = (self.kernel_height - 1) * self.dilation_y + 1
    extent_x = (self.kernel_width - 1) * self.dilation_x + 1
    height = (self.height + self.top + self.bottom - extent_y) // self.stride_y + 1
    width = (self.width + self.left + self.right - extent_x) // self.stride_x + 1
    return self.batch, height, width, self.out_channels


def _kernel_dims(c: Convolution) -> tuple[int, ...]:
  """Returns oneDNN's order: groups, output and input channels of a group, height, width."""
  height, width, in_channels, out_channels = c.kernel_shape
  return c.groups, out_channels // c.groups, in_channels, height, width


def _describe_kernel(c: Convolution) -> c_void_p:
  """Describes a kernel that is HWIO in memory, with the groups side by side in O."""
  _, width, in_channels, out_channels = c.kernel_shape
  tap = in_channels * out_channels
  strides = (out_channels // c.groups, 1, out_channels, width * tap, tap)
  return library.describe(_kernel_dims(c), strides, c.data_type)


def _describe_bias(c: Convolution) -> c_void_p:
  return library.describe((c.out_channels,), (1,), library.FLOAT32)


def _create_descriptor(c: Convolution) -> c_void_p:
  """Creates the descriptor of `c`, with the kernel in the layout that oneDNN computes best with."""
  dims = _kernel_dims(c)
  kernel = library.create(
    "dnnl_memory_desc_create_with_tag", len(dims), library.int64s(dims), c.data_type, _ANY_LAYOUT
  )
  images = library.describe_images(c.input_shape, c.data_type)
  output = library.describe_images(c.output_shape, c.data_type)
  window = (
    library.int64s((c.stride_y, c.stride_x)),
    library.int64s((c.dilation_y - 1, c.dilation_x - 1)),
    library.int64s((c.top, c.left)),
    library.int64s((c.bottom, c.right)),
  )
  engine, attributes = library.get_engine(), library.get_attributes()
  name = "dnnl_convolution_{}_primitive_desc_create".format
  bias = _describe_bias(c) if c.has_bias else None
  operands: tuple[c_void_p | None, ...] = (images, kernel, bias, output)
  forward = library.create(
    name("forward"), engine, library.TRAINING, _DIRECT, *operands, *window, attributes
  )
  if c.kind == FORWARD:
    return forward
  if c.kind == INPUT_GRADIENT:
    kind, operands = "backward_data", (images, kernel, output)
  else:
    kind = "backward_weights"
  return library.create(name(kind), engine, _DIRECT, *operands, *window, forward, attributes)


@functools.cache
def can_compute(dtype: jnp.dtype) -> bool:
  """Whether oneDNN convolves `dtype` on this processor; bfloat16 needs AVX-512."""
  if dtype not in library.DATA_TYPES:
    return False
  tiny = Convolution(
    kind=FORWARD,
    data_type=library.DATA_TYPES[dtype],
    batch=1,
    height=4,
    width=4,
    in_channels=16,
    out_channels=16,
    kernel_height=3,
    kernel_width=3,
    stride_y=1,
    stride_x=1,
    top=1,
    bottom=1,
    left=1,
    right=1,
    dilation_y=1,
    dilation_x=1,
    groups=1,
    has_bias=0,
  )
  try:
    for kind in (FORWARD, INPUT_GRADIENT, KERNEL_GRADIENT):
      _create_descriptor(tiny._replace(kind=kind))
  except RuntimeError:
    return False
  return True


@functools.cache
def copies_patches(c: Convolution) -> bool:
  """Whether oneDNN has no kernel of its own for `c` and multiplies matrices of patches instead.

  It does so for kernel gradients of dilated convolutions on processors without AVX-512.
  """
  return "gemm" in library.query_implementation(_create_descriptor(c))


def _create_program(c: Convolution) -> library.Program:
  """Creates the program of `c`.

  Its slots in order, by kind: FORWARD images, kernel, bias if any, output; INPUT_GRADIENT output,
  kernel, images; KERNEL_GRADIENT images, output, kernel, bias if any.
  """
  descriptor = _create_descriptor(c)
  outer_layout = _describe_kernel(c)
  inner_layout = library.query_layout(descriptor, _KERNEL_LAYOUT[c.kind])
  images = library.create_slot(library.describe_images(c.input_shape, c.data_type))
  output = library.create_slot(library.describe_images(c.output_shape, c.data_type))
  outer, inner = library.create_slot(outer_layout), library.create_buffer(inner_layout)
  bias = {}
  if c.has_bias:
    argument = _DIFF_BIAS if c.kind == KERNEL_GRADIENT else _BIAS
    bias[argument] = library.create_slot(_describe_bias(c))
  if c.kind == KERNEL_GRADIENT:
    memories = {_SRC: images, _DIFF_DST: output, _DIFF_WEIGHTS: inner, **bias}
    reorder = _create_reorder(inner_layout, inner, outer_layout, outer)
    steps = library.Step(descriptor, memories), reorder
    return library.Program((images, output, outer, *bias.values()), steps)
  reorder = _create_reorder(outer_layout, outer, inner_layout, inner)
  if c.kind == FORWARD:
    memories = {_SRC: images, _WEIGHTS: inner, _DST: output, **bias}
    slots = images, outer, *bias.values(), output
  else:
    memories = {_DIFF_DST: output, _WEIGHTS: inner, _DIFF_SRC: images}
    slots = output, outer, images
  return library.Program(slots, (reorder, library.Step(descriptor, memories)))


def _create_reorder(
  from_layout: c_void_p, source: c_void_p, to_layout: c_void_p, target: c_void_p
) -> library.Step:
  engine = library.get_engine()
  descriptor = library.create(
    "dnnl_reorder_primitive_desc_create",
    from_layout,
    engine,
    to_layout,
    engine,
    library.get_attributes(),
  )
  return library.Step(descriptor, {_SRC: source, _DST: target})


_get_program = functools.cache(_create_program)


def _execute(key: tuple[int, ...], addresses: list[int]) -> None:
  _get_program(Convolution(*key))(addresses)


# ---- As a function of JAX


def is_available() -> bool:
  """Whether oneDNN is installed and XLA accepts calls of it."""
  return library.load_library() is not None and _register()


@ffi.once
def _register() -> bool:
  return ffi.register(TARGET, _execute)


def convolve(
  images: Float[Array, "n h w c"],
  kernel: Float[Array, "kh kw i o"],
  bias: Float32[Array, " o"] | None,
  strides: Sequence[int],
  padding: Sequence[Sequence[int]],
  dilation: Sequence[int],
  groups: int,
) -> Float[Array, "n h2 w2 o"]:
  """Convolves images NHWC with a kernel HWIO; differentiable once.

  Args:
    images: float32 or bfloat16.
    kernel: of the same type, with C / groups input channels.
    bias: added to the output, or None.
    strides: of rows and columns.
    padding: ((top, bottom), (left, right)) pixels of zeros.
    dilation: distance of the kernel's taps in rows and columns.
    groups: the number of groups that the channels are split into.
  """
  _register()
  reach = [(k - 1) * d for k, d in zip(kernel.shape[:2], dilation, strict=True)]
  if any(max(pair) > r for pair, r in zip(padding, reach, strict=True)):
    # oneDNN has only slow kernels for windows that can lie entirely in the padding.
    images, padding = jnp.pad(images, ((0, 0), *padding, (0, 0))), ((0, 0), (0, 0))
  window = (*strides, *padding[0], *padding[1], *dilation)
  shape = (*images.shape, kernel.shape[-1], *kernel.shape[:2])
  key = (FORWARD, library.DATA_TYPES[images.dtype], *shape, *window, groups, int(bias is not None))
  return _convolve(images, kernel, bias, Convolution(*key))


def _like(array: Array, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, array.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _convolve(images: Array, kernel: Array, bias: Array | None, c: Convolution) -> Array:
  operands = (images, kernel) if bias is None else (images, kernel, bias)
  return ffi.call(TARGET, c, operands, _like(images, c.output_shape))


def _convolve_forward(images: Array, kernel: Array, bias: Array | None, c: Convolution) -> Any:
  return _convolve(images, kernel, bias, c), (images, kernel, bias)


def _convolve_backward(c: Convolution, saved: Any, gradient: Array) -> Any:
  images, kernel, bias = saved
  to_images, to_kernel = c._replace(kind=INPUT_GRADIENT), c._replace(kind=KERNEL_GRADIENT)
  image_gradient = ffi.call(TARGET, to_images, (gradient, kernel), _like(images, c.input_shape))
  if c.groups == c.stride_y == c.stride_x == 1 and copies_patches(to_kernel):
    padding = (c.top, c.bottom), (c.left, c.right)
    dilation = c.dilation_y, c.dilation_x
    kernel_gradient = taps.get_kernel_gradient(images, gradient, c.kernel_shape, padding, dilation)
    bias_gradient = None if bias is None else gradient.astype(jnp.float32).sum((0, 1, 2))
    return image_gradient, kernel_gradient, bias_gradient
  results = [_like(kernel, c.kernel_shape)]
  if bias is not None:
    results.append(_like(bias, bias.shape))
  kernel_gradient, *bias_gradients = ffi.call(TARGET, to_kernel, (images, gradient), results)
  return image_gradient, kernel_gradient, *(bias_gradients or [None])


_convolve.defvjp(_convolve_forward, _convolve_backward)
