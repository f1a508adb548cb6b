"""The building blocks of every network: units, the parallel sum, pooling.

A unit is conv -> norm -> ReLU -> dropout, in some networks conv -> ReLU -> norm -> dropout. All
arrays are NHWC. `dtype` is what convolutions compute in; parameters are float32, and so are the
statistics of the norms and the logits.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_cifar.errors import choose
from flax_cifar.models.dropout import Dropout
from flax_cifar.models.lowering import conv_general_dilated, max_pool, pad_reflect
from flax_cifar.models.norms import Norm

Initializer = nn.initializers.Initializer
DType = jax.typing.DTypeLike
Order = Literal["conv_norm_relu", "conv_relu_norm"]
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


def get_bias_init(kernel_init: Initializer, fan_in: int) -> Initializer:
  """The bias initialiser that goes with `kernel_init`: zeros, but torch's is uniform too."""
  if kernel_init is not INITS["torch"]:
    return nn.initializers.zeros
  bound = fan_in**-0.5
  return partial(jax.random.uniform, minval=-bound, maxval=bound)


class ConvUnit(nn.Module):
  """conv -> norm -> ReLU -> dropout, or conv -> ReLU -> norm -> dropout.

  Attributes:
    features: output channels.
    norm: a Norm.
    kernel_init: initialiser of the convolution; get_bias_init has that of the bias.
    dropout_rate: probability of setting an activation to zero.
    dtype: what the convolution computes in and the unit returns.
    kernel_size: sides of the kernel in taps, (height, width) or both.
    padding: pixels added on every side, whatever the kernel's sides.
    pad_mode: what they hold, "zeros" or the "reflect"ed image.
    dilation: distance of the kernel's taps in pixels.
    order: of conv, norm and ReLU.
    use_bias: whether the convolution adds a bias.
  """

  features: int
  norm: Norm
  kernel_init: Initializer
  dropout_rate: float
  dtype: DType
  kernel_size: int | tuple[int, int] = 3
  padding: int = 1
  pad_mode: Literal["zeros", "reflect"] = "zeros"
  dilation: int = 1
  order: Order = "conv_norm_relu"
  use_bias: bool = False

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    reflect = self.pad_mode == "reflect"
    size = self.kernel_size
    sides = (size, size) if isinstance(size, int) else size
    x = nn.Conv(
      self.features,
      sides,
      padding=0 if reflect else self.padding,
      kernel_dilation=self.dilation,
      use_bias=self.use_bias,
      kernel_init=self.kernel_init,
      bias_init=get_bias_init(self.kernel_init, math.prod(sides) * x.shape[-1]),
      dtype=self.dtype,
      conv_general_dilated=conv_general_dilated,
      name="conv",
    )(pad_reflect(x, self.padding) if reflect else x)
    return _finish_unit(x, train, self.norm, self.order, self.dropout_rate)


class DepthwiseSeparableUnit(nn.Module):
  """Depthwise 3x3 (one filter a channel) -> pointwise 1x1 -> norm -> ReLU -> dropout.

  Attributes as in ConvUnit. Source: Chollet 2017 (arXiv:1610.02357).
  """

  features: int
  norm: Norm
  kernel_init: Initializer
  dropout_rate: float
  dtype: DType

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    channels = x.shape[-1]
    conv = partial(
      nn.Conv,
      use_bias=False,
      kernel_init=self.kernel_init,
      dtype=self.dtype,
      conv_general_dilated=conv_general_dilated,
    )
    x = conv(
      channels,
      (3, 3),
      padding=1,
      feature_group_count=channels,
      name="depthwise",
    )(x)
    x = conv(self.features, (1, 1), name="pointwise")(x)
    return _finish_unit(x, train, self.norm, "conv_norm_relu", self.dropout_rate)


def _finish_unit(
  x: jax.Array, train: bool, norm: Norm, order: Order, dropout_rate: float
) -> jax.Array:
  """What follows the convolution in every unit; called from inside the unit."""
  norm_first = order == "conv_norm_relu"
  x = norm(name="norm")(x if norm_first else nn.relu(x), train)
  return Dropout(dropout_rate, relu=norm_first, name="dropout")(x, train)


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
    return max_pool(x, self.window)


class GlobalAveragePool(nn.Module):
  """Mean over height and width; (N, H, W, C) -> (N, 1, 1, C)."""

  def __call__(self, x: jax.Array) -> jax.Array:
    return x.mean((1, 2), keepdims=True)


class ConvHead(nn.Module):
  """Global average pool, then a 1x1 convolution to the classes, in float32; (N, classes) logits.

  Attributes:
    num_classes: how many logits.
    kernel_init: initialiser of the convolution; get_bias_init has that of the bias.
    use_bias: whether the convolution adds a bias.
  """

  num_classes: int
  kernel_init: Initializer
  use_bias: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    if x.dtype == jnp.bfloat16:
      # JAX 0.12 on CPUs fuses a sum of bfloat16 units with the mean of it, and returns NaN.
      x = jax.lax.optimization_barrier(x)
    x = GlobalAveragePool(name="pool")(x.astype(jnp.float32))
    x = nn.Conv(
      self.num_classes,
      (1, 1),
      use_bias=self.use_bias,
      kernel_init=self.kernel_init,
      bias_init=get_bias_init(self.kernel_init, x.shape[-1]),
      name="conv",
    )(x)
    return x[:, 0, 0]
