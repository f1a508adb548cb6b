"""The building blocks of every network: units, the parallel sum, pooling.

A unit is conv -> norm -> ReLU -> dropout. All arrays are NHWC; convolutions have no bias.
"""

from collections.abc import Callable
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_cifar.errors import choose
from flax_cifar.models.dropout import Dropout
from flax_cifar.models.lowering import conv_general_dilated
from flax_cifar.models.norms import Norm

Initializer = nn.initializers.Initializer
UnitFactory = Callable[..., nn.Module]  # a unit's partial; called as unit(name=...)(x, train)

INITS: dict[str, Initializer] = {
  # torch.nn.Conv2d's default: uniform in +-1/sqrt(fan_in), a third of LeCun's variance.
  "torch": nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
  "flax": nn.initializers.lecun_normal(),
  # Keeps the variance through conv and ReLU, which deep networks without a norm need: He et al.
  # 2015 (arXiv:1502.01852).
  "he": nn.initializers.he_normal(),
}


def get_init(name: str) -> Initializer:
  """The kernel initialiser called `name`; a UserError if there is none."""
  return choose("model.init", name, INITS)


def pad_reflect(x: jax.Array, padding: int) -> jax.Array:
  """Pads height and width of NHWC `x` by `padding` pixels mirrored about the edge pixel."""
  widths = ((0, 0), (padding, padding), (padding, padding), (0, 0))
  return jnp.pad(x, widths, mode="reflect")


class ConvUnit(nn.Module):
  """conv -> norm -> ReLU -> dropout.

  Attributes:
    features: output channels.
    norm: a Norm.
    kernel_init: initialiser of the convolution.
    dropout_rate: probability of setting an activation to zero.
    kernel_size: side of the kernel in taps.
    padding: pixels added on every side.
    pad_mode: what they hold, "zeros" or the "reflect"ed image.
    dilation: distance of the kernel's taps in pixels.
  """

  features: int
  norm: Norm
  kernel_init: Initializer
  dropout_rate: float
  kernel_size: int = 3
  padding: int = 1
  pad_mode: Literal["zeros", "reflect"] = "zeros"
  dilation: int = 1

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    reflect = self.pad_mode == "reflect"
    x = nn.Conv(
      self.features,
      (self.kernel_size, self.kernel_size),
      padding=0 if reflect else self.padding,
      kernel_dilation=self.dilation,
      use_bias=False,
      kernel_init=self.kernel_init,
      name="conv",
    )(pad_reflect(x, self.padding) if reflect else x)
    return _finish_unit(self, x, train)


class DepthwiseSeparableUnit(nn.Module):
  """Depthwise 3x3 (one filter a channel) -> pointwise 1x1 -> norm -> ReLU -> dropout.

  Attributes as in ConvUnit. Source: Chollet 2017 (arXiv:1610.02357).
  """

  features: int
  norm: Norm
  kernel_init: Initializer
  dropout_rate: float

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    channels = x.shape[-1]
    x = nn.Conv(
      channels,
      (3, 3),
      padding=1,
      feature_group_count=channels,
      conv_general_dilated=conv_general_dilated,
      use_bias=False,
      kernel_init=self.kernel_init,
      name="depthwise",
    )(x)
    x = nn.Conv(
      self.features, (1, 1), use_bias=False, kernel_init=self.kernel_init, name="pointwise"
    )(x)
    return _finish_unit(self, x, train)


def _finish_unit(unit: ConvUnit | DepthwiseSeparableUnit, x: jax.Array, train: bool) -> jax.Array:
  """What follows the convolution in every unit."""
  x = nn.relu(unit.norm(name="norm")(x, train))
  return Dropout(unit.dropout_rate, name="dropout")(x, train)


class ParallelSum(nn.Module):
  """The sum of a plain and a dilated unit on the same input; their output shapes must agree."""

  plain: UnitFactory
  dilated: UnitFactory

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    return self.plain(name="plain")(x, train) + self.dilated(name="dilated")(x, train)


class MaxPool(nn.Module):
  """Maximum over windows of `window` x `window` pixels, side by side."""

  window: int

  def __call__(self, x: jax.Array) -> jax.Array:
    sides = (self.window, self.window)
    return nn.max_pool(x, sides, strides=sides)


class GlobalAveragePool(nn.Module):
  """Mean over height and width; (N, H, W, C) -> (N, 1, 1, C)."""

  def __call__(self, x: jax.Array) -> jax.Array:
    return x.mean((1, 2), keepdims=True)


class ConvHead(nn.Module):
  """Global average pool, then a 1x1 convolution to the classes; logits float32 (N, classes)."""

  num_classes: int
  kernel_init: Initializer

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = GlobalAveragePool(name="pool")(x)
    x = nn.Conv(
      self.num_classes, (1, 1), use_bias=False, kernel_init=self.kernel_init, name="conv"
    )(x)
    return x[:, 0, 0].astype(jnp.float32)
