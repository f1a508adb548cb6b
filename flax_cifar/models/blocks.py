"""The building blocks of every network, and what all networks share.

A unit is conv -> norm -> ReLU -> dropout, in some networks conv -> ReLU -> norm -> dropout. All
arrays are NHWC. `dtype` is what convolutions compute in; parameters are float32, and so are the
statistics of the norms and the logits.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from flax_cifar.errors import UserError, choose
from flax_cifar.models.dropout import Dropout
from flax_cifar.models.lowering import Conv, max_pool, pad_reflect, relu
from flax_cifar.models.norms import Norm

Initializer = nn.initializers.Initializer
DType = jax.typing.DTypeLike
Order = Literal["conv_norm_relu", "conv_relu_norm"]
UnitFactory = Callable[..., nn.Module]  # a unit's partial; called as unit(name=...)(x, train)

INITS: dict[str, Initializer] = {
  # torch.nn.Conv2d's default: uniform in +-1/sqrt(fan_in), a third of LeCun's variance.
  "torch": nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
  "flax": nn.initializers.lecun_normal(),
  "keras": nn.initializers.glorot_uniform(),
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


class Unit(nn.Module):
  """What every unit shares: a convolution, which subclasses define, then norm, ReLU and dropout.

  Attributes:
    features: output channels.
    norm: a Norm.
    kernel_init: initialiser of the kernels; get_bias_init has that of the bias.
    dropout_rate: probability of setting an activation to zero.
    dtype: what the convolution computes in and the unit returns.
    order: of conv, norm and ReLU.
    use_bias: whether the convolution adds a bias.
  """

  features: int
  norm: Norm
  kernel_init: Initializer
  dropout_rate: float
  dtype: DType
  order: Order = "conv_norm_relu"
  use_bias: bool = False

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    x = _check_map(self.convolve(x), self.name)
    norm_first = self.order == "conv_norm_relu"
    x = self.norm(relu=norm_first, name="norm")(x if norm_first else relu(x), train)
    return Dropout(self.dropout_rate, name="dropout")(x, train)

  def convolve(self, x: jax.Array) -> jax.Array:
    """(N, H, W, C) -> (N, H', W', features)."""
    raise NotImplementedError

  def create_conv(self, features: int, sides: tuple[int, int], fan_in: int, **options: Any) -> Conv:
    """A convolution with the unit's initialisers and dtype; `fan_in` is what an output reads."""
    return Conv(
      features,
      sides,
      kernel_init=self.kernel_init,
      bias_init=get_bias_init(self.kernel_init, fan_in),
      dtype=self.dtype,
      **options,
    )


class ConvUnit(Unit):
  """One convolution, which may be dilated, strided, grouped or padded by reflection.

  Attributes:
    kernel_size: sides of the kernel in taps, (height, width) or both.
    padding: pixels added on every side, whatever the kernel's sides.
    pad_mode: what they hold, "zeros" or the "reflect"ed image.
    dilation: distance of the kernel's taps in pixels.
    stride: distance of the outputs in pixels.
    groups: of channels that do not see each other; as many as channels is depthwise.
  """

  kernel_size: int | tuple[int, int] = 3
  padding: int = 1
  pad_mode: Literal["zeros", "reflect"] = "zeros"
  dilation: int = 1
  stride: int = 1
  groups: int = 1

  def convolve(self, x: jax.Array) -> jax.Array:
    reflect = self.pad_mode == "reflect"
    size = self.kernel_size
    sides = (size, size) if isinstance(size, int) else size
    return self.create_conv(
      self.features,
      sides,
      fan_in=math.prod(sides) * x.shape[-1] // self.groups,
      padding=0 if reflect else self.padding,
      kernel_dilation=self.dilation,
      strides=self.stride,
      feature_group_count=self.groups,
      use_bias=self.use_bias,
      name="conv",
    )(pad_reflect(x, self.padding) if reflect else x)


class DepthwiseSeparableUnit(Unit):
  """Depthwise 3x3 (one filter a channel), then pointwise 1x1; a bias after the second only.

  Source: Chollet 2017 (arXiv:1610.02357).
  """

  def convolve(self, x: jax.Array) -> jax.Array:
    channels = x.shape[-1]
    x = self.create_conv(
      channels,
      (3, 3),
      fan_in=9,
      padding=1,
      feature_group_count=channels,
      use_bias=False,
      name="depthwise",
    )(x)
    return self.create_conv(
      self.features, (1, 1), fan_in=channels, use_bias=self.use_bias, name="pointwise"
    )(x)


class SpatiallySeparableUnit(Unit):
  """3x1, then 1x3, with nothing between them; a bias after the second only.

  Source: Szegedy et al. 2016 (arXiv:1512.00567).
  """

  def convolve(self, x: jax.Array) -> jax.Array:
    x = self.create_conv(
      self.features, (3, 1), fan_in=3 * x.shape[-1], use_bias=False, name="vertical"
    )(x)
    return self.create_conv(
      self.features, (1, 3), fan_in=3 * self.features, use_bias=self.use_bias, name="horizontal"
    )(x)


class GroupedUnit(Unit):
  """A grouped convolution whose groups differ in kernel size and dilation.

  Group i reads the i-th part of the channels. The outputs are interleaved, so that each group of
  the next layer reads from all groups of this one. Sources: Tan and Le 2019 (arXiv:1907.09595) for
  the kernels, Zhang et al. 2018 (arXiv:1707.01083) for the interleaving.

  Attributes:
    kernel_sizes: sides of each group's square kernels in taps.
    dilations: of each group, in pixels; the map keeps its size.
  """

  kernel_sizes: tuple[int, ...] = (3, 3)
  dilations: tuple[int, ...] = (1, 1)

  def convolve(self, x: jax.Array) -> jax.Array:
    groups, channels = len(self.kernel_sizes), x.shape[-1]
    if channels % groups or self.features % groups:
      raise ValueError(f"{groups} groups cannot share {channels} -> {self.features} channels")
    outputs = []
    for number, (size, dilation) in enumerate(
      zip(self.kernel_sizes, self.dilations, strict=True), start=1
    ):
      conv = self.create_conv(
        self.features // groups,
        (size, size),
        fan_in=size**2 * channels // groups,
        kernel_dilation=dilation,
        use_bias=self.use_bias,
        name=f"group{number}",
      )
      outputs.append(conv(jnp.split(x, groups, axis=-1)[number - 1]))
    return jnp.stack(outputs, axis=-1).reshape(*outputs[0].shape[:-1], self.features)


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
    return max_pool(_check_map(x, self.name, at_least=self.window), self.window)


def _check_map(x: jax.Array, layer: str | None, *, at_least: int = 1) -> jax.Array:
  """`x`, (N, H, W, C), unless the layers before have used the image up."""
  height, width = x.shape[1:3]
  if min(height, width) < at_least:
    raise UserError(
      f"data.image_size is too small for this network: layer {layer!r} has {height}x{width} pixels "
      f"left and needs {at_least}; take larger images or another model.name."
    )
  return x


class Transition(nn.Module):
  """A bare 1x1 convolution to `features` channels, then a max pool by 2 unless `pool` is False."""

  features: int
  kernel_init: Initializer
  dtype: DType
  pool: bool = True

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = Conv(
      self.features,
      (1, 1),
      use_bias=False,
      kernel_init=self.kernel_init,
      dtype=self.dtype,
      name="conv",
    )(x)
    return MaxPool(2, name="pool")(x) if self.pool else x


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


class Network(nn.Module):
  """What every network takes: images float (N, H, W, 3) and `train` -> logits float32 (N, classes).

  Attributes:
    num_classes: how many logits.
    norm: of the units; a Norm.
    dropout_rate: of the units.
    kernel_init: initialiser of every kernel; get_bias_init has that of the biases.
    dtype: what convolutions compute in.
  """

  num_classes: int
  norm: Norm
  dropout_rate: float
  kernel_init: Initializer
  dtype: DType

  def get_unit(self, kind: Callable[..., Unit], **options: Any) -> UnitFactory:
    """`kind` with the network's norm, dropout, initialiser and dtype, and with `options`."""
    shared = {
      "norm": self.norm,
      "dropout_rate": self.dropout_rate,
      "kernel_init": self.kernel_init,
      "dtype": self.dtype,
    }
    return partial(kind, **(shared | options))

  def get_transition(self, **options: Any) -> Callable[..., Transition]:
    """Transition with the network's initialiser and dtype."""
    return partial(Transition, kernel_init=self.kernel_init, dtype=self.dtype, **options)

  def get_head(self, *, use_bias: bool = False) -> ConvHead:
    """The module `head` of the network."""
    return ConvHead(self.num_classes, self.kernel_init, use_bias=use_bias, name="head")
