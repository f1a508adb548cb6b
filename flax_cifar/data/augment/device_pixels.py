"""Packed pixels on the device: reading at whole and fractional coordinates.

A pixel is one uint32 with red in the lowest byte: on a CPU, gathering one word takes about half the
time of gathering three bytes.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32, Shaped, UInt8, UInt32

Fill = tuple[float, ...]  # red, green, blue: whole numbers in 0..255
Read = Callable[[Array, Array], Array]  # row, column -> pixels, each (N, H, W)
Channel = Float32[Array, "n h w"]  # whole numbers in 0..255
Channels = tuple[Channel, Channel, Channel]  # red, green, blue


# ---- Packed pixels


def pack(images: UInt8[Array, "n h w 3"]) -> UInt32[Array, "n h w"]:
  """Packs images into pixels."""
  red, green, blue = (images[..., channel].astype(jnp.uint32) for channel in range(3))
  return red | green << 8 | blue << 16


def unpack(pixels: UInt32[Array, "n h w"]) -> UInt8[Array, "n h w 3"]:
  """Unpacks pixels into images, the inverse of `pack`."""
  return jax.lax.bitcast_convert_type(pixels, jnp.uint8)[..., :3]


def pack_fill(fill: Fill) -> UInt32[Array, ""]:
  """Packs a color into a pixel."""
  red, green, blue = (int(value) for value in fill)
  return jnp.uint32(red | green << 8 | blue << 16)


def split_channels(pixels: UInt32[Array, "n h w"]) -> Channels:
  """Splits pixels into their three channels."""
  red, green, blue = ((pixels >> shift & 255).astype(jnp.float32) for shift in (0, 8, 16))
  return red, green, blue


def join_channels(channels: Channels) -> UInt32[Array, "n h w"]:
  """Joins three channels into pixels, the inverse of `split_channels`."""
  red, green, blue = (channel.astype(jnp.uint32) for channel in channels)
  return red | green << 8 | blue << 16


def map_channels(function: Callable[[Array], Array], channels: Channels) -> Channels:
  """Applies `function` to each channel."""
  red, green, blue = map(function, channels)
  return red, green, blue


def per_image(values: Shaped[Array, " n"]) -> Shaped[Array, "n 1 1"]:
  """Gives values per image the axes that broadcast over the pixels of each image."""
  return values[:, None, None]


def get_grid(
  pixels: UInt32[Array, "n h w"],
) -> tuple[Int32[Array, "1 h 1"], Int32[Array, "1 1 w"]]:
  """Returns the row and the column of each pixel."""
  _, height, width = pixels.shape
  return jnp.arange(height)[None, :, None], jnp.arange(width)[None, None, :]


# ---- Reading pixels


def read_pixels(
  pixels: UInt32[Array, "n h w"],
  row: Int32[Array, "#n #h #w"],
  column: Int32[Array, "#n #h #w"],
  *,
  border: str,
  fill: Fill,
) -> UInt32[Array, "n h w"]:
  """Reads the pixels at whole coordinates, which may lie outside the image.

  Args:
    pixels: the images.
    row: int32, broadcastable to (N, H, W).
    column: the same.
    border: "fill" or "reflect".
    fill: color of the border "fill".
  """
  _, height, width = pixels.shape
  if border == "reflect":
    return _gather(pixels, _reflect(row, height), _reflect(column, width))
  inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
  nearest = _gather(pixels, row.clip(0, height - 1), column.clip(0, width - 1))
  return jnp.where(inside, nearest, pack_fill(fill))


def _reflect(index: Array, size: int) -> Array:
  """Maps an index into the image as OpenCV's BORDER_REFLECT_101: ... 2 1 0 1 ... n-2 n-1 n-2 ..."""
  period = max(2 * size - 2, 1)
  distance = jax.lax.rem(jnp.abs(index), jnp.int32(period))
  return jnp.minimum(distance, period - distance)


def _gather(pixels: Array, row: Array, column: Array) -> Array:
  index = jnp.broadcast_to(row * pixels.shape[2] + column, pixels.shape)
  # It reads along an axis, so that a batch that is split over devices stays where it is.
  flat, index = (x.reshape(len(pixels), -1) for x in (pixels, index))
  read = jnp.take_along_axis(flat, index, axis=1, mode="promise_in_bounds")
  return read.reshape(pixels.shape)


def _sample_nearest(read: Read, row: Array, column: Array, away_x: Array, away_y: Array) -> Array:
  """Reads the pixel nearest to each point, which lies at (row + away_y, column + away_x)."""
  x, y = (jnp.floor(away + 0.5).astype(jnp.int32) for away in (away_x, away_y))
  return read(row + y, column + x)


def _sample_bilinear(read: Read, row: Array, column: Array, away_x: Array, away_y: Array) -> Array:
  """Averages the four neighbors of each point, weighted by area; each may lie in the border."""
  floor_x, floor_y = jnp.floor(away_x), jnp.floor(away_y)
  row, column = row + floor_y.astype(jnp.int32), column + floor_x.astype(jnp.int32)
  above = _mix(read(row, column), read(row, column + 1), away_x - floor_x)
  below = _mix(read(row + 1, column), read(row + 1, column + 1), away_x - floor_x)
  mixed = _lerp(above, below, away_y - floor_y)
  return join_channels(map_channels(jnp.rint, mixed))


def _mix(left: Array, right: Array, weight: Array) -> Channels:
  return _lerp(split_channels(left), split_channels(right), weight)


def _lerp(first: Channels, second: Channels, weight: Array) -> Channels:
  red, green, blue = (a + weight * (b - a) for a, b in zip(first, second, strict=True))
  return red, green, blue


SAMPLERS = {"nearest": _sample_nearest, "bilinear": _sample_bilinear}


def warp(
  pixels: UInt32[Array, "n h w"],
  *,
  linear: tuple[tuple[Array, Array], tuple[Array, Array]],
  shift_x: Float32[Array, " n"],
  shift_y: Float32[Array, " n"],
  interpolation: str,
  border: str,
  fill: Fill,
) -> UInt32[Array, "n h w"]:
  """Reads each pixel of the result where an affine map about the center leads.

  Args:
    pixels: the images.
    linear: rows of the map from a place in the result, (x, y) from the center and without the
      shift, to its source: float32 (N,) each.
    shift_x, shift_y: of the result, in pixels to the right and down.
    interpolation: a key of SAMPLERS.
    border: "fill" or "reflect".
    fill: color of the border "fill".
  """
  (xx, xy), (yx, yy) = (tuple(map(per_image, row)) for row in linear)
  shift_x, shift_y = per_image(shift_x), per_image(shift_y)
  row, column = get_grid(pixels)
  u = column - (pixels.shape[2] - 1) / 2 - shift_x
  v = row - (pixels.shape[1] - 1) / 2 - shift_y
  # The distance to the source instead of its position: small numbers are more precise.
  away_x = (xx - 1) * u + xy * v - shift_x
  away_y = yx * u + (yy - 1) * v - shift_y
  read = partial(read_pixels, pixels, border=border, fill=fill)
  return SAMPLERS[interpolation](read, row, column, away_x, away_y)
