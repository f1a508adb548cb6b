"""Augmentation on the device: the ops of `host` for a whole batch at once, inside jit.

Each op has two pure functions: `draw_*` turns uniform numbers into parameters, one per example,
and `apply_*` changes pixels by given parameters. Pixels are packed, see `device_pixels`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int, Int32, Key, UInt8, UInt32

from flax_cifar import errors
from flax_cifar.data.augment import arguments as arguments_lib
from flax_cifar.data.augment import device_color, device_pixels, device_random, device_trivial

Size = tuple[int, int]  # height, width


@dataclasses.dataclass(frozen=True)
class DeviceOp:
  """An op with its arguments.

  Attributes:
    columns: number of uniform numbers that it needs per example.
    draw: called as `draw(uniforms (N, columns), epoch, (H, W))`.
    apply: called as `apply(pixels, **params) -> pixels`.
    redraw: False gives an example the same numbers in every epoch.
  """

  columns: int
  draw: Callable[[Array, Array, Size], device_random.Drawn]
  apply: Callable[..., Array]
  redraw: bool = True


class DeviceAugment:
  """The augmentation of a batch; called as augment(images, key, epoch, example) -> images.

  The result of an image depends only on the image, the key, the epoch and the image's number, not
  on the rest of the batch.
  """

  def __init__(self, ops: Sequence[DeviceOp]):
    self._ops = tuple(ops)

  def __call__(
    self,
    images: UInt8[Array | np.ndarray, "n h w 3"],
    key: Key[Array, ""],
    epoch: Int[Array, ""],
    example: Int[Array, " n"],
  ) -> UInt8[Array, "n h w 3"]:
    """Augments a batch.

    Args:
      images: uint8 (N, H, W, 3).
      key: a typed threefry key.
      epoch: from 0.
      example: the number of each image in the training split.
    """
    redraw = [op.redraw for op in self._ops for _ in range(op.columns)]
    uniforms = device_random.draw_uniforms(key, epoch, example, redraw=redraw)
    _, height, width, _ = images.shape
    pixels, start = device_pixels.pack(jnp.asarray(images)), 0
    for op in self._ops:
      applied, params = op.draw(uniforms[:, start : start + op.columns], epoch, (height, width))
      pixels = jnp.where(device_pixels.per_image(applied), op.apply(pixels, **params), pixels)
      start += op.columns
    return device_pixels.unpack(pixels)


def create_device_augment(
  *, ops: Sequence[Any], mean: Sequence[Any], **arguments: Any
) -> DeviceAugment | None:
  """Creates the augmentation of `config.augment`.

  Args:
    ops: names in DEVICE_OPS, in the order in which they are applied; without any, returns None.
    mean: the color that the fill "mean" stands for, per channel in [0, 1].
    **arguments: for each op a mapping or ConfigDict of its arguments.

  Raises:
    UserError: unknown op or a value out of range.
  """
  created = [
    errors.choose("augment.ops", name, DEVICE_OPS)(
      **arguments_lib.resolve_arguments(name, arguments[name], mean)
    )
    for name in ops
  ]
  return DeviceAugment(created) if created else None


# ---- Flips


def draw_horizontal_flip(uniforms: Float32[Array, "n 1"], *, p: float) -> device_random.Drawn:
  """Draws which examples are flipped."""
  return device_random.draw_coin(uniforms[:, 0], p), {}


def draw_alternating_flip(
  uniforms: Float32[Array, "n 1"], epoch: Int[Array, ""]
) -> device_random.Drawn:
  """Draws which examples are flipped, from uniforms that are the same in every epoch.

  Source: Jordan 2024, arXiv:2404.00498.
  """
  coin = device_random.draw_integer(uniforms[:, 0], 2)
  return (coin + epoch) % 2 == 1, {}


def apply_horizontal_flip(pixels: UInt32[Array, "n h w"]) -> UInt32[Array, "n h w"]:
  """Swaps left and right."""
  return pixels[:, :, ::-1]


def _horizontal_flip(*, p: float) -> DeviceOp:
  return DeviceOp(1, lambda u, epoch, size: draw_horizontal_flip(u, p=p), apply_horizontal_flip)


def _alternating_flip() -> DeviceOp:
  return DeviceOp(
    1,
    lambda u, epoch, size: draw_alternating_flip(u, epoch),
    apply_horizontal_flip,
    redraw=False,
  )


# ---- Affine maps


def draw_shift_scale_rotate(
  uniforms: Float32[Array, "n 6"],
  size: Size,
  *,
  shift: float,
  scale: float,
  rotate: float,
  p: float,
) -> device_random.Drawn:
  """Draws which examples are changed, and the parameters of `apply_affine`.

  Like A.Affine, it truncates shifts to whole pixels and draws the axes independently.

  Args:
    uniforms: numbers in [0, 1).
    size: height and width in pixels.
    shift: largest shift, a fraction of the size.
    scale: largest distance of the scale from 1.
    rotate: largest angle in degrees.
    p: probability that an example is changed.
  """
  height, width = size
  coin, x, y, scale_x, scale_y, angle = uniforms.T
  params = {
    "shift_x": jnp.trunc(device_random.draw_within(x, 0, shift * width)),
    "shift_y": jnp.trunc(device_random.draw_within(y, 0, shift * height)),
    "scale_x": device_random.draw_within(scale_x, 1, scale),
    "scale_y": device_random.draw_within(scale_y, 1, scale),
    "angle": device_random.draw_within(angle, 0, rotate),
  }
  return device_random.draw_coin(coin, p), params


def apply_affine(
  pixels: UInt32[Array, "n h w"],
  *,
  shift_x: Float32[Array, " n"],
  shift_y: Float32[Array, " n"],
  scale_x: Float32[Array, " n"],
  scale_y: Float32[Array, " n"],
  angle: Float32[Array, " n"],
  interpolation: str,
  border: str,
  fill: device_pixels.Fill,
) -> UInt32[Array, "n h w"]:
  """Scales and rotates about the center, counter-clockwise as displayed, then shifts.

  Args:
    pixels: packed, see `device_pixels`.
    shift_x, shift_y: pixels to the right and down.
    scale_x, scale_y: above 1 enlarges.
    angle: degrees.
    interpolation: a key of `device_pixels.SAMPLERS`.
    border: "fill" or "reflect".
    fill: color of the border "fill".
  """
  cos, sin = jnp.cos(jnp.deg2rad(angle)), jnp.sin(jnp.deg2rad(angle))
  return device_pixels.warp(
    pixels,
    linear=((cos / scale_x, -sin / scale_x), (sin / scale_y, cos / scale_y)),
    shift_x=shift_x,
    shift_y=shift_y,
    interpolation=interpolation,
    border=border,
    fill=fill,
  )


def draw_rotate(uniforms: Float32[Array, "n 2"], *, limit: float, p: float) -> device_random.Drawn:
  """Draws which examples are rotated, and by what angle of at most `limit` degrees."""
  coin, angle = uniforms.T
  return device_random.draw_coin(coin, p), {"angle": device_random.draw_within(angle, 0, limit)}


def apply_rotate(
  pixels: UInt32[Array, "n h w"],
  *,
  angle: Float32[Array, " n"],
  interpolation: str,
  border: str,
  fill: device_pixels.Fill,
) -> UInt32[Array, "n h w"]:
  """Rotates by `angle` degrees; see `apply_affine`."""
  zero, one = jnp.zeros_like(angle), jnp.ones_like(angle)
  return apply_affine(
    pixels,
    shift_x=zero,
    shift_y=zero,
    scale_x=one,
    scale_y=one,
    angle=angle,
    interpolation=interpolation,
    border=border,
    fill=fill,
  )


def _shift_scale_rotate(
  *,
  shift: float,
  scale: float,
  rotate: float,
  interpolation: str,
  border: str,
  fill: device_pixels.Fill,
  p: float,
) -> DeviceOp:
  draw = partial(draw_shift_scale_rotate, shift=shift, scale=scale, rotate=rotate, p=p)
  apply = partial(apply_affine, interpolation=interpolation, border=border, fill=fill)
  return DeviceOp(6, lambda u, epoch, size: draw(u, size), apply)


def _rotate(
  *, limit: float, interpolation: str, border: str, fill: device_pixels.Fill, p: float
) -> DeviceOp:
  draw = partial(draw_rotate, limit=limit, p=p)
  apply = partial(apply_rotate, interpolation=interpolation, border=border, fill=fill)
  return DeviceOp(2, lambda u, epoch, size: draw(u), apply)


# ---- Crop


def draw_random_crop(uniforms: Float32[Array, "n 2"], *, padding: int) -> device_random.Drawn:
  """Draws where the crop of each example starts in the padded image."""
  top, left = device_random.draw_integer(uniforms.T, 2 * padding + 1)
  return jnp.ones(len(uniforms), bool), {"top": top, "left": left}


def apply_random_crop(
  pixels: UInt32[Array, "n h w"],
  *,
  top: Int32[Array, " n"],
  left: Int32[Array, " n"],
  padding: int,
  border: str,
  fill: device_pixels.Fill,
) -> UInt32[Array, "n h w"]:
  """Pads each side by `padding` pixels and crops back to the original size from (top, left)."""
  row, column = device_pixels.get_grid(pixels)
  row, column = (
    row + device_pixels.per_image(top) - padding,
    column + device_pixels.per_image(left) - padding,
  )
  return device_pixels.read_pixels(pixels, row, column, border=border, fill=fill)


def _random_crop(*, padding: int, border: str, fill: device_pixels.Fill) -> DeviceOp:
  return DeviceOp(
    2,
    lambda u, epoch, size: draw_random_crop(u, padding=padding),
    partial(apply_random_crop, padding=padding, border=border, fill=fill),
  )


# ---- Holes


def draw_coarse_dropout(
  uniforms: Float32[Array, "n 1+2*{holes}"],
  size: Size,
  *,
  holes: int,
  height: int,
  width: int,
  p: float,
) -> device_random.Drawn:
  """Draws which examples get holes, and the first row and column of each hole.

  Holes of `height` by `width` pixels lie inside the image of `size`, and may overlap.
  """
  top = device_random.draw_integer(uniforms[:, 1 : 1 + holes], max(size[0] - height, 0) + 1)
  left = device_random.draw_integer(uniforms[:, 1 + holes :], max(size[1] - width, 0) + 1)
  return device_random.draw_coin(uniforms[:, 0], p), {"top": top, "left": left}


def apply_coarse_dropout(
  pixels: UInt32[Array, "n h w"],
  *,
  top: Int32[Array, "n holes"],
  left: Int32[Array, "n holes"],
  height: int,
  width: int,
  fill: device_pixels.Fill,
) -> UInt32[Array, "n h w"]:
  """Fills holes of `height` by `width` pixels that start at (top, left).

  Source: DeVries and Taylor 2017, arXiv:1708.04552; their holes may overlap the border.
  """
  row, column = device_pixels.get_grid(pixels)
  hit = jnp.zeros((), bool)
  for hole in range(top.shape[1]):
    y, x = (
      row - device_pixels.per_image(top[:, hole]),
      column - device_pixels.per_image(left[:, hole]),
    )
    hit |= (y >= 0) & (y < height) & (x >= 0) & (x < width)
  return jnp.where(hit, device_pixels.pack_fill(fill), pixels)


def _coarse_dropout(
  *, holes: int, height: int, width: int, fill: device_pixels.Fill, p: float
) -> DeviceOp:
  draw = partial(draw_coarse_dropout, holes=holes, height=height, width=width, p=p)
  return DeviceOp(
    1 + 2 * holes,
    lambda u, epoch, size: draw(u, size),
    partial(apply_coarse_dropout, height=height, width=width, fill=fill),
  )


# ---- Colors


def _color_jitter(
  *, brightness: float, contrast: float, saturation: float, hue: float, p: float
) -> DeviceOp:
  limits = {"brightness": brightness, "contrast": contrast, "saturation": saturation, "hue": hue}
  return DeviceOp(
    6,
    lambda u, epoch, size: device_color.draw_color_jitter(u, **limits, p=p),
    device_color.apply_color_jitter,
  )


# ---- Policies


def _trivial_augment(
  *, strength: float, interpolation: str, border: str, fill: device_pixels.Fill, p: float
) -> DeviceOp:
  return DeviceOp(
    3,
    lambda u, epoch, size: device_trivial.draw_trivial_augment(u, strength=strength, p=p),
    partial(
      device_trivial.apply_trivial_augment, interpolation=interpolation, border=border, fill=fill
    ),
  )


DEVICE_OPS: dict[str, Callable[..., DeviceOp]] = {
  "horizontal_flip": _horizontal_flip,
  "alternating_flip": _alternating_flip,
  "shift_scale_rotate": _shift_scale_rotate,
  "rotate": _rotate,
  "random_crop": _random_crop,
  "coarse_dropout": _coarse_dropout,
  "color_jitter": _color_jitter,
  "trivial_augment": _trivial_augment,
}
