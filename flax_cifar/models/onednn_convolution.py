"""Convolutions by oneDNN, forward and backward, for float32 and bfloat16."""

import functools
from collections.abc import Sequence
from ctypes import c_void_p
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from flax_cifar.models import onednn, xla_ffi
from flax_cifar.models.onednn import create, describe, describe_images, int64s
from flax_cifar.models.taps import get_kernel_gradient

TARGET = "flax_cifar_onednn_convolution"
FORWARD, INPUT_GRADIENT, KERNEL_GRADIENT = range(3)

# Constants of oneDNN's dnnl_types.h, version 3.
_DIRECT, _ANY_LAYOUT = 1, 1
_SRC, _DST, _WEIGHTS, _BIAS = 1, 17, 33, 41
_DIFF_SRC, _DIFF_DST, _DIFF_WEIGHTS, _DIFF_BIAS = 129, 145, 161, 169
_KERNEL_LAYOUT = {FORWARD: 131, INPUT_GRADIENT: 131, KERNEL_GRADIENT: 132}


# ---- One convolution


class Convolution(NamedTuple):
  """All that determines a primitive, as integers, so that it travels as one key of the call."""

  kind: int  # FORWARD, INPUT_GRADIENT or KERNEL_GRADIENT
  data_type: int  # a value of onednn.DATA_TYPES
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


def _kernel_dims(c: Convolution) -> tuple[int, ...]:
  """oneDNN's order: groups, output channels and input channels of a group, height, width."""
  height, width, ins, outs = c.kernel_shape
  return c.groups, outs // c.groups, ins, height, width


def _describe_kernel(c: Convolution) -> c_void_p:
  """HWIO in memory, the groups side by side in O."""
  _, width, ins, outs = c.kernel_shape
  strides = (outs // c.groups, 1, outs, width * ins * outs, ins * outs)
  return describe(_kernel_dims(c), strides, c.data_type)


def _describe_bias(c: Convolution) -> c_void_p:
  return describe((c.out_channels,), (1,), onednn.FLOAT32)


def _create_descriptor(c: Convolution) -> c_void_p:
  """The convolution, with its kernel in the layout that oneDNN likes best."""
  dims = _kernel_dims(c)
  kernel = create(
    "dnnl_memory_desc_create_with_tag", len(dims), int64s(dims), c.data_type, _ANY_LAYOUT
  )
  images = describe_images(c.input_shape, c.data_type)
  output = describe_images(c.output_shape, c.data_type)
  window = (
    int64s((c.stride_y, c.stride_x)),
    int64s((c.dilation_y - 1, c.dilation_x - 1)),
    int64s((c.top, c.left)),
    int64s((c.bottom, c.right)),
  )
  engine, attributes = onednn.get_engine(), onednn.get_attributes()
  name = "dnnl_convolution_{}_primitive_desc_create".format
  bias = _describe_bias(c) if c.has_bias else None
  operands: tuple[c_void_p | None, ...] = (images, kernel, bias, output)
  forward = create(
    name("forward"), engine, onednn.TRAINING, _DIRECT, *operands, *window, attributes
  )
  if c.kind == FORWARD:
    return forward
  if c.kind == INPUT_GRADIENT:
    kind, operands = "backward_data", (images, kernel, output)
  else:
    kind = "backward_weights"
  return create(name(kind), engine, _DIRECT, *operands, *window, forward, attributes)


@functools.cache
def can_compute(dtype: jnp.dtype) -> bool:
  """Whether oneDNN convolves `dtype` on this processor: bfloat16 only where it has AVX-512."""
  if dtype not in onednn.DATA_TYPES:
    return False
  tiny = Convolution(
    kind=FORWARD,
    data_type=onednn.DATA_TYPES[dtype],
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
def _copies_patches(c: Convolution) -> bool:
  """Whether the library has no kernel of its own for `c` and multiplies matrices of patches.

  On processors without AVX-512 so it is with kernel gradients of dilated convolutions.
  """
  return "gemm" in onednn.query_implementation(_create_descriptor(c))


def _create_program(c: Convolution) -> onednn.Program:
  """Slots: images, kernel, bias -> output; output, kernel -> images; images, output -> both."""
  descriptor = _create_descriptor(c)
  outer_layout = _describe_kernel(c)
  inner_layout = onednn.query_layout(descriptor, _KERNEL_LAYOUT[c.kind])
  images = onednn.create_slot(describe_images(c.input_shape, c.data_type))
  output = onednn.create_slot(describe_images(c.output_shape, c.data_type))
  outer, inner = onednn.create_slot(outer_layout), onednn.create_buffer(inner_layout)
  bias = {}
  if c.has_bias:
    argument = _DIFF_BIAS if c.kind == KERNEL_GRADIENT else _BIAS
    bias[argument] = onednn.create_slot(_describe_bias(c))
  if c.kind == KERNEL_GRADIENT:
    memories = {_SRC: images, _DIFF_DST: output, _DIFF_WEIGHTS: inner, **bias}
    reorder = _create_reorder(inner_layout, inner, outer_layout, outer)
    steps = onednn.Step(descriptor, memories), reorder
    return onednn.Program((images, output, outer, *bias.values()), steps)
  reorder = _create_reorder(outer_layout, outer, inner_layout, inner)
  if c.kind == FORWARD:
    memories = {_SRC: images, _WEIGHTS: inner, _DST: output, **bias}
    slots = images, outer, *bias.values(), output
  else:
    memories = {_DIFF_DST: output, _WEIGHTS: inner, _DIFF_SRC: images}
    slots = output, outer, images
  return onednn.Program(slots, (reorder, onednn.Step(descriptor, memories)))


def _create_reorder(
  from_layout: c_void_p, source: c_void_p, to_layout: c_void_p, target: c_void_p
) -> onednn.Step:
  engine = onednn.get_engine()
  descriptor = create(
    "dnnl_reorder_primitive_desc_create",
    from_layout,
    engine,
    to_layout,
    engine,
    onednn.get_attributes(),
  )
  return onednn.Step(descriptor, {_SRC: source, _DST: target})


_get_program = functools.cache(_create_program)


def _execute(key: tuple[int, ...], addresses: list[int]) -> None:
  _get_program(Convolution(*key))(addresses)


# ---- As a function of JAX


@functools.cache
def _register() -> None:
  xla_ffi.register(TARGET, _execute)


def convolve(
  images: jax.Array,
  kernel: jax.Array,
  bias: jax.Array | None,
  strides: Sequence[int],
  padding: Sequence[Sequence[int]],
  dilation: Sequence[int],
  groups: int,
) -> jax.Array:
  """The convolution of images NHWC with a kernel HWIO; differentiable once.

  Args:
    images: float32 or bfloat16 (N, H, W, C).
    kernel: of the same type, (height, width, C / groups, out).
    bias: float32 (out,), or None.
    strides: of rows and columns.
    padding: ((top, bottom), (left, right)) pixels of zeros.
    dilation: distance of the kernel's taps in rows and columns.
    groups: into which the channels are split.
  """
  _register()
  reach = [(k - 1) * d for k, d in zip(kernel.shape[:2], dilation, strict=True)]
  if any(max(pair) > r for pair, r in zip(padding, reach, strict=True)):
    # For windows that may lie in the padding altogether, the library has slow kernels only.
    images, padding = jnp.pad(images, ((0, 0), *padding, (0, 0))), ((0, 0), (0, 0))
  window = (*strides, *padding[0], *padding[1], *dilation)
  shape = (*images.shape, kernel.shape[-1], *kernel.shape[:2])
  key = (FORWARD, onednn.DATA_TYPES[images.dtype], *shape, *window, groups, int(bias is not None))
  return _convolve(images, kernel, bias, Convolution(*key))


def _like(array: jax.Array, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, array.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _convolve(
  images: jax.Array, kernel: jax.Array, bias: jax.Array | None, c: Convolution
) -> jax.Array:
  operands = (images, kernel) if bias is None else (images, kernel, bias)
  return xla_ffi.call(TARGET, c, operands, _like(images, c.output_shape))


def _convolve_forward(
  images: jax.Array, kernel: jax.Array, bias: jax.Array | None, c: Convolution
) -> Any:
  return _convolve(images, kernel, bias, c), (images, kernel, bias)


def _convolve_backward(c: Convolution, saved: Any, gradient: jax.Array) -> Any:
  images, kernel, bias = saved
  to_images, to_kernel = c._replace(kind=INPUT_GRADIENT), c._replace(kind=KERNEL_GRADIENT)
  image_gradient = xla_ffi.call(TARGET, to_images, (gradient, kernel), _like(images, c.input_shape))
  if c.groups == c.stride_y == c.stride_x == 1 and _copies_patches(to_kernel):
    padding = (c.top, c.bottom), (c.left, c.right)
    dilation = c.dilation_y, c.dilation_x
    kernel_gradient = get_kernel_gradient(images, gradient, c.kernel_shape, padding, dilation)
    bias_gradient = None if bias is None else gradient.astype(jnp.float32).sum((0, 1, 2))
    return image_gradient, kernel_gradient, bias_gradient
  results = [_like(kernel, c.kernel_shape)]
  if bias is not None:
    results.append(_like(bias, bias.shape))
  kernel_gradient, *bias_gradients = xla_ffi.call(TARGET, to_kernel, (images, gradient), results)
  return image_gradient, kernel_gradient, *(bias_gradients or [None])


_convolve.defvjp(_convolve_forward, _convolve_backward)
