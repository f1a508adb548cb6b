"""References for several tests: float64 NumPy operations, published totals, random weights."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from flax_cifar import models
from flax_cifar.configs import common

# The norm with which each network was published, and its parameters with that norm.
NORMS = {
  "dilated": "batch",
  "pyramid": "batch",
  "keras_base": "none",
  "keras_fcn": "batch",
  "five_convs": "batch",
  "ghost": "ghost",
  "skip": "batch",
  "skip_dilated": "batch",
  "sprint": "batch",
  "sprint_wide": "batch",
  "tiny50k": "batch",
  "tiny100k": "batch",
  "tiny200k": "batch",
  "tiny700k": "batch",
  "wide": "batch",
}
# Networks that differ from another one in numbers of channels and units alone.
SCALED = ("sprint_wide", "tiny100k", "tiny200k", "tiny700k")
DISTINCT = tuple(name for name in NORMS if name not in SCALED)
TOTALS = {
  "dilated": 192_672,
  "pyramid": 48_656,
  "keras_base": 1_172_410,
  "keras_fcn": 250_080,
  "five_convs": 436_480,
  "ghost": 657_146,
  "skip": 48_552,
  "skip_dilated": 167_424,
  "sprint": 569_656,
  "sprint_wide": 1_972_792,
  "tiny50k": 48_090,
  "tiny100k": 94_138,
  "tiny200k": 188_970,
  "tiny700k": 679_530,
  "wide": 569_632,
}


def convolve(x, kernel, *, padding=0, dilation=1, stride=1, mode="constant"):
  """Cross-correlation of NHWC and HWIO in float64; there are C / I groups of channels."""
  rows, columns = (padding, padding) if isinstance(padding, int) else padding
  x = np.pad(x.astype(np.float64), ((0, 0), (rows, rows), (columns, columns), (0, 0)), mode)
  height = x.shape[1] - (kernel.shape[0] - 1) * dilation
  width = x.shape[2] - (kernel.shape[1] - 1) * dilation
  groups = x.shape[3] // kernel.shape[2]
  outputs = []
  for part, weights in zip(
    np.split(x, groups, -1), np.split(kernel.astype(np.float64), groups, -1), strict=True
  ):
    y = 0.0
    for i, j in np.ndindex(kernel.shape[:2]):
      tap = part[:, i * dilation : i * dilation + height, j * dilation : j * dilation + width]
      y = y + (tap * weights[i, j, 0] if len(weights[i, j]) == 1 else tap @ weights[i, j])
    outputs.append(y)
  return np.concatenate(outputs, -1)[:, ::stride, ::stride]


def normalize(x, params, stats, *, epsilon=1e-5):
  x = (x - stats["mean"]) / np.sqrt(stats["var"].astype(np.float64) + epsilon)
  return x * params["scale"] + params["bias"]


def norm_and_relu(x, params, stats):
  return np.maximum(normalize(x, params, stats), 0)


def create_model(
  name,
  *,
  norm="batch",
  num_classes=10,
  dropout_rate=0.05,
  dtype="float32",
  residual=None,
  **norm_changes,
):
  return models.create_model(
    name=name,
    num_classes=num_classes,
    norm=norm,
    norm_arguments={norm: common.get_config().norm[norm].to_dict() | norm_changes},
    dropout_rate=dropout_rate,
    init="torch",
    residual=common.get_config().model.residual.to_dict() | (residual or {}),
    dtype=dtype,
  )


def get_variable_shapes(model):
  images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
  return jax.eval_shape(partial(model.init, train=False), jax.random.key(0), images)


def count_parameters(model):
  return sum(leaf.size for leaf in jax.tree.leaves(get_variable_shapes(model)["params"]))


def draw_variables(model):
  """Variables for images (N, 32, 32, 3)."""
  return draw_like(get_variable_shapes(model))


def draw_like(variables):
  """Random values of the size that keeps activations near one, as NumPy arrays."""
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    name, shape = path[-1].key, leaf.shape
    if name in ("kernel", "fixed_kernel"):
      value = rng.normal(0, np.prod(shape[:-1]) ** -0.5, shape)
    elif name in ("scale", "var"):
      value = rng.uniform(0.5, 1.5, shape)
    else:
      value = rng.normal(0, 0.3, shape)
    return value.astype(np.float32)

  return jax.tree_util.tree_map_with_path(draw, variables)
