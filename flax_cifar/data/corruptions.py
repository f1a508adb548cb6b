"""Common corruptions of images, in five severities.

Source: Hendrycks and Dietterich 2019, arXiv:1903.12261, "Benchmarking Neural Network Robustness to
Common Corruptions and Perturbations". The strengths are those of its authors' program for CIFAR-10.
The noise is our own draw, so accuracies are near those on the published files, not equal to them.
"""

import io
from collections.abc import Callable

import numpy as np
import PIL.Image
import scipy.ndimage
from jaxtyping import Float, UInt8

from flax_cifar import errors

SEVERITIES = (1, 2, 3, 4, 5)
BLOCK = 500  # images at a time: the computation takes up to 25 times their memory
Images = UInt8[np.ndarray, "n h w 3"]
Fractions = Float[np.ndarray, "n h w 3"]  # in [0, 1]


def corrupt(images: Images, name: str, severity: int) -> Images:
  """Corrupts each image; the same call gives the same images.

  All severities of noise have the same draw, which depends on the place of an image in `images`.

  Args:
    images: uint8 (N, H, W, 3).
    name: a key of CORRUPTIONS.
    severity: one of SEVERITIES.

  Raises:
    UserError: there is no such corruption or severity.
  """
  function, strengths = errors.choose("corruption", name, CORRUPTIONS)
  errors.require(severity in SEVERITIES, "severity", severity, "from 1 to 5")
  return function(images, strengths[severity - 1])


def add_noise(images: Images, sd: float) -> Images:
  """Adds Gaussian noise of standard deviation `sd`, in units of [0, 1]."""
  random = np.random.default_rng(0)
  return _map_blocks(lambda x: x + random.normal(0.0, sd, x.shape), images)


def blur(images: Images, sd: float) -> Images:
  """Blurs with a Gaussian of `sd` pixels; the rim is repeated outside the image."""
  size = (0, sd, sd, 0)
  return _map_blocks(lambda x: scipy.ndimage.gaussian_filter(x, size, mode="nearest"), images)


def brighten(images: Images, amount: float) -> Images:
  """Adds `amount` to V, the largest channel; the hue and the saturation of HSV stay."""

  def change(x: Fractions) -> Fractions:
    value = x.max(-1, keepdims=True)
    brighter = np.minimum(value + amount, 1)
    return np.where(value > 0, x * brighter / np.where(value > 0, value, 1), brighter)

  return _map_blocks(change, images)


def reduce_contrast(images: Images, factor: float) -> Images:
  """Multiplies the distance from the mean of each image and channel by `factor`."""

  def change(x: Fractions) -> Fractions:
    mean = x.mean((1, 2), keepdims=True)
    return (x - mean) * factor + mean

  return _map_blocks(change, images)


def compress(images: Images, quality: float) -> Images:
  """Saves as JPEG of `quality` in percent, and reads that again."""

  def save_and_read(image: PIL.Image.Image) -> PIL.Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=int(quality))
    return PIL.Image.open(file)

  return _map_pillow(save_and_read, images)


def pixelate(images: Images, factor: float) -> Images:
  """Scales down to `factor` of the sides and up again, both by the mean of boxes."""
  height, width = images.shape[1:3]
  small = max(1, int(width * factor)), max(1, int(height * factor))

  def scale(image: PIL.Image.Image) -> PIL.Image.Image:
    box = PIL.Image.Resampling.BOX
    return image.resize(small, box).resize((width, height), box)

  return _map_pillow(scale, images)


CORRUPTIONS: dict[str, tuple[Callable[[Images, float], Images], tuple[float, ...]]] = {
  "noise": (add_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
  "blur": (blur, (0.4, 0.6, 0.7, 0.8, 1.0)),
  "brightness": (brighten, (0.05, 0.1, 0.15, 0.2, 0.3)),
  "contrast": (reduce_contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
  "jpeg": (compress, (80, 65, 58, 50, 40)),
  "pixelate": (pixelate, (0.95, 0.9, 0.85, 0.75, 0.65)),
}


def _map_blocks(function: Callable[[Fractions], Fractions], images: Images) -> Images:
  """Computes in [0, 1]; back to bytes it truncates, as the source does."""
  changed = np.empty_like(images)
  for start in range(0, len(images), BLOCK):
    block = slice(start, start + BLOCK)
    x = function(images[block].astype(np.float32) / 255)
    changed[block] = np.clip(x, 0, 1) * 255
  return changed


def _map_pillow(function: Callable[[PIL.Image.Image], PIL.Image.Image], images: Images) -> Images:
  return np.stack([np.asarray(function(PIL.Image.fromarray(image))) for image in images])
