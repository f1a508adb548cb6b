"""Normalisation by oneDNN, forward and backward, for float32 and bfloat16.

Statistics and parameters are float32. A kernel reads the data two or three times; what XLA makes of
the same formula stores it in float32 in between, several times over.
"""

import functools
from collections.abc import Sequence
from ctypes import c_float, c_uint, c_void_p
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flax_cifar.models import onednn, xla_ffi
from flax_cifar.models.onednn import create, describe, describe_images

BATCH_TARGET = "flax_cifar_onednn_batch_norm"
LAYER_TARGET = "flax_cifar_onednn_layer_norm"

# Constants of oneDNN's dnnl_types.h, version 3.
_SRC, _DST, _DIFF_SRC, _DIFF_DST = 1, 17, 129, 145
_MEAN, _VARIANCE, _SCALE, _SHIFT, _DIFF_SCALE, _DIFF_SHIFT = 49, 50, 51, 52, 255, 256
_FIXED_STATISTICS, _SCALE_AND_SHIFT, _BACKWARD_DATA = 1, 2 | 4, 160


def _encode(epsilon: float) -> int:
  """Its bits, because the key of a call holds integers."""
  return int(np.float32(epsilon).view(np.int32))


def _decode(bits: int) -> c_float:
  return c_float(float(np.int32(bits).view(np.float32)))


def has_fast_kernels(x: jax.Array) -> bool:
  """Whether batch_norm and scale_and_shift of `x` are fast: in bfloat16 if channels come in 16s."""
  return x.dtype == jnp.float32 or x.shape[-1] % 16 == 0


def _describe_results(x: jax.Array, length: int) -> tuple[jax.ShapeDtypeStruct, ...]:
  """An array like `x` and two float32 vectors."""
  vector = jax.ShapeDtypeStruct((length,), jnp.float32)
  return jax.ShapeDtypeStruct(x.shape, x.dtype), vector, vector


def _create_program(
  descriptor: c_void_p, layouts: Sequence[tuple[int, c_void_p]]
) -> onednn.Program:
  """One primitive, whose slots are its arguments, given as number and layout, in this order."""
  slots = {argument: onednn.create_slot(layout) for argument, layout in layouts}
  return onednn.Program([*slots.values()], [onednn.Step(descriptor, slots)])


# ---- Batch norm


class BatchNorm(NamedTuple):
  """All that determines a primitive, as integers, so that it travels as one key of the call."""

  backward: int  # 0 or 1
  fixed: int  # whether mean and variance are given, 0 or 1; of backward only
  data_type: int  # a value of onednn.DATA_TYPES
  batch: int
  positions: int  # height x width
  channels: int
  epsilon: int  # encoded


@functools.cache
def _get_batch_program(n: BatchNorm) -> onednn.Program:
  images = describe_images((n.batch, n.positions, 1, n.channels), n.data_type)
  vector = describe((n.channels,), (1,), onednn.FLOAT32)
  engine, attributes = onednn.get_engine(), onednn.get_attributes()
  flags = _decode(n.epsilon), c_uint(_SCALE_AND_SHIFT | _FIXED_STATISTICS * n.fixed)
  name = "dnnl_batch_normalization_{}_primitive_desc_create".format
  forward = create(name("forward"), engine, onednn.TRAINING, images, images, *flags, attributes)
  statistics = (_MEAN, vector), (_VARIANCE, vector)
  if not n.backward:
    operands = (_SRC, images), (_SCALE, vector), (_SHIFT, vector)
    return _create_program(forward, [*operands, (_DST, images), *statistics])
  backward = create(
    name("backward"), engine, onednn.BACKWARD, images, images, images, *flags, forward, attributes
  )
  gradients = (_DIFF_DST, images), (_SRC, images), *statistics, (_SCALE, vector)
  results = (_DIFF_SRC, images), (_DIFF_SCALE, vector), (_DIFF_SHIFT, vector)
  return _create_program(backward, [*gradients, *results])


@functools.cache
def _register_batch_norm() -> None:
  xla_ffi.register(BATCH_TARGET, lambda key, places: _get_batch_program(BatchNorm(*key))(places))


def batch_norm(
  x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Normalises each channel over the batch and all positions; differentiable once.

  Args:
    x: float32 or bfloat16 (N, ..., C).
    scale: float32 (C,).
    bias: float32 (C,).
    epsilon: added to the variance.

  Returns:
    y like x; the mean and the biased variance, float32 (C,), through which no gradient flows.
  """
  return _batch_norm(x, scale, bias, _describe_batch_norm(x, epsilon))


def _describe_batch_norm(x: jax.Array, epsilon: float) -> BatchNorm:
  _register_batch_norm()
  positions = x.size // (x.shape[0] * x.shape[-1])
  data_type = onednn.DATA_TYPES[x.dtype]
  return BatchNorm(0, 0, data_type, x.shape[0], positions, x.shape[-1], _encode(epsilon))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _batch_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, n: BatchNorm) -> Any:
  results = _describe_results(x, n.channels)
  return tuple(xla_ffi.call(BATCH_TARGET, n, (x, scale, bias), results))


def _batch_norm_forward(x: jax.Array, scale: jax.Array, bias: jax.Array, n: BatchNorm) -> Any:
  y, mean, var = _batch_norm(x, scale, bias, n)
  return (y, mean, var), (x, mean, var, scale)


def _batch_norm_backward(n: BatchNorm, saved: Any, gradients: Any) -> Any:
  return _differentiate(n._replace(backward=1), gradients[0], *saved)


def _differentiate(n: BatchNorm, gradient: jax.Array, x: jax.Array, *others: jax.Array) -> Any:
  """Gradients of x, scale and bias; `others` are mean, variance and scale."""
  results = _describe_results(x, n.channels)
  return tuple(xla_ffi.call(BATCH_TARGET, n, (gradient, x, *others), results))


_batch_norm.defvjp(_batch_norm_forward, _batch_norm_backward)


@jax.custom_vjp
def scale_and_shift(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
  """x * scale + bias of each channel; differentiable once.

  XLA makes the value, fused with what follows, and oneDNN the gradients, in one pass: those of a
  batch norm whose mean is 0 and whose variance is 1.

  Args:
    x: float32 or bfloat16 (N, ..., C).
    scale: float32 (C,).
    bias: float32 (C,).
  """
  return (x * scale + bias).astype(x.dtype)


def _scale_forward(x: jax.Array, scale: jax.Array, bias: jax.Array) -> Any:
  return scale_and_shift(x, scale, bias), (x, scale)


def _scale_backward(saved: Any, gradient: jax.Array) -> Any:
  x, scale = saved
  n = _describe_batch_norm(x, 0.0)._replace(backward=1, fixed=1)
  return _differentiate(n, gradient, x, jnp.zeros_like(scale), jnp.ones_like(scale), scale)


scale_and_shift.defvjp(_scale_forward, _scale_backward)


# ---- Layer norm


class LayerNorm(NamedTuple):
  """All that determines a primitive, as integers, so that it travels as one key of the call."""

  backward: int  # 0 or 1
  data_type: int  # a value of onednn.DATA_TYPES
  rows: int
  columns: int
  epsilon: int  # encoded


@functools.cache
def _get_layer_program(n: LayerNorm) -> onednn.Program:
  table = describe((n.rows, n.columns), (n.columns, 1), n.data_type)
  vector = describe((n.rows,), (1,), onednn.FLOAT32)
  engine, attributes = onednn.get_engine(), onednn.get_attributes()
  flags = vector, _decode(n.epsilon), c_uint(0)
  name = "dnnl_layer_normalization_{}_primitive_desc_create".format
  forward = create(name("forward"), engine, onednn.TRAINING, table, table, *flags, attributes)
  statistics = (_MEAN, vector), (_VARIANCE, vector)
  if not n.backward:
    return _create_program(forward, [(_SRC, table), (_DST, table), *statistics])
  backward = create(
    name("backward"), engine, _BACKWARD_DATA, table, table, table, *flags, forward, attributes
  )
  return _create_program(
    backward, [(_DIFF_DST, table), (_SRC, table), *statistics, (_DIFF_SRC, table)]
  )


@functools.cache
def _register_layer_norm() -> None:
  xla_ffi.register(LAYER_TARGET, lambda key, places: _get_layer_program(LayerNorm(*key))(places))


def layer_norm(x: jax.Array, epsilon: float) -> jax.Array:
  """Normalises each row of `x`, float32 or bfloat16 (rows, columns); differentiable once."""
  _register_layer_norm()
  rows, columns = x.shape
  key = LayerNorm(0, onednn.DATA_TYPES[x.dtype], rows, columns, _encode(epsilon))
  return _layer_norm(x, key)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _layer_norm(x: jax.Array, n: LayerNorm) -> jax.Array:
  return _layer_norm_forward(x, n)[0]


def _layer_norm_forward(x: jax.Array, n: LayerNorm) -> Any:
  y, mean, var = xla_ffi.call(LAYER_TARGET, n, (x,), _describe_results(x, n.rows))
  return y, (x, mean, var)


def _layer_norm_backward(n: LayerNorm, saved: Any, gradient: jax.Array) -> tuple[jax.Array]:
  result = jax.ShapeDtypeStruct(gradient.shape, gradient.dtype)
  return (xla_ffi.call(LAYER_TARGET, n._replace(backward=1), (gradient, *saved), result),)


_layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)
