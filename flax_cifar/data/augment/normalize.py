"""Normalization of uint8 images on the device."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

from flax_cifar.data.augment import arguments

MIN_STD = 1e-6  # below the standard deviation if one pixel in a million differs by one level

Normalize = Callable[[Array | np.ndarray], Array]  # uint8 (N, H, W, C) -> float (N, H, W, C)


def check(mean: Any, std: Any) -> None:
  """Raises a UserError unless `mean` is three numbers in [0, 1], and `std` three above 0."""
  arguments.check_channels("augment.mean", mean)
  arguments.check_channels("augment.std", std, low=MIN_STD)


def create_normalize(
  mean: tuple[float, ...], std: tuple[float, ...], *, dtype: DTypeLike
) -> Normalize:
  """Returns a function that computes (x / 255 - mean) / std for each channel.

  It runs on the device, so that images travel there as bytes. It computes in float32 and returns
  `dtype`.

  Args:
    mean: per channel, in [0, 1].
    std: per channel, in units where 255 is 1.
    dtype: of the normalized images.

  Raises:
    UserError: `mean` is not three numbers in [0, 1], or `std` not three in [MIN_STD, 1].
  """
  check(mean, std)
  scale = 1 / (255 * np.asarray(std, np.float64))
  shift = -np.asarray(mean, np.float64) / np.asarray(std, np.float64)

  def normalize(images: UInt8[Array | np.ndarray, "n h w c"]) -> Float[Array, "n h w c"]:
    images = jnp.asarray(images)
    normalized = images * jnp.asarray(scale, jnp.float32) + jnp.asarray(shift, jnp.float32)
    return normalized.astype(dtype)

  return normalize
