"""The functions in C++, compiled for this machine, as functions of JAX."""

import ctypes
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from flax_cifar import environment
from flax_cifar.kernels import ffi
from flax_cifar.kernels import moments as moments_lib
from flax_cifar.kernels.native import compiler

TARGET = "flax_cifar_native"
SOURCE = pathlib.Path(__file__).with_name("kernels.cc")
PARTS = 32  # of a batch, whose kernel gradients are computed side by side and then added
# The types of images, and the macros that SOURCE is compiled with for them.
DTYPES = {jnp.dtype(jnp.float32): (), jnp.dtype(jnp.bfloat16): ("BFLOAT16",)}

# The numbers of the functions in SOURCE.
DEPTHWISE, DEPTHWISE_BACK, POINTWISE, POINTWISE_BACK = range(4)
FINISH, FINISH_BACK, WINOGRAD, WINOGRAD_BACK, DIRECT, DIRECT_BACK = range(4, 10)
MAX_POOL, MAX_POOL_BACK = range(10, 12)


def is_available() -> bool:
  """Whether a compiler is here and XLA accepts calls of what it compiled."""
  return can_compute(jnp.dtype(jnp.float32))


def can_compute(dtype: jnp.dtype) -> bool:
  """Whether the functions exist for images of `dtype`, and work here."""
  return dtype in DTYPES and _register(dtype)


def get_failure() -> str:
  """Returns why the compiler did not compile SOURCE, or "" where it did."""
  return compiler.get_failure(SOURCE)


@ffi.once
def _register(dtype: jnp.dtype) -> bool:
  library = compiler.load(SOURCE, DTYPES[dtype])
  if library is None:
    return False
  library.flax_cifar_start(environment.count_cores())

  def execute(key: tuple[int, ...], addresses: list[int]) -> None:
    numbers = (ctypes.c_int64 * len(key))(*key)
    arrays = (ctypes.c_void_p * len(addresses))(*addresses)
    library.flax_cifar_run(numbers, arrays)

  return ffi.register(_get_target(dtype), execute)


def _get_target(dtype: jnp.dtype) -> str:
  return f"{TARGET}_{dtype.name}"


def call(
  function: int,
  dtype: jnp.dtype,
  shape: Sequence[int],
  operands: Sequence[Array],
  results: Sequence[jax.ShapeDtypeStruct],
) -> Any:
  """Calls a function of SOURCE; `shape` has the fields of its struct in C++."""
  _register(dtype)
  return ffi.call(_get_target(dtype), (function, *shape), operands, results)


def like(x: Array, *shape: int) -> jax.ShapeDtypeStruct:
  """Describes a result of the type of `x`."""
  return jax.ShapeDtypeStruct(shape, x.dtype)


def floats(*shape: int) -> jax.ShapeDtypeStruct:
  """Describes a float32 result."""
  return jax.ShapeDtypeStruct(shape, jnp.float32)


def broadcast(affine: moments_lib.Affine, x: Array) -> moments_lib.Affine:
  """Broadcasts `affine` to a row for each image of `x`."""
  return moments_lib.Affine(*(jnp.broadcast_to(a, (len(x), x.shape[-1])) for a in affine))


def get_moment_terms(
  y: Array, mean: Array, to_mean: Array, to_variance: Array
) -> moments_lib.Affine:
  """Returns what the gradients of the moments add to that of `y`: (y - center) * slope + bias."""
  pixels = y.shape[1] * y.shape[2]
  return moments_lib.Affine(mean, 2 * to_variance / pixels, to_mean / pixels)
