"""The end of a unit in one pass: normalization, activation, dropout and the sum with a shortcut."""

import functools
from typing import Any

import jax
from jaxtyping import Array, Float, UInt32

from flax_cifar.kernels import moments as moments_lib
from flax_cifar.kernels.native import library

ACTIVATIONS = ("none", "relu", "silu", "gelu")  # the order of activation.h


def finish(
  x: Float[Array, "n h w c"],
  affine: moments_lib.Affine,
  shortcut: Float[Array, "n h w c"] | None,
  mask: UInt32[Array, " 4"] | None,
  *,
  activation: str,
) -> Float[Array, "n h w c"]:
  """Normalizes `x`, applies an activation and dropout, and adds a shortcut; differentiable once.

  Args:
    x: (N, H, W, C).
    affine: normalizes x.
    shortcut: added at the end, or None.
    mask: what to drop, by `dropout.Dropout.get_mask`, or None.
    activation: one of ACTIVATIONS, after the normalization; "gelu" is its approximation by tanh.
  """
  return _finish(x, library.broadcast(affine, x), shortcut, mask, activation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _finish(
  x: Array,
  affine: moments_lib.Affine,
  shortcut: Array | None,
  mask: Array | None,
  activation: str,
) -> Array:
  present = [array for array in (shortcut, mask) if array is not None]
  shape = _get_shape(x, activation, shortcut is not None, mask is not None)
  operands = x, *affine, *present
  (y,) = library.call(library.FINISH, x.dtype, shape, operands, (library.like(x, *x.shape),))
  return y


def _get_shape(x: Array, activation: str, has_shortcut: bool, drops: bool) -> tuple[int, ...]:
  """The fields of `Ending` in finish.h."""
  n, h, w, c = x.shape
  return n, h * w, c, ACTIVATIONS.index(activation), int(has_shortcut), int(drops)


def _finish_forward(
  x: Array,
  affine: moments_lib.Affine,
  shortcut: Array | None,
  mask: Array | None,
  activation: str,
) -> Any:
  return _finish(x, affine, shortcut, mask, activation), (x, affine, mask, shortcut is not None)


def _finish_backward(activation: str, saved: Any, gradient: Array) -> Any:
  x, affine, mask, has_shortcut = saved
  n, c = len(x), x.shape[-1]
  shape = _get_shape(x, activation, False, mask is not None)
  results = library.like(x, *x.shape), library.floats(n, c), library.floats(n, c)
  operands = (gradient, x, *affine, *([] if mask is None else [mask]))
  to_x, to_slope, to_bias = library.call(library.FINISH_BACK, x.dtype, shape, operands, results)
  to_affine = moments_lib.Affine(-affine.slope * to_bias, to_slope, to_bias)
  return to_x, to_affine, gradient if has_shortcut else None, None


_finish.defvjp(_finish_forward, _finish_backward)
