"""Augmentation on the host with Albumentations: a random stream for each example and epoch.

The stream of example 0 also determines the order of the epoch (`batches.epoch_permutation`),
because NumPy pads a seed with zeros. Ops act on uint8 images; the device normalizes them later.
"""

import os
import random
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it would access the network at import

import albumentations as A
import cv2
import numpy as np
from albumentations.augmentations.geometric import functional as geometric_functional
from albumentations.augmentations.pixel import functional as pixel_functional
from jaxtyping import UInt8

from flax_cifar import errors
from flax_cifar.data.augment import arguments as arguments_lib

BORDERS = {"fill": cv2.BORDER_CONSTANT, "reflect": cv2.BORDER_REFLECT_101}
INTERPOLATIONS = {"nearest": cv2.INTER_NEAREST, "bilinear": cv2.INTER_LINEAR}
# Takes the place of the epoch in streams that are the same in all epochs.
EVERY_EPOCH = 2**32 - 1
ADJUSTMENTS = {
  "brightness": pixel_functional.adjust_brightness_torchvision,
  "contrast": pixel_functional.adjust_contrast_torchvision,
  "saturation": pixel_functional.adjust_saturation_torchvision,
}


class HostAugment:
  """The augmentation of an image; called as augment(image, stream) -> image.

  The result depends only on the image and on `stream`, (seed, epoch, example), so neither the
  number of workers nor the order of calls matters. Two threads must not call one instance at the
  same time.
  """

  def __init__(self, transforms: list[A.BasicTransform]):
    self._compose = A.Compose(transforms)

  def __call__(
    self, image: UInt8[np.ndarray, "h w 3"], stream: tuple[int, int, int]
  ) -> UInt8[np.ndarray, "h w 3"]:
    generator = np.random.default_rng(stream)
    # Not set_random_seed, which would give every transform the same draws (all or none applied).
    self._compose.set_random_state(generator, random.Random(int(generator.integers(1 << 63))))
    return self._compose(image=image, stream=stream)["image"]


def create_host_augment(
  *, ops: Sequence[Any], mean: Sequence[Any], **arguments: Any
) -> HostAugment | None:
  """Creates the augmentation of `config.augment`.

  Args:
    ops: names in OPS, in the order in which they are applied; without any, returns None.
    mean: the color that the fill "mean" stands for, per channel in [0, 1].
    **arguments: for each op a mapping or ConfigDict of its arguments.

  Raises:
    UserError: unknown op or a value out of range.
  """
  transforms = [
    errors.choose("augment.ops", name, OPS)(
      **arguments_lib.resolve_arguments(name, arguments[name], mean)
    )
    for name in ops
  ]
  return HostAugment(transforms) if transforms else None


# ---- Ops


def _horizontal_flip(*, p: float) -> A.BasicTransform:
  return A.HorizontalFlip(p=p, strict=True)


class AlternatingFlip(A.ImageOnlyTransform):
  """Flips each example in every other epoch; a coin decides in which epoch it starts.

  Source: Jordan 2024, arXiv:2404.00498.
  """

  @property
  def targets_as_params(self) -> list[str]:
    return ["stream"]

  def get_params_dependent_on_data(
    self, params: dict[str, Any], data: dict[str, Any]
  ) -> dict[str, Any]:
    seed, epoch, example = data["stream"]
    coin = np.random.default_rng((seed, EVERY_EPOCH, example)).integers(2)
    return {"flip": bool((coin + epoch) % 2)}

  def apply(self, img: np.ndarray, *, flip: bool, **params: Any) -> np.ndarray:
    return cv2.flip(img, 1) if flip else img


def _alternating_flip() -> A.BasicTransform:
  return AlternatingFlip(p=1.0, strict=True)


def _shift_scale_rotate(
  *,
  shift: float,
  scale: float,
  rotate: float,
  interpolation: str,
  border: str,
  fill: tuple[float, ...],
  p: float,
) -> A.BasicTransform:
  """Like A.ShiftScaleRotate, which is deprecated in favor of A.Affine."""
  return A.Affine(
    scale=(1 - scale, 1 + scale),
    translate_percent=(-shift, shift),
    rotate=(-rotate, rotate),
    shear=(0, 0),
    interpolation=INTERPOLATIONS[interpolation],
    border_mode=BORDERS[border],
    fill=fill,
    p=p,
    strict=True,
  )


def _rotate(
  *, limit: float, interpolation: str, border: str, fill: tuple[float, ...], p: float
) -> A.BasicTransform:
  return A.Rotate(
    limit=(-limit, limit),
    interpolation=INTERPOLATIONS[interpolation],
    border_mode=BORDERS[border],
    fill=fill,
    p=p,
    strict=True,
  )


class PadAndCrop(A.ImageOnlyTransform):
  """A.Pad and then A.RandomCrop back to the size of the image, for images of any size."""

  class InitSchema(A.ImageOnlyTransform.InitSchema):
    padding: int
    border_mode: int
    fill: tuple[float, ...]

  def __init__(self, padding: int, border_mode: int, fill: tuple[float, ...], p: float):
    super().__init__(p=p)
    self.padding = padding
    self.border_mode = border_mode
    self.fill = fill

  def get_params(self) -> dict[str, Any]:
    starts = 2 * self.padding + 1
    return {key: int(starts * self.py_random.random()) for key in ("top", "left")}

  def apply(self, img: np.ndarray, *, top: int, left: int, **params: Any) -> np.ndarray:
    height, width = img.shape[:2]
    pad = self.padding
    padded = cv2.copyMakeBorder(img, pad, pad, pad, pad, self.border_mode, value=self.fill)
    return padded[top : top + height, left : left + width]


def _random_crop(*, padding: int, border: str, fill: tuple[float, ...]) -> A.BasicTransform:
  return PadAndCrop(padding=padding, border_mode=BORDERS[border], fill=fill, p=1.0)


def _coarse_dropout(
  *, holes: int, height: int, width: int, fill: tuple[float, ...], p: float
) -> A.BasicTransform:
  """Cutout (DeVries and Taylor 2017, arXiv:1708.04552) with holes that lie inside the image."""
  return A.CoarseDropout(
    num_holes_range=(holes, holes),
    hole_height_range=(height, height),
    hole_width_range=(width, width),
    fill=fill,
    p=p,
    strict=True,
  )


def _color_jitter(
  *, brightness: float, contrast: float, saturation: float, hue: float, p: float
) -> A.BasicTransform:
  return A.ColorJitter(
    brightness=(1 - brightness, 1 + brightness),
    contrast=(1 - contrast, 1 + contrast),
    saturation=(1 - saturation, 1 + saturation),
    hue=(-hue, hue),
    p=p,
    strict=True,
  )


class TrivialAugment(A.ImageOnlyTransform):
  """Makes one of `arguments.TRIVIAL_KINDS`, at a random level."""

  class InitSchema(A.ImageOnlyTransform.InitSchema):
    strength: float
    interpolation: int
    border_mode: int
    fill: tuple[float, ...]

  def __init__(
    self, strength: float, interpolation: int, border_mode: int, fill: tuple[float, ...], p: float
  ):
    super().__init__(p=p)
    self.strength = strength
    self.interpolation = interpolation
    self.border_mode = border_mode
    self.fill = fill

  def get_params(self) -> dict[str, Any]:
    kind = int(len(arguments_lib.TRIVIAL_KINDS) * self.py_random.random())
    return {"kind": kind, "level": self.strength * (2 * self.py_random.random() - 1)}

  def apply(self, img: np.ndarray, *, kind: int, level: float, **params: Any) -> np.ndarray:
    name = arguments_lib.TRIVIAL_KINDS[kind]
    if name in ADJUSTMENTS:
      return ADJUSTMENTS[name](img, 1 + arguments_lib.TRIVIAL_FACTOR * level)
    if name == "posterize":
      dropped = round(arguments_lib.TRIVIAL_BITS * abs(level))
      return pixel_functional.posterize(img, 8 - dropped) if dropped else img
    if name == "solarize":
      return pixel_functional.solarize(img, 1 - abs(level))
    return self._move(img, name, level)

  def _move(self, img: np.ndarray, name: str, level: float) -> np.ndarray:
    height, width = img.shape[:2]
    linear, shift, shear = np.eye(2), np.zeros(2), arguments_lib.TRIVIAL_FACTOR * level
    if name == "shift_x":
      shift[0] = np.trunc(level * width)
    elif name == "shift_y":
      shift[1] = np.trunc(level * height)
    elif name == "shear_x":
      linear[0, 1] = shear
    elif name == "shear_y":
      linear[1, 0] = shear
    elif name == "rotate":
      angle = np.deg2rad(arguments_lib.TRIVIAL_DEGREES * level)
      linear[:] = (np.cos(angle), np.sin(angle)), (-np.sin(angle), np.cos(angle))
    center = np.array([width - 1, height - 1]) / 2
    matrix = np.eye(3)
    matrix[:2] = np.column_stack([linear, center + shift - linear @ center])
    options = self.interpolation, self.fill, self.border_mode, (height, width)
    return geometric_functional.warp_affine(img, matrix, *options)


def _trivial_augment(
  *, strength: float, interpolation: str, border: str, fill: tuple[float, ...], p: float
) -> A.BasicTransform:
  return TrivialAugment(
    strength=strength,
    interpolation=INTERPOLATIONS[interpolation],
    border_mode=BORDERS[border],
    fill=fill,
    p=p,
  )


OPS: dict[str, Callable[..., A.BasicTransform]] = {
  "horizontal_flip": _horizontal_flip,
  "alternating_flip": _alternating_flip,
  "shift_scale_rotate": _shift_scale_rotate,
  "rotate": _rotate,
  "random_crop": _random_crop,
  "coarse_dropout": _coarse_dropout,
  "color_jitter": _color_jitter,
  "trivial_augment": _trivial_augment,
}
