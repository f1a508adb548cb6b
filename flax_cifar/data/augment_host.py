"""Augmentation on the host with Albumentations: one independent random stream per example.

Ops act on uint8 images; normalisation follows on the device.
"""

import os
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it would ask the network at import

import albumentations as A
import cv2
import numpy as np

from flax_cifar.errors import choose, require

Fill = str | Sequence[float]
BORDERS = {"fill": cv2.BORDER_CONSTANT, "reflect": cv2.BORDER_REFLECT_101}


class HostAugment:
  """Calls as augment(image uint8 (H, W, 3), stream) -> uint8 of the same shape.

  The result depends on the image and on `stream` alone, so neither the number of workers nor
  the order of calls matters. One instance must not be called from two threads at a time.
  """

  def __init__(self, transforms: list[A.BasicTransform]):
    self._compose = A.Compose(transforms)

  def __call__(self, image: np.ndarray, stream: tuple[int, int, int]) -> np.ndarray:
    generator = np.random.default_rng(stream)
    # Not set_random_seed: it would give every transform the same draws (all or none applied).
    self._compose.set_random_state(generator, random.Random(int(generator.integers(1 << 63))))
    return self._compose(image=image)["image"]


def create_host_augment(
  *, ops: Sequence[str], mean: Sequence[float], **arguments: Mapping[str, Any]
) -> HostAugment | None:
  """The augmentation of `config.augment`.

  Args:
    ops: names in OPS, in the order in which they are applied; none at all gives None.
    mean: per channel in [0, 1], what the fill "mean" stands for.
    **arguments: the arguments of each op.

  Raises:
    UserError: unknown op or a value out of range.
  """
  transforms = [
    choose("augment.ops", name, OPS)(**_with_fill(arguments[name], mean)) for name in ops
  ]
  return HostAugment(transforms) if transforms else None


def _with_fill(arguments: Mapping[str, Any], mean: Sequence[float]) -> dict[str, Any]:
  arguments = dict(arguments)
  require(0 <= arguments["p"] <= 1, "augment p", arguments["p"], "a probability in [0, 1]")
  if "fill" in arguments:
    arguments["fill"] = get_fill(arguments["fill"], mean)
  return arguments


def get_fill(fill: Fill, mean: Sequence[float]) -> tuple[float, ...]:
  """The named fill as a value per channel in 0..255: whole numbers, as uint8 images hold.

  Raises:
    UserError: neither "mean" nor "black" nor a value in 0..255 per channel.
  """
  if fill == "mean":
    return tuple(float(int(255 * m)) for m in mean)
  if fill == "black":
    return (0.0,) * len(mean)
  valid = not isinstance(fill, str) and len(fill) == len(mean) and all(0 <= v <= 255 for v in fill)
  require(valid, "augment fill", fill, '"mean", "black" or a value in 0..255 per channel')
  return tuple(float(v) for v in fill)


def _horizontal_flip(*, p: float) -> A.BasicTransform:
  return A.HorizontalFlip(p=p, strict=True)


def _shift_scale_rotate(
  *, shift: float, scale: float, rotate: float, border: str, fill: tuple[float, ...], p: float
) -> A.BasicTransform:
  """As A.ShiftScaleRotate, which is deprecated in favour of this."""
  require(0 <= shift < 1, "augment.shift_scale_rotate.shift", shift, "a fraction in [0, 1)")
  require(0 <= scale < 1, "augment.shift_scale_rotate.scale", scale, "a fraction in [0, 1)")
  require(0 <= rotate <= 180, "augment.shift_scale_rotate.rotate", rotate, "degrees in [0, 180]")
  return A.Affine(
    scale=(1 - scale, 1 + scale),
    translate_percent=(-shift, shift),
    rotate=(-rotate, rotate),
    shear=(0, 0),
    interpolation=cv2.INTER_LINEAR,
    border_mode=choose("augment.shift_scale_rotate.border", border, BORDERS),
    fill=fill,
    p=p,
    strict=True,
  )


def _coarse_dropout(
  *, holes: int, height: int, width: int, fill: tuple[float, ...], p: float
) -> A.BasicTransform:
  """Cutout (DeVries and Taylor 2017, arXiv:1708.04552) with whole holes inside the image."""
  # Albumentations reads sizes below 1 as fractions of the image.
  require(holes >= 1, "augment.coarse_dropout.holes", holes, "1 or more")
  require(height >= 1, "augment.coarse_dropout.height", height, "1 or more pixels")
  require(width >= 1, "augment.coarse_dropout.width", width, "1 or more pixels")
  return A.CoarseDropout(
    num_holes_range=(holes, holes),
    hole_height_range=(height, height),
    hole_width_range=(width, width),
    fill=fill,
    p=p,
    strict=True,
  )


OPS: dict[str, Callable[..., A.BasicTransform]] = {
  "horizontal_flip": _horizontal_flip,
  "shift_scale_rotate": _shift_scale_rotate,
  "coarse_dropout": _coarse_dropout,
}
