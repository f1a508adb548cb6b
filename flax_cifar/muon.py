"""Muon for GPUs: it orthogonalizes the updates of many kernels at once.

The result is that of `optax.contrib.muon`, whose Newton-Schulz iteration takes fifteen small matrix
products for each kernel, one after another. The states are the same too.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float32

SMALL = 128  # rows or columns up to which matrices of different sizes are padded to one size


def create(
  learning_rate: Callable[[Any], Any],
  *,
  beta: float,
  weight_decay: float,
  adam_weight_decay: float,
  consistent_rms: float,
  muon_weight_dimension_numbers: Callable[[Any], Any],
) -> optax.GradientTransformation:
  """Creates the optimizer; the arguments are those of `optax.contrib.muon`."""
  plain = optax.contrib.scale_by_muon(beta=beta)

  def label(params: Any) -> Any:
    matrices = muon_weight_dimension_numbers(params)
    return jax.tree.map(
      lambda axes: "adam" if axes is None else "muon", matrices, is_leaf=_is_axes_or_none
    )

  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    del params
    count = optax.safe_increment(state.count)
    mu = optax.tree.update_moment(updates, state.mu, beta, 1)
    ahead = optax.tree.bias_correction(mu, beta, optax.safe_increment(count))
    now = optax.tree.bias_correction(updates, beta, count)
    momenta = jax.tree.map(lambda m, g: beta * m + (1 - beta) * g, ahead, now)
    directions = orthogonalize(momenta, state.ns_coeffs, consistent_rms)
    return directions, optax.contrib.MuonState(count, mu, state.ns_coeffs)

  matrices = optax.chain(
    optax.GradientTransformation(plain.init, update),
    optax.identity(),  # keeps the place of each state in the chain
    optax.add_decayed_weights(weight_decay),
    optax.scale_by_learning_rate(learning_rate),
  )
  rest = optax.adamw(learning_rate, weight_decay=adam_weight_decay, nesterov=True)
  return optax.partition({"muon": matrices, "adam": rest}, label)


def orthogonalize(kernels: Any, coefficients: Float32[Array, "3"], rms: float) -> Any:
  """Replaces each kernel of a tree by the nearest (semi-)orthogonal one, scaled to `rms`.

  A kernel (..., in, out) is a matrix with one column for each output. All matrices of about one
  size are stacked: zeros around a matrix change nothing.
  """
  leaves, treedef = jax.tree.flatten(kernels)
  groups: dict[tuple[int, ...], list[int]] = {}
  for i, leaf in enumerate(leaves):
    groups.setdefault(tuple(map(_round_up, _to_wide(leaf).shape)), []).append(i)
  results = list(leaves)
  for shape, members in groups.items():
    stacked = jnp.stack([_pad(_to_wide(leaves[i]), shape) for i in members])
    for i, found in zip(members, iterate(stacked, coefficients), strict=True):
      results[i] = rms * _from_wide(found, leaves[i].shape)
  return jax.tree.unflatten(treedef, results)


def _to_wide(kernel: Float32[Array, "..."]) -> Float32[Array, "rows columns"]:
  """The matrix of a kernel, or its transpose: with no more rows than columns."""
  matrix = kernel.reshape(-1, kernel.shape[-1])
  return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T


def _from_wide(matrix: Array, shape: tuple[int, ...]) -> Float32[Array, "..."]:
  """A kernel of `shape` from its wide matrix, padded at the end; its root mean square becomes 1."""
  columns = shape[-1]
  rows = math.prod(shape[:-1])
  if rows > columns:
    matrix = matrix.T
  return max(rows, columns) ** 0.5 * matrix[:rows, :columns].reshape(shape)


def iterate(
  x: Float32[Array, "k rows columns"], coefficients: Float32[Array, "3"], steps: int = 5
) -> Float32[Array, "k rows columns"]:
  """Newton-Schulz on a stack of wide matrices: singular values move to about 1.

  Source: Jordan et al. 2024 (kellerjordan.github.io/posts/muon).
  """
  x /= jnp.linalg.norm(x, axis=(1, 2), keepdims=True) + 1e-8
  a, b, c = coefficients
  for _ in range(steps):
    square = x @ x.mT
    x = a * x + (b * square + c * square @ square) @ x
  return x


def _round_up(size: int) -> int:
  return 1 << (size - 1).bit_length() if size <= SMALL else size


def _pad(matrix: Array, shape: tuple[int, ...]) -> Array:
  return jnp.pad(matrix, [(0, to - size) for size, to in zip(matrix.shape, shape, strict=True)])


def _is_axes_or_none(node: Any) -> bool:
  return node is None or isinstance(node, optax.contrib.MuonDimensionNumbers)


def get_matrices(params: Any) -> Any:
  """The axes of a kernel (height, width, in, out) that Muon takes as the rows of a matrix.

  None for leaves that are no matrix: depthwise kernels, biases and the parameters of norms.
  """
  whole = optax.contrib.MuonDimensionNumbers(reduction_axis=(0, 1, 2), output_axis=3)
  dense = optax.contrib.MuonDimensionNumbers(reduction_axis=0, output_axis=1)

  def get(leaf: jax.Array) -> Any:
    if leaf.ndim == 2:
      return dense
    return whole if leaf.ndim == 4 and leaf.shape[2] > 1 else None

  return jax.tree.map(get, params)
