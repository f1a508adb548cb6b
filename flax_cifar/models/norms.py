"""Normalization layers behind one call, `norm(x, train)` with x (N, H, W, C), by name in NORMS.

All of them compute in float32 and return the type of their input. ReLU may be their last part,
because it needs no pass over the data of its own within `norm_relu.normalize`. Where the caller
measures x and normalizes it, `norm.get_affine(moments, train)` tells it how, and
`norm.get_fixed_affine(channels, train)` where that is the same for all images.
"""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from flax_cifar import errors
from flax_cifar.kernels import moments as moments_lib
from flax_cifar.kernels import norm_relu
from flax_cifar.parallel import mesh as mesh_lib

# A class or a partial of one; called as norm(relu=..., name=...)(x, train).
Norm = Callable[..., nn.Module]

# The name of a parameter that keeps its initial value; `optim.trainable_mask` excludes it.
FIXED_SCALE = "fixed_scale"


class BatchNorm(nn.Module):
  """Batch normalization with PyTorch's statistics, over `num_splits` ghost batches.

  In training each of the `num_splits` interleaved parts of the batch (example i belongs to part
  i mod num_splits) is normalized by its own mean and biased variance. The running variance is the
  unbiased one. Evaluation uses the running values, which are averaged over the parts.

  Sources: Ioffe and Szegedy 2015 (arXiv:1502.03167); ghost batches: Hoffer et al. 2017
  (arXiv:1705.08741).

  Attributes:
    momentum: fraction of the old running value kept at each step (torch's momentum is 1 - this).
    epsilon: added to the variance.
    num_splits: ghost batches per batch; must divide the batch size. With 0 each device has the
      statistics of its own examples, and no exchange with others.
    train_scale: False keeps the scale at 1, a parameter called FIXED_SCALE.
    relu: whether ReLU comes last.

  Raises:
    Misfit: in training, `num_splits` does not divide the batch size.
  """

  momentum: float
  epsilon: float
  num_splits: int = 1
  train_scale: bool = True
  relu: bool = False

  @property
  def kind(self) -> str:
    """The name in the layer table."""
    return "BatchNorm" if self.num_splits == 1 else "GhostNorm"

  def __call__(self, x: Float[Array, "n h w c"], train: bool) -> Float[Array, "n h w c"]:
    if fixed := self.get_fixed_affine(x.shape[-1], train):
      (center,), (slope,), (shift,) = fixed
      return norm_relu.scale_and_shift(x, center, slope, shift, self.relu)
    scale, bias, mean, var = self._create_variables(x.shape[-1])
    sets = self._get_parts(len(x))
    y, part_mean, part_var = norm_relu.normalize(x, scale, bias, sets, self.epsilon, self.relu)
    self._update(mean, var, part_mean, part_var, x.size // (sets.number * x.shape[-1]))
    return y

  def get_affine(self, moments: moments_lib.Moments, train: bool) -> moments_lib.Affine:
    """Returns what the norm does to the images that have these moments, ReLU aside."""
    images, channels = moments.mean.shape
    if fixed := self.get_fixed_affine(channels, train):
      return fixed
    scale, bias, mean, var = self._create_variables(channels)
    sets = self._get_parts(images)
    part_mean, part_var = sets.join(moments.mean, moments.variance)
    self._update(mean, var, part_mean, part_var, images * moments.pixels // sets.number)
    return moments_lib.get_affine(part_mean, part_var, scale, bias, sets, self.epsilon, images)

  def get_fixed_affine(self, channels: int, train: bool) -> moments_lib.Affine | None:
    """Returns what the norm does to all images, or None where it depends on them: in training."""
    if train:
      return None
    scale, bias, mean, var = self._create_variables(channels)
    slope = jax.lax.rsqrt(var.value + self.epsilon) * scale
    return moments_lib.Affine(mean.value[None], slope[None], bias[None])

  @nn.compact
  def _create_variables(self, channels: int) -> tuple[Array, Array, nn.Variable, nn.Variable]:
    """Returns scale and bias, and the running mean and variance."""
    bias = self.param("bias", nn.initializers.zeros, (channels,))
    mean = self.variable("batch_stats", "mean", jnp.zeros, (channels,))
    var = self.variable("batch_stats", "var", jnp.ones, (channels,))
    if self.train_scale:
      return self.param("scale", nn.initializers.ones, (channels,)), bias, mean, var
    scale = self.param(FIXED_SCALE, nn.initializers.ones, (channels,))
    return jax.lax.stop_gradient(scale), bias, mean, var

  def _get_parts(self, count: int) -> moments_lib.Sets:
    if self.num_splits == 0:
      return moments_lib.DeviceBatches(mesh_lib.count_shards())
    if self.num_splits < 0 or count % self.num_splits:
      raise errors.Misfit(
        f"num_splits={self.num_splits} is not a divisor of the batch size {count}",
        names=("num_splits", "batch_size"),
      )
    return moments_lib.GhostBatches(self.num_splits)

  def _update(
    self, mean: nn.Variable, var: nn.Variable, means: Array, variances: Array, count: int
  ) -> None:
    """Moves the running values towards those of the parts, which have `count` values each."""
    if self.is_initializing():
      return
    unbiased = variances * (count / max(count - 1, 1))
    for running, parts in ((mean, means), (var, unbiased)):
      running.value = self.momentum * running.value + (1 - self.momentum) * parts.mean(0)


class GroupNorm(nn.Module):
  """Group normalization over (H, W, C / groups) of each example, then scale and bias per channel.

  With one group it is the sources' layer norm, which normalizes over channels and positions
  together, unlike `nn.LayerNorm`. Source: Wu and He 2018 (arXiv:1803.08494).

  Attributes:
    num_groups: must divide the number of channels.
    epsilon: added to the variance.
    affine: False leaves out scale and bias.
    relu: whether ReLU comes last.

  Raises:
    Misfit: `num_groups` does not divide the number of channels.
  """

  num_groups: int
  epsilon: float
  affine: bool = True
  relu: bool = False

  @property
  def kind(self) -> str:
    """The name in the layer table."""
    return "LayerNorm" if self.num_groups == 1 else "GroupNorm"

  def __call__(self, x: Float[Array, "n h w c"], train: bool) -> Float[Array, "n h w c"]:
    del train  # the same in training and evaluation
    scale, bias = self._create_variables(x.shape[-1])
    sets = moments_lib.ChannelGroups(self.num_groups)
    return norm_relu.normalize(x, scale, bias, sets, self.epsilon, self.relu)[0]

  def get_affine(self, moments: moments_lib.Moments, train: bool) -> moments_lib.Affine:
    """Returns what the norm does to the images that have these moments, ReLU aside."""
    del train
    images, channels = moments.mean.shape
    scale, bias = self._create_variables(channels)
    sets = moments_lib.ChannelGroups(self.num_groups)
    mean, var = sets.join(moments.mean, moments.variance)
    return moments_lib.get_affine(mean, var, scale, bias, sets, self.epsilon, images)

  def get_fixed_affine(self, channels: int, train: bool) -> moments_lib.Affine | None:
    """Returns None: what the norm does depends on the images."""
    del channels, train
    return None

  @nn.compact
  def _create_variables(self, channels: int) -> tuple[Array, Array]:
    """Returns scale and bias."""
    if self.num_groups < 1 or channels % self.num_groups:
      raise errors.Misfit(
        f"num_groups={self.num_groups} is not a divisor of the {channels} channels of a layer",
        names=("num_groups",),
      )
    if not self.affine:
      return jnp.ones(channels), jnp.zeros(channels)
    scale = self.param("scale", nn.initializers.ones, (channels,))
    return scale, self.param("bias", nn.initializers.zeros, (channels,))


class NoNorm(nn.Module):
  """The identity, or ReLU alone, so that a network can be built without normalization."""

  relu: bool = False

  def __call__(self, x: Float[Array, "n h w c"], train: bool) -> Float[Array, "n h w c"]:
    del train
    return norm_relu.relu(x) if self.relu else x

  def get_affine(self, moments: moments_lib.Moments, train: bool) -> moments_lib.Affine:
    """Returns the identity."""
    return self.get_fixed_affine(moments.mean.shape[-1], train)

  def get_fixed_affine(self, channels: int, train: bool) -> moments_lib.Affine:
    """Returns the identity."""
    del train
    return moments_lib.get_identity(channels)


NORMS: dict[str, Norm] = {
  "batch": BatchNorm,
  "ghost": BatchNorm,
  "layer": partial(GroupNorm, num_groups=1),
  "group": GroupNorm,
  "none": NoNorm,
}


def has_affine(norm: Norm) -> bool:
  """Whether `norm` has the methods with which fused kernels apply it."""
  methods = ("get_affine", "get_fixed_affine")
  return all(hasattr(getattr(norm, "func", norm), method) for method in methods)


def is_identity(norm: Norm) -> bool:
  """Whether `norm` does nothing."""
  return getattr(norm, "func", norm) is NoNorm
