"""The building blocks of every network, and the base class that all networks share.

A unit is conv -> norm -> ReLU -> dropout; in some networks it is conv -> ReLU -> norm -> dropout.
All arrays are NHWC. Convolutions compute in `dtype`. Parameters, the statistics of the norms and
the logits are float32.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from flax_cifar import errors
from flax_cifar.kernels import backend, norm_relu, pooling
from flax_cifar.kernels import conv as conv_lib
from flax_cifar.kernels import moments as moments_lib
from flax_cifar.kernels import padding as padding_lib
from flax_cifar.kernels.native import dense, separable
from flax_cifar.kernels.native import finish as finish_lib
from flax_cifar.kernels.native import pooling as native_pooling
from flax_cifar.models import dropout, norms

FIXED_KERNEL = "fixed_kernel"  # see optim.trainable_mask
WHITENING_EPSILON = 5e-4  # of the variances of normalized pixels; arXiv:2404.00498 has it
Initializer = nn.initializers.Initializer
DType = jax.typing.DTypeLike
Order = Literal["conv_norm_relu", "conv_relu_norm"]
UnitFactory = Callable[..., nn.Module]  # a partial of a unit; called as unit(name=...)(x, train)

# Attributes of nn.Conv that Conv does not use.
IGNORED = (
  *("input_dilation", "mask", "param_dtype", "precision", "preferred_element_type"),
  *("promote_dtype", "conv_general_dilated", "conv_general_dilated_cls"),
)
INITS: dict[str, Initializer] = {
  # torch.nn.Conv2d's default: uniform in +-1/sqrt(fan_in), a third of LeCun's variance.
  "torch": nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
  "flax": nn.initializers.lecun_normal(),
  "keras": nn.initializers.glorot_uniform(),
  # Keeps the variance through conv and ReLU, which deep networks without a norm need: He et al.
  # 2015 (arXiv:1502.01852).
  "he": nn.initializers.he_normal(),
}


def get_bias_init(kernel_init: Initializer, fan_in: int) -> Initializer:
  """Returns the bias initializer that goes with `kernel_init`: zeros, or torch's uniform one."""
  if kernel_init is not INITS["torch"]:
    return nn.initializers.zeros
  bound = fan_in**-0.5
  return partial(jax.random.uniform, minval=-bound, maxval=bound)


class Conv(nn.Conv):
  """nn.Conv in two dimensions, computed by the kernels of `backend.select_backend`.

  The convolution adds the bias, because oneDNN computes its gradient along with the kernel's.

  Raises:
    ValueError: an attribute of nn.Conv is set that has no effect here.
  """

  @nn.compact
  def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 {self.features}"]:
    self._refuse_ignored()
    in_channels = x.shape[-1] // self.feature_group_count
    kernel_shape = (*get_pair(self.kernel_size), in_channels, self.features)
    kernel = self.create_kernel(x, kernel_shape)
    bias = self.param("bias", self.bias_init, (self.features,)) if self.use_bias else None
    x, kernel = nn.dtypes.promote_dtype(x, kernel, dtype=self.dtype)
    padding = self.padding
    return conv_lib.conv_general_dilated(
      x,
      kernel,
      get_pair(self.strides),
      [(padding, padding)] * 2 if isinstance(padding, int) else padding,
      rhs_dilation=get_pair(self.kernel_dilation),
      feature_group_count=self.feature_group_count,
      bias=bias,
    )

  def create_kernel(self, x: Array, shape: tuple[int, ...]) -> Array | np.ndarray:
    """Creates the kernel for the input `x`."""
    del x
    return self.param("kernel", self.kernel_init, shape)

  def _refuse_ignored(self) -> None:
    for field in dataclasses.fields(nn.Conv):
      value = getattr(self, field.name)
      if field.name in IGNORED and value is not field.default:
        raise ValueError(f"{field.name}={value!r} has no effect on a Conv of this module")


class Whitening(Conv):
  """A convolution that decorrelates the values of a patch of pixels; training keeps its kernel.

  Half of the outputs are the principal components of the patches, each with variance 1; the other
  half are their negatives, so that a ReLU after them loses nothing. The kernel is computed from the
  images with which the network is initialized. Source: Page 2019 ("How to train your ResNet 8"),
  with the negatives of Jordan 2024 (arXiv:2404.00498).

  Raises:
    ValueError: there are not two outputs for each value of a patch.
  """

  def create_kernel(self, x: Array, shape: tuple[int, ...]) -> Array:
    """Creates the kernel from the images `x`."""
    if shape[-1] != 2 * math.prod(shape[:-1]):
      raise ValueError(f"whitening needs two outputs for each value of a patch, not {shape}")
    kernel = self.param(FIXED_KERNEL, lambda key: compute_whitening(x, shape[:2]))
    return jax.lax.stop_gradient(kernel)


def compute_whitening(
  images: Float[Array, "n h w c"], sides: tuple[int, ...]
) -> Float32[Array, "kh kw c o"]:
  """Computes the kernel of `Whitening` from the patches of `images`.

  Args:
    images: whose mean is near 0.
    sides: of a patch, in pixels.
  """
  height, width = (size - side + 1 for size, side in zip(images.shape[1:3], sides, strict=True))
  shifted = [images[:, i:, j:] for i in range(sides[0]) for j in range(sides[1])]
  patches = jnp.concatenate([x[:, :height, :width] for x in shifted], -1).astype(jnp.float32)
  patches = patches.reshape(-1, patches.shape[-1])
  variances, components = jnp.linalg.eigh(patches.T @ patches / len(patches))
  kernel = components / jnp.sqrt(variances + WHITENING_EPSILON)
  return jnp.concatenate([kernel, -kernel], -1).reshape(*sides, images.shape[-1], -1)


def get_pair(value: int | Sequence[int] | None) -> tuple[int, int]:
  """Returns (height, width) of an attribute of nn.Conv: one number is both, None is 1."""
  if value is None or isinstance(value, int):
    return value or 1, value or 1
  height, width = value
  return height, width


class Unit(nn.Module):
  """The base class of units: a convolution, which subclasses define, then norm, ReLU and dropout.

  Attributes:
    features: output channels.
    norm: a Norm.
    kernel_init: initializer of the kernels; `get_bias_init` gives that of the bias.
    dropout_rate: probability of setting an activation to zero.
    dtype: in which the convolution computes, and of the unit's output.
    order: of conv, norm and ReLU.
    use_bias: whether the convolution adds a bias.
  """

  features: int
  norm: norms.Norm
  kernel_init: Initializer
  dropout_rate: float
  dtype: DType
  order: Order = "conv_norm_relu"
  use_bias: bool = False

  @nn.compact
  def __call__(
    self, x: Float[Array, "n h w c"], train: bool
  ) -> Float[Array, "n h2 w2 {self.features}"]:
    # Two paths give the same result. At initialization the submodules run, because they create the
    # parameters; then C++ may run instead, which reads these by the names of the submodules.
    possible = not self.is_initializing() and norms.has_affine(self.norm)
    if possible and backend.uses_native(jnp.dtype(self.dtype)) and self.fits_native(x):
      return self.compute_natively(x.astype(self.dtype), train)
    return self.compute_by_modules(x, train)

  def fits_native(self, x: Float[Array, "n h w c"]) -> bool:
    """Whether the unit is one that the kernels in C++ compute."""
    del x
    return False

  def compute_natively(self, x: Float[Array, "n h w c"], train: bool) -> Array:
    """Computes the unit by kernels in C++, where `fits_native` says that they can."""
    raise NotImplementedError

  def compute_by_modules(self, x: Float[Array, "n h w c"], train: bool) -> Array:
    """Computes the unit by modules of its own."""
    x = check_map(self.convolve(x), self.name)
    x = self.create_norm()(x if self._norm_first else norm_relu.relu(x), train)
    return dropout.Dropout(self.dropout_rate, name="dropout")(x, train)

  @property
  def _norm_first(self) -> bool:
    return self.order == "conv_norm_relu"

  @property
  def _last_activation(self) -> str:
    return "relu" if self._norm_first else "none"

  def create_norm(self) -> nn.Module:
    """Creates the norm after the convolution, called `norm`, with the ReLU if that follows."""
    return self.norm(relu=self._norm_first, name="norm")

  def finish(
    self, x: Array, affine: moments_lib.Affine, train: bool, shortcut: Array | None = None
  ) -> Array:
    """Normalizes `x` and applies dropout and what follows the norm; adds `shortcut`."""
    mask = dropout.Dropout(self.dropout_rate, name="dropout").get_mask(train)
    return finish_lib.finish(x, affine, shortcut, mask, activation=self._last_activation)

  def convolve(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 {self.features}"]:
    """Applies the unit's convolution."""
    raise NotImplementedError

  def create_conv(self, features: int, sides: tuple[int, int], fan_in: int, **options: Any) -> Conv:
    """Creates a convolution with the unit's initializers and dtype.

    `fan_in` is the number of input values that one output value reads.
    """
    return Conv(
      features,
      sides,
      kernel_init=self.kernel_init,
      bias_init=get_bias_init(self.kernel_init, fan_in),
      dtype=self.dtype,
      **options,
    )

  def create_depthwise(self, channels: int, *, stride: int = 1) -> Conv:
    """Creates a depthwise 3x3 convolution without a bias, called `depthwise`."""
    return self.create_conv(
      channels,
      (3, 3),
      fan_in=9,
      padding=1,
      strides=stride,
      feature_group_count=channels,
      use_bias=False,
      name="depthwise",
    )


class ConvUnit(Unit):
  """One convolution, which may be dilated, strided, grouped or padded by reflection.

  Attributes:
    kernel_size: sides of the kernel in taps, (height, width) or both.
    padding: pixels added on every side, whatever the kernel's sides.
    pad_mode: content of the padding, "zeros" or the "reflect"ed image.
    dilation: distance of the kernel's taps in pixels.
    stride: distance of the outputs in pixels.
    groups: of channels that do not see each other; one group per channel is depthwise.
  """

  kernel_size: int | tuple[int, int] = 3
  padding: int = 1
  pad_mode: Literal["zeros", "reflect"] = "zeros"
  dilation: int = 1
  stride: int = 1
  groups: int = 1

  def fits_native(self, x: Float[Array, "n h w c"]) -> bool:
    """Whether the convolution has stride 1 and no groups, and no other kernel is faster."""
    sides, dtype = get_pair(self.kernel_size), jnp.dtype(self.dtype)
    fits = conv_lib.fits_native(x.shape, sides, self._get_window(), dtype)
    return fits and self.stride == self.groups == 1

  def compute_natively(self, x: Float[Array, "n h w c"], train: bool) -> Array:
    """Computes the unit by kernels in C++; a norm that is the same for all images joins them."""
    params, window, norm = self.variables["params"]["conv"], self._get_window(), self.create_norm()
    kernel, bias = params["kernel"], params.get("bias", jnp.zeros(self.features))
    affine = norm.get_fixed_affine(self.features, train)
    drops = train and self.dropout_rate
    if affine and not drops and (self._norm_first or norms.is_identity(self.norm)):
      (center,), (slope,), (shift,) = affine
      joined = kernel * slope, (bias - center) * slope + shift
      return check_map(dense.convolve(x, *joined, window, relu=True), self.name)
    y, moments = dense.convolve_and_measure(x, kernel, bias, window, relu=not self._norm_first)
    affine = affine or norm.get_affine(moments, train)
    return self.finish(check_map(y, self.name), affine, train)

  def _get_window(self) -> dense.Window:
    pad = self.padding
    return dense.Window(pad, pad, pad, pad, self.pad_mode == "reflect", self.dilation)

  def convolve(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 {self.features}"]:
    reflect = self.pad_mode == "reflect"
    sides = get_pair(self.kernel_size)
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
    )(padding_lib.pad_reflect(x, self.padding) if reflect else x)


class PooledConvUnit(ConvUnit):
  """A convolution, a 2x2 max pool, then norm, ReLU and dropout."""

  def convolve(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 {self.features}"]:
    return MaxPool(2, name="pool")(super().convolve(x))

  def compute_natively(self, x: Float[Array, "n h w c"], train: bool) -> Array:
    """Computes the unit by kernels in C++."""
    params = self.variables["params"]["conv"]
    operands = x, params["kernel"], params.get("bias"), self._get_window()
    y = check_map(dense.convolve(*operands, relu=not self._norm_first), self.name, at_least=2)
    y, moments = native_pooling.max_pool_and_measure(y, 2)
    return self.finish(y, self.create_norm().get_affine(moments, train), train)


class DepthwiseSeparableUnit(Unit):
  """Depthwise 3x3 (one filter per channel), then pointwise 1x1; only the second has a bias.

  Source: Chollet 2017 (arXiv:1610.02357).
  """

  def fits_native(self, x: Float[Array, "n h w c"]) -> bool:
    """Whether the norm comes before ReLU, there is no bias, and the channels fit."""
    fits = separable.can_compute(x.shape[-1], self.features)
    return fits and self._norm_first and not self.use_bias

  def compute_natively(self, x: Float[Array, "n h w c"], train: bool) -> Array:
    """Computes the unit by kernels in C++."""
    params, identity = self.variables["params"], moments_lib.get_identity(x.shape[-1])
    y, _, _ = separable.convolve_depthwise(x, params["depthwise"]["kernel"], 1)
    y, moments = separable.convolve_pointwise(y, identity, params["pointwise"]["kernel"])
    return self.finish(y, self.create_norm().get_affine(moments, train), train)

  def convolve(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 {self.features}"]:
    channels = x.shape[-1]
    x = self.create_depthwise(channels)(x)
    return self.create_conv(
      self.features, (1, 1), fan_in=channels, use_bias=self.use_bias, name="pointwise"
    )(x)


# One half of the channels times the sigmoid of the other: gated linear units, Dauphin et al. 2016
# (arXiv:1612.08083).
GATE = "glu"
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
  "relu": norm_relu.relu,
  "gelu": nn.gelu,  # its approximation by tanh
  "silu": nn.silu,
  GATE: nn.glu,
}


class SqueezeExcite(nn.Module):
  """Computes a factor in (0, 1) for each channel of each image from the means of its channels.

  Source: Hu et al. 2018 (arXiv:1709.01507).

  Attributes:
    hidden: channels between the two layers.
    kernel_init: initializer of both kernels.
  """

  hidden: int
  kernel_init: Initializer

  @nn.compact
  def __call__(self, means: Float[Array, "n 1 1 c"]) -> Float32[Array, "n 1 1 c"]:
    channels = means.shape[-1]
    conv = partial(Conv, kernel_size=(1, 1), kernel_init=self.kernel_init, dtype=jnp.float32)
    bias = partial(get_bias_init, self.kernel_init)
    x = conv(self.hidden, bias_init=bias(channels), name="squeeze")(means)
    return nn.sigmoid(conv(channels, bias_init=bias(self.hidden), name="excite")(norm_relu.relu(x)))


class ResidualSeparableUnit(Unit):
  """Depthwise 3x3, norm, pointwise 1x1, norm, ReLU and dropout, plus the unit's input.

  The input is left out where the unit changes its shape, by a stride or the number of channels.
  Source: Howard et al. 2017 (arXiv:1704.04861), without ReLU after the depthwise convolution, as
  Chollet 2017 (arXiv:1610.02357) recommends, and with the identity path of He et al. 2015
  (arXiv:1512.03385).

  Attributes:
    stride: of the depthwise convolution, in pixels.
    activation: a key of ACTIVATIONS, in place of the ReLU. For "glu" the pointwise convolution has
      twice the features.
    squeeze_excite: hidden channels of SqueezeExcite, whose factors multiply the result of the first
      norm, as a fraction of its channels; 0 leaves it out.
    drop_path: probability that training leaves an image with the unit's input alone, where that is
      added (stochastic depth, Huang et al. 2016, arXiv:1603.09382).

  Raises:
    ValueError: `use_bias` is set, or `order` is not the default; they would have no effect.
  """

  stride: int = 1
  activation: str = "relu"
  squeeze_excite: float = 0.0
  drop_path: float = 0.0

  def fits_native(self, x: Float[Array, "n h w c"]) -> bool:
    """Whether the norm comes before ReLU and the channels fit."""
    return self._norm_first and separable.can_compute(x.shape[-1], self._get_pointwise_features())

  def compute_natively(self, x: Float[Array, "n h w c"], train: bool) -> Array:
    """Computes the unit by kernels in C++."""
    params = self.variables["params"]
    y, moments, x = separable.convolve_depthwise(x, params["depthwise"]["kernel"], self.stride)
    affine = self.norm(relu=False, name="depthwise_norm").get_affine(moments, train)
    if self.squeeze_excite:
      center, slope, bias = affine  # a factor of the result is one of slope and bias
      means = (moments.mean - center) * slope + bias
      factors = self._create_squeeze_excite(x.shape[-1])(means[:, None, None])[:, 0, 0]
      affine = moments_lib.Affine(center, slope * factors, bias * factors)
    y, moments = separable.convolve_pointwise(y, affine, params["pointwise"]["kernel"])
    affine = self.create_norm().get_affine(moments, train)
    if self._last_activation != "none" and not self.drop_path:
      return self.finish(y, affine, train, x if self._keeps_shape(x) else None)
    y = finish_lib.finish(y, affine, None, None, activation=self._last_activation)
    y = nn.glu(y) if self.activation == GATE else y
    return self._drop_and_add(y, x, train)

  def compute_by_modules(self, x: Float[Array, "n h w c"], train: bool) -> Array:
    """Computes the unit by modules of its own."""
    if self.use_bias or not self._norm_first:
      raise ValueError("a residual unit has no bias, and its norm comes before the activation")
    channels = x.shape[-1]
    y = self.create_depthwise(channels, stride=self.stride)(x)
    y = self.norm(relu=False, name="depthwise_norm")(y, train)
    if self.squeeze_excite:
      means = GlobalAveragePool()(y.astype(jnp.float32))
      factors = self._create_squeeze_excite(channels)(means)
      y = y * factors.astype(y.dtype)
    features = self._get_pointwise_features()
    y = self.create_conv(features, (1, 1), fan_in=channels, use_bias=False, name="pointwise")(y)
    has_relu = self.activation == "relu"
    y = self.norm(relu=has_relu, name="norm")(y, train)
    return self._drop_and_add(y if has_relu else ACTIVATIONS[self.activation](y), x, train)

  def _create_squeeze_excite(self, channels: int) -> SqueezeExcite:
    hidden = max(1, round(self.squeeze_excite * channels))
    return SqueezeExcite(hidden, self.kernel_init, name="squeeze_excite")

  def _get_pointwise_features(self) -> int:
    return self.features * (2 if self.activation == GATE else 1)

  @property
  def _last_activation(self) -> str:
    return "none" if self.activation == GATE else self.activation

  def _drop_and_add(self, y: Array, x: Array, train: bool) -> Array:
    """Ends the unit with input `x` after its activation `y`."""
    y = dropout.Dropout(self.dropout_rate, name="dropout")(y, train)
    if not self._keeps_shape(x):
      return y
    leave_out = nn.Dropout(self.drop_path, broadcast_dims=(1, 2, 3), name="drop_path")
    # In bfloat16 it would divide by a rounded share.
    y = leave_out(y.astype(jnp.float32), deterministic=not train).astype(y.dtype)
    return x + y

  def _keeps_shape(self, x: Array) -> bool:
    return self.stride == 1 and x.shape[-1] == self.features


class SpatiallySeparableUnit(Unit):
  """3x1, then 1x3, with nothing between them; only the second has a bias.

  Source: Szegedy et al. 2016 (arXiv:1512.00567).
  """

  def convolve(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 {self.features}"]:
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
    kernel_sizes: side of each group's square kernels in taps.
    dilations: of each group, in pixels; the feature map keeps its size.

  Raises:
    ValueError: the number of groups does not divide the input or the output channels.
  """

  kernel_sizes: tuple[int, ...] = (3, 3)
  dilations: tuple[int, ...] = (1, 1)

  def convolve(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 {self.features}"]:
    groups, channels = len(self.kernel_sizes), x.shape[-1]
    if channels % groups or self.features % groups:
      raise ValueError(f"{groups} groups cannot share {channels} -> {self.features} channels")
    parts = jnp.split(x, groups, axis=-1)
    outputs = []
    for number, (part, size, dilation) in enumerate(
      zip(parts, self.kernel_sizes, self.dilations, strict=True), start=1
    ):
      conv = self.create_conv(
        self.features // groups,
        (size, size),
        fan_in=size**2 * channels // groups,
        kernel_dilation=dilation,
        use_bias=self.use_bias,
        name=f"group{number}",
      )
      outputs.append(conv(part))
    return jnp.stack(outputs, axis=-1).reshape(*outputs[0].shape[:-1], self.features)


class ParallelSum(nn.Module):
  """The sum of a plain and a dilated unit on the same input; their output shapes must agree."""

  plain: UnitFactory
  dilated: UnitFactory

  @nn.compact
  def __call__(self, x: Float[Array, "n h w c"], train: bool) -> Float[Array, "n h2 w2 features"]:
    return self.plain(name="plain")(x, train) + self.dilated(name="dilated")(x, train)


class MaxPool(nn.Module):
  """Maximum over adjacent windows of `window` x `window` pixels.

  Raises:
    Misfit: the images are smaller than a window.
  """

  window: int

  def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 c"]:
    return pooling.max_pool(check_map(x, self.name, at_least=self.window), self.window)


def check_map(x: Array, layer: str | None, *, at_least: int = 1) -> Array:
  """Returns (N, H, W, C) `x`.

  Raises:
    Misfit: earlier layers have shrunk the image to fewer pixels than `at_least` on a side.
  """
  height, width = (max(size, 0) for size in x.shape[1:3])
  if min(height, width) < at_least:
    raise errors.Misfit(
      f"the images are too small for this network: layer {layer!r} has {height}x{width} pixels "
      f"left and needs {at_least}",
      names=("image_size", "name"),
    )
  return x


class Transition(nn.Module):
  """A bare 1x1 convolution to `features` channels, then a 2x2 max pool unless `pool` is False."""

  features: int
  kernel_init: Initializer
  dtype: DType
  pool: bool = True

  @nn.compact
  def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n h2 w2 {self.features}"]:
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
  """Mean over height and width, which stay as axes of size 1."""

  def __call__(self, x: Float[Array, "n h w c"]) -> Float[Array, "n 1 1 c"]:
    return x.mean((1, 2), keepdims=True)


class ConvHead(nn.Module):
  """Global average pool, then a 1x1 convolution to the logits, both in float32.

  Attributes:
    num_classes: number of logits.
    kernel_init: initializer of the convolution; `get_bias_init` gives that of the bias.
    use_bias: whether the convolution adds a bias.
  """

  num_classes: int
  kernel_init: Initializer
  use_bias: bool = False

  @nn.compact
  def __call__(self, x: Float[Array, "n h w c"]) -> Float32[Array, "n {self.num_classes}"]:
    if x.dtype == jnp.bfloat16:
      # JAX 0.12 on CPUs would fuse a sum of bfloat16 units with its mean and return NaN.
      x = jax.lax.optimization_barrier(x)
    x = GlobalAveragePool(name="pool")(x.astype(jnp.float32))
    # cuDNN would want another order of the last feature maps in memory, and of all that they meet.
    conv = Conv if backend.select_backend() == "gpu" else nn.Conv
    x = conv(
      self.num_classes,
      (1, 1),
      use_bias=self.use_bias,
      kernel_init=self.kernel_init,
      bias_init=get_bias_init(self.kernel_init, x.shape[-1]),
      name="conv",
    )(x)
    return x[:, 0, 0]


class Network(nn.Module):
  """The base class of networks, which are called as network(images, train) -> logits.

  The images are float (N, H, W, 3), the logits float32 (N, classes).

  Attributes:
    num_classes: number of logits.
    norm: of the units; a Norm.
    dropout_rate: of the units.
    kernel_init: initializer of every kernel; `get_bias_init` gives that of the biases.
    dtype: in which convolutions compute.
  """

  num_classes: int
  norm: norms.Norm
  dropout_rate: float
  kernel_init: Initializer
  dtype: DType

  def get_unit(self, kind: Callable[..., Unit], **options: Any) -> UnitFactory:
    """Returns a partial of `kind` with the network's attributes and with `options`.

    The attributes are norm, dropout rate, initializer and dtype; `options` take precedence.
    """
    shared = {
      "norm": self.norm,
      "dropout_rate": self.dropout_rate,
      "kernel_init": self.kernel_init,
      "dtype": self.dtype,
    }
    return partial(kind, **(shared | options))

  def get_transition(self, **options: Any) -> Callable[..., Transition]:
    """Returns a partial of Transition with the network's initializer and dtype."""
    return partial(Transition, kernel_init=self.kernel_init, dtype=self.dtype, **options)

  def get_head(self, *, use_bias: bool = False) -> ConvHead:
    """Creates the network's module `head`."""
    return ConvHead(self.num_classes, self.kernel_init, use_bias=use_bias, name="head")
