"""Augmentation on the device: the ops of `augment_host` for a whole batch at once, inside jit.

Each op has two pure functions: `draw_*` turns uniform numbers into parameters, one per example,
and `apply_*` changes pixels by given parameters. Inside, a pixel is one uint32, red in the lowest
byte: on a CPU a gather of one word takes about half the time of one of three bytes.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import threefry2x32_p

from flax_cifar.data.augment_arguments import resolve_arguments
from flax_cifar.errors import choose

Fill = tuple[float, ...]  # red, green, blue: whole numbers in 0..255
Size = tuple[int, int]  # height, width
Params = dict[str, jax.Array]  # name -> (N, ...)
Drawn = tuple[jax.Array, Params]  # which images an op is applied to: bool (N,); its parameters
Read = Callable[[jax.Array, jax.Array], jax.Array]  # row, column -> pixels, each (N, H, W)
Channels = tuple[jax.Array, jax.Array, jax.Array]  # red, green, blue: float32 (N, H, W) in 0..255

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # as A.ColorJitter numbers them
ORDERS = np.array(list(itertools.permutations(range(4))), np.int32)


@dataclasses.dataclass(frozen=True)
class DeviceOp:
  """An op with its arguments."""

  columns: int  # uniform numbers per example
  # (uniforms (N, columns), epoch, (H, W)) -> which images it is applied to (N,), parameters
  draw: Callable[[jax.Array, jax.Array, Size], Drawn]
  apply: Callable[..., jax.Array]  # pixels, **params
  redraw: bool = True  # False: an example gets the same numbers in every epoch


class DeviceAugment:
  """Calls as augment(images, key, epoch, example) -> images.

  Args:
    images: uint8 (N, H, W, 3).
    key: a typed threefry key.
    epoch: int32 scalar, from 0.
    example: int32 (N,), the number of each image in the train split.

  Returns:
    uint8 (N, H, W, 3). An image's result depends on it, the key, the epoch and its number alone,
    whatever else is in the batch.
  """

  def __init__(self, ops: Sequence[DeviceOp]):
    self._ops = tuple(ops)

  def __call__(
    self, images: jax.Array, key: jax.Array, epoch: jax.Array, example: jax.Array
  ) -> jax.Array:
    redraw = [op.redraw for op in self._ops for _ in range(op.columns)]
    uniforms = draw_uniforms(key, epoch, example, redraw=redraw)
    _, height, width, _ = images.shape
    pixels, start = pack(images), 0
    for op in self._ops:
      applied, params = op.draw(uniforms[:, start : start + op.columns], epoch, (height, width))
      pixels = jnp.where(_per_image(applied), op.apply(pixels, **params), pixels)
      start += op.columns
    return unpack(pixels)


def create_device_augment(
  *, ops: Sequence[str], mean: Sequence[float], **arguments: Mapping[str, Any]
) -> DeviceAugment | None:
  """The augmentation of `config.augment`.

  Args:
    ops: names in DEVICE_OPS, in the order in which they are applied; none at all gives None.
    mean: per channel in [0, 1], what the fill "mean" stands for.
    **arguments: the arguments of each op.

  Raises:
    UserError: unknown op or a value out of range.
  """
  created = [
    choose("augment.ops", name, DEVICE_OPS)(**resolve_arguments(name, arguments[name], mean))
    for name in ops
  ]
  return DeviceAugment(created) if created else None


# ---- Uniform numbers


def draw_uniforms(
  key: jax.Array, epoch: jax.Array, example: jax.Array, *, redraw: Sequence[bool]
) -> jax.Array:
  """float32 (N, len(redraw)) in [0, 1), multiples of 2^-23.

  One call of threefry, which is slow to compile: its counter is made of the example, the epoch
  and the column.

  Args:
    key: a typed threefry key.
    epoch: int32 scalar, from 0.
    example: int32 (N,).
    redraw: for each column, whether its numbers depend on the epoch.
  """
  columns = len(redraw)
  # The highest bit keeps away from the counters of `jax.random` under the same key.
  high = (example.astype(jnp.uint32) | jnp.uint32(1 << 31))[:, None]
  epochs = jnp.where(np.array(redraw, bool), epoch.astype(jnp.uint32), jnp.uint32(0))
  low = epochs * jnp.uint32(columns) + jnp.arange(columns, dtype=jnp.uint32)
  counter = jnp.broadcast_arrays(high, low)
  # The primitive, because the function around it flattens, and thus gathers a split batch.
  bits, _ = threefry2x32_p.bind(*jax.random.key_data(key), *counter)
  # 23 bits, so that floor(uniform * n) never rounds up to n.
  return (bits >> 9).astype(jnp.float32) * jnp.float32(2**-23)


def _draw_coin(uniforms: jax.Array, p: float) -> jax.Array:
  return uniforms < jnp.float32(p)


def _draw_within(uniforms: jax.Array, center: float, limit: float) -> jax.Array:
  return center + jnp.float32(limit) * (2 * uniforms - 1)


def _draw_integer(uniforms: jax.Array, count: int) -> jax.Array:
  """int32 in 0..count - 1."""
  return (uniforms * count).astype(jnp.int32)


# ---- Pixels


def pack(images: jax.Array) -> jax.Array:
  """Images uint8 (N, H, W, 3) as pixels uint32 (N, H, W)."""
  red, green, blue = (images[..., channel].astype(jnp.uint32) for channel in range(3))
  return red | green << 8 | blue << 16


def unpack(pixels: jax.Array) -> jax.Array:
  """Pixels uint32 (N, H, W) as images uint8 (N, H, W, 3)."""
  return jax.lax.bitcast_convert_type(pixels, jnp.uint8)[..., :3]


def _pack_fill(fill: Fill) -> jax.Array:
  red, green, blue = (int(value) for value in fill)
  return jnp.uint32(red | green << 8 | blue << 16)


def _split_channels(pixels: jax.Array) -> Channels:
  red, green, blue = ((pixels >> shift & 255).astype(jnp.float32) for shift in (0, 8, 16))
  return red, green, blue


def _join_channels(channels: Channels) -> jax.Array:
  red, green, blue = (channel.astype(jnp.uint32) for channel in channels)
  return red | green << 8 | blue << 16


def _map(function: Callable[[jax.Array], jax.Array], channels: Channels) -> Channels:
  red, green, blue = map(function, channels)
  return red, green, blue


def _per_image(values: jax.Array) -> jax.Array:
  """(N,) -> (N, 1, 1)."""
  return values[:, None, None]


def _grid(pixels: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Row (1, H, 1) and column (1, 1, W) of each pixel, int32."""
  _, height, width = pixels.shape
  return jnp.arange(height)[None, :, None], jnp.arange(width)[None, None, :]


def _read(
  pixels: jax.Array, row: jax.Array, column: jax.Array, *, border: str, fill: Fill
) -> jax.Array:
  """The pixels at whole coordinates, which may lie outside: (N, H, W)."""
  _, height, width = pixels.shape
  if border == "reflect":
    return _gather(pixels, _reflect(row, height), _reflect(column, width))
  inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
  nearest = _gather(pixels, row.clip(0, height - 1), column.clip(0, width - 1))
  return jnp.where(inside, nearest, _pack_fill(fill))


def _reflect(index: jax.Array, size: int) -> jax.Array:
  """The index inside that BORDER_REFLECT_101 of OpenCV names: ... 2 1 0 1 2 ... n-2 n-1 n-2 ..."""
  period = max(2 * size - 2, 1)
  distance = jax.lax.rem(jnp.abs(index), jnp.int32(period))
  return jnp.minimum(distance, period - distance)


def _gather(pixels: jax.Array, row: jax.Array, column: jax.Array) -> jax.Array:
  index = jnp.broadcast_to(row * pixels.shape[2] + column, pixels.shape)
  # Along an axis, so that a batch that is split over devices stays where it is.
  flat, index = (x.reshape(len(pixels), -1) for x in (pixels, index))
  read = jnp.take_along_axis(flat, index, axis=1, mode="promise_in_bounds")
  return read.reshape(pixels.shape)


# ---- Flips


def draw_horizontal_flip(uniforms: jax.Array, *, p: float) -> Drawn:
  """Which examples are flipped, from uniforms (N, 1)."""
  return _draw_coin(uniforms[:, 0], p), {}


def draw_alternating_flip(uniforms: jax.Array, epoch: jax.Array) -> Drawn:
  """Which examples are flipped, from uniforms (N, 1) that are the same in every epoch.

  Source: Jordan 2024, arXiv:2404.00498.
  """
  coin = _draw_integer(uniforms[:, 0], 2)
  return (coin + epoch) % 2 == 1, {}


def apply_horizontal_flip(pixels: jax.Array) -> jax.Array:
  """Left becomes right."""
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
  uniforms: jax.Array, size: Size, *, shift: float, scale: float, rotate: float, p: float
) -> Drawn:
  """Whether, and the parameters of `apply_affine`, from uniforms (N, 6).

  Shifts are cut to whole pixels and the axes drawn independently, as A.Affine does.
  """
  height, width = size
  coin, x, y, scale_x, scale_y, angle = uniforms.T
  params = {
    "shift_x": jnp.trunc(_draw_within(x, 0, shift * width)),
    "shift_y": jnp.trunc(_draw_within(y, 0, shift * height)),
    "scale_x": _draw_within(scale_x, 1, scale),
    "scale_y": _draw_within(scale_y, 1, scale),
    "angle": _draw_within(angle, 0, rotate),
  }
  return _draw_coin(coin, p), params


def apply_affine(
  pixels: jax.Array,
  *,
  shift_x: jax.Array,
  shift_y: jax.Array,
  scale_x: jax.Array,
  scale_y: jax.Array,
  angle: jax.Array,
  interpolation: str,
  border: str,
  fill: Fill,
) -> jax.Array:
  """Scales, rotates counter-clockwise as displayed, then shifts, all about the centre.

  Args:
    pixels: uint32 (N, H, W).
    shift_x, shift_y: float32 (N,), pixels to the right and down.
    scale_x, scale_y: float32 (N,), above 1 enlarges.
    angle: float32 (N,), degrees.
    interpolation: a key of SAMPLERS.
    border: "fill" or "reflect".
    fill: of the border "fill".
  """
  shift_x, shift_y, scale_x, scale_y, angle = map(
    _per_image, (shift_x, shift_y, scale_x, scale_y, angle)
  )
  cos, sin = jnp.cos(jnp.deg2rad(angle)), jnp.sin(jnp.deg2rad(angle))
  row, column = _grid(pixels)
  u = column - (pixels.shape[2] - 1) / 2 - shift_x
  v = row - (pixels.shape[1] - 1) / 2 - shift_y
  # How far away the source is, not where: small numbers are more precise.
  away_x = (cos / scale_x - 1) * u - sin / scale_x * v - shift_x
  away_y = sin / scale_y * u + (cos / scale_y - 1) * v - shift_y
  read = partial(_read, pixels, border=border, fill=fill)
  return SAMPLERS[interpolation](read, row, column, away_x, away_y)


def _sample_nearest(
  read: Read, row: jax.Array, column: jax.Array, away_x: jax.Array, away_y: jax.Array
) -> jax.Array:
  """What `read` has nearest to the point that is `away` of each (row, column)."""
  x, y = (jnp.floor(away + 0.5).astype(jnp.int32) for away in (away_x, away_y))
  return read(row + y, column + x)


def _sample_bilinear(
  read: Read, row: jax.Array, column: jax.Array, away_x: jax.Array, away_y: jax.Array
) -> jax.Array:
  """The mean of its four neighbours, each of which may come from the border, by their areas."""
  floor_x, floor_y = jnp.floor(away_x), jnp.floor(away_y)
  row, column = row + floor_y.astype(jnp.int32), column + floor_x.astype(jnp.int32)
  above = _mix(read(row, column), read(row, column + 1), away_x - floor_x)
  below = _mix(read(row + 1, column), read(row + 1, column + 1), away_x - floor_x)
  mixed = _lerp(above, below, away_y - floor_y)
  return _join_channels(_map(jnp.rint, mixed))


SAMPLERS = {"nearest": _sample_nearest, "bilinear": _sample_bilinear}


def _mix(left: jax.Array, right: jax.Array, weight: jax.Array) -> Channels:
  return _lerp(_split_channels(left), _split_channels(right), weight)


def _lerp(first: Channels, second: Channels, weight: jax.Array) -> Channels:
  red, green, blue = (a + weight * (b - a) for a, b in zip(first, second, strict=True))
  return red, green, blue


def draw_rotate(uniforms: jax.Array, *, limit: float, p: float) -> Drawn:
  """Whether, and by what angle in degrees, from uniforms (N, 2)."""
  coin, angle = uniforms.T
  return _draw_coin(coin, p), {"angle": _draw_within(angle, 0, limit)}


def apply_rotate(
  pixels: jax.Array, *, angle: jax.Array, interpolation: str, border: str, fill: Fill
) -> jax.Array:
  """`apply_affine` with the angle alone."""
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
  fill: Fill,
  p: float,
) -> DeviceOp:
  draw = partial(draw_shift_scale_rotate, shift=shift, scale=scale, rotate=rotate, p=p)
  apply = partial(apply_affine, interpolation=interpolation, border=border, fill=fill)
  return DeviceOp(6, lambda u, epoch, size: draw(u, size), apply)


def _rotate(*, limit: float, interpolation: str, border: str, fill: Fill, p: float) -> DeviceOp:
  draw = partial(draw_rotate, limit=limit, p=p)
  apply = partial(apply_rotate, interpolation=interpolation, border=border, fill=fill)
  return DeviceOp(2, lambda u, epoch, size: draw(u), apply)


# ---- Crop and holes


def draw_random_crop(uniforms: jax.Array, *, padding: int) -> Drawn:
  """For each example, and where the crop starts in the padded image, from uniforms (N, 2)."""
  top, left = _draw_integer(uniforms.T, 2 * padding + 1)
  return jnp.ones(len(uniforms), bool), {"top": top, "left": left}


def apply_random_crop(
  pixels: jax.Array, *, top: jax.Array, left: jax.Array, padding: int, border: str, fill: Fill
) -> jax.Array:
  """Pads each side by `padding` pixels and crops back to the size from (top, left): int32 (N,)."""
  row, column = _grid(pixels)
  row, column = row + _per_image(top) - padding, column + _per_image(left) - padding
  return _read(pixels, row, column, border=border, fill=fill)


def _random_crop(*, padding: int, border: str, fill: Fill) -> DeviceOp:
  return DeviceOp(
    2,
    lambda u, epoch, size: draw_random_crop(u, padding=padding),
    partial(apply_random_crop, padding=padding, border=border, fill=fill),
  )


def draw_coarse_dropout(
  uniforms: jax.Array, size: Size, *, holes: int, height: int, width: int, p: float
) -> Drawn:
  """Whether, and the first row and column of each hole: int32 (N, holes).

  From uniforms (N, 1 + 2 * holes). Holes lie inside the image and may overlap.
  """
  top = _draw_integer(uniforms[:, 1 : 1 + holes], max(size[0] - height, 0) + 1)
  left = _draw_integer(uniforms[:, 1 + holes :], max(size[1] - width, 0) + 1)
  return _draw_coin(uniforms[:, 0], p), {"top": top, "left": left}


def apply_coarse_dropout(
  pixels: jax.Array, *, top: jax.Array, left: jax.Array, height: int, width: int, fill: Fill
) -> jax.Array:
  """Fills holes of `height` by `width` pixels that start at (top, left): int32 (N, holes).

  Source: DeVries and Taylor 2017, arXiv:1708.04552, there with holes that overlap the border.
  """
  row, column = _grid(pixels)
  hit = jnp.zeros((), bool)
  for hole in range(top.shape[1]):
    y, x = row - _per_image(top[:, hole]), column - _per_image(left[:, hole])
    hit |= (y >= 0) & (y < height) & (x >= 0) & (x < width)
  return jnp.where(hit, _pack_fill(fill), pixels)


def _coarse_dropout(*, holes: int, height: int, width: int, fill: Fill, p: float) -> DeviceOp:
  draw = partial(draw_coarse_dropout, holes=holes, height=height, width=width, p=p)
  return DeviceOp(
    1 + 2 * holes,
    lambda u, epoch, size: draw(u, size),
    partial(apply_coarse_dropout, height=height, width=width, fill=fill),
  )


# ---- Colours


def draw_color_jitter(
  uniforms: jax.Array,
  *,
  brightness: float,
  contrast: float,
  saturation: float,
  hue: float,
  p: float,
) -> Drawn:
  """Whether, and the parameters of `apply_color_jitter`, from uniforms (N, 6)."""
  coin, order, *factors = uniforms.T
  params = {
    "brightness": _draw_within(factors[BRIGHTNESS], 1, brightness),
    "contrast": _draw_within(factors[CONTRAST], 1, contrast),
    "saturation": _draw_within(factors[SATURATION], 1, saturation),
    "hue": _draw_within(factors[HUE], 0, hue),
    "order": jnp.asarray(ORDERS)[_draw_integer(order, len(ORDERS))],
  }
  return _draw_coin(coin, p), params


def apply_color_jitter(
  pixels: jax.Array,
  *,
  brightness: jax.Array,
  contrast: jax.Array,
  saturation: jax.Array,
  hue: jax.Array,
  order: jax.Array,
) -> jax.Array:
  """Changes brightness, contrast, saturation and hue, each image in its own order.

  Args:
    pixels: uint32 (N, H, W).
    brightness: float32 (N,), a factor of the pixels; 1 changes nothing.
    contrast: float32 (N,), of the distance to the image's mean grey.
    saturation: float32 (N,), of the distance to the pixel's grey.
    hue: float32 (N,), a fraction of the colour circle; 0 changes nothing.
    order: int32 (N, 4), a permutation of BRIGHTNESS, CONTRAST, SATURATION, HUE.
  """
  factors = jnp.stack([brightness, contrast, saturation], 1)
  # The hue is dear: it is changed once, with what goes before it and what follows in two loops.
  turn = jnp.argmax(order == HUE, 1)
  blends = [jnp.where(place < turn, order[:, place], order[:, place + 1]) for place in range(3)]
  channels = _split_channels(pixels)
  for place, kind in enumerate(blends):
    channels = _blend(channels, kind, factors, place < turn)
  channels = _change_hue(channels, hue)
  for place, kind in enumerate(blends):
    channels = _blend(channels, kind, factors, place >= turn)
  return _join_channels(channels)


def _blend(channels: Channels, kind: jax.Array, factors: jax.Array, applied: jax.Array) -> Channels:
  """Brightness, contrast or saturation: from black, the mean grey or the grey, by a factor."""
  factor = jnp.take_along_axis(factors, kind[:, None], axis=1)[:, 0]
  factor, kind = _per_image(jnp.where(applied, factor, 1)), _per_image(kind)
  grey = _grey(channels)
  mean = grey.mean((1, 2), keepdims=True)
  base = jnp.where(kind == SATURATION, grey, jnp.where(kind == CONTRAST, mean, 0))
  offset = base * (1 - factor)

  def blend(channel: jax.Array) -> jax.Array:
    value = jnp.clip(channel * factor + offset, 0, 255)
    # Albumentations cuts off what its tables hold, and OpenCV rounds.
    return jnp.where(kind == SATURATION, jnp.rint(value), jnp.floor(value))

  # Or XLA goes through all earlier steps again for every mean.
  return jax.lax.optimization_barrier(_map(blend, channels))


def _grey(channels: Channels) -> jax.Array:
  """As OpenCV makes it from bytes, in 15 bits; float32 holds these whole numbers exactly."""
  red, green, blue = channels
  return jnp.floor((9798 * red + 19235 * green + 3735 * blue + 16384) / 32768)


def _change_hue(channels: Channels, turn: jax.Array) -> Channels:
  turn = _per_image(turn)
  hue, saturation, value = _to_hsv(channels)
  hue = _wrap(hue + jnp.floor(180 * turn), 180)
  changed = _from_hsv(hue, saturation, value)
  # Even without a turn, the way there and back rounds.
  red, green, blue = (jnp.where(turn == 0, *pair) for pair in zip(channels, changed, strict=True))
  return red, green, blue


def _to_hsv(channels: Channels) -> Channels:
  """Hue in 0..179, saturation and value in 0..255: whole numbers, rounded as OpenCV does."""
  red, green, blue = channels
  value = jnp.maximum(jnp.maximum(red, green), blue)
  span = value - jnp.minimum(jnp.minimum(red, green), blue)
  saturation = _times_rounded(span, 255, value)
  sixth = jnp.where(
    value == red,
    green - blue,
    jnp.where(value == green, blue - red + 2 * span, red - green + 4 * span),
  )
  hue = _times_rounded(sixth, 30, span)
  return _wrap(hue, 180), saturation, value


def _wrap(number: jax.Array, period: int) -> jax.Array:
  """`number`, less than one period away, in [0, period): a modulo calls a slow function."""
  number = jnp.where(number < 0, number + period, number)
  return jnp.where(number >= period, number - period, number)


def _times_rounded(number: jax.Array, factor: int, divisor: jax.Array) -> jax.Array:
  """number * factor / divisor to the nearest whole number, by OpenCV's factors of 12 bits."""
  reciprocal = jnp.where(divisor == 0, 0, jnp.rint((factor << 12) / jnp.maximum(divisor, 1)))
  product = number.astype(jnp.int32) * reciprocal.astype(jnp.int32)
  return (product + (1 << 11) >> 12).astype(jnp.float32)


def _from_hsv(hue: jax.Array, saturation: jax.Array, value: jax.Array) -> Channels:
  """The inverse of `_to_hsv`, cut off to whole numbers as OpenCV's vector code does.

  The constants are multiplied where OpenCV does it: what is cut off depends on the last bit.
  """
  saturation, value = saturation * jnp.float32(1 / 255), value * jnp.float32(1 / 255)
  sixth = hue * jnp.float32(1 / 30)
  sector = jnp.floor(sixth)
  rest = sixth - sector

  def channel(offset: int) -> jax.Array:
    place = _wrap(sector + offset, 6)
    lack = jnp.where(place == 0, rest, jnp.where(place == 3, 1 - rest, place < 3))
    return jnp.floor(value * (1 - saturation * lack) * 255)

  return channel(5), channel(3), channel(1)


def _color_jitter(
  *, brightness: float, contrast: float, saturation: float, hue: float, p: float
) -> DeviceOp:
  limits = {"brightness": brightness, "contrast": contrast, "saturation": saturation, "hue": hue}
  return DeviceOp(6, lambda u, epoch, size: draw_color_jitter(u, **limits, p=p), apply_color_jitter)


DEVICE_OPS: dict[str, Callable[..., DeviceOp]] = {
  "horizontal_flip": _horizontal_flip,
  "alternating_flip": _alternating_flip,
  "shift_scale_rotate": _shift_scale_rotate,
  "rotate": _rotate,
  "random_crop": _random_crop,
  "coarse_dropout": _coarse_dropout,
  "color_jitter": _color_jitter,
}
