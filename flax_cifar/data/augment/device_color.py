"""Color jitter on the device, with the rounding of OpenCV."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32, UInt32

from flax_cifar.data.augment import device_pixels, device_random

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # as A.ColorJitter numbers them
ORDERS = np.array(list(itertools.permutations(range(4))), np.int32)


def draw_color_jitter(
  uniforms: Float32[Array, "n 6"],
  *,
  brightness: float,
  contrast: float,
  saturation: float,
  hue: float,
  p: float,
) -> device_random.Drawn:
  """Draws which examples are changed, and the parameters of `apply_color_jitter`.

  Args:
    uniforms: numbers in [0, 1).
    brightness: largest distance of the factor from 1.
    contrast: the same.
    saturation: the same.
    hue: largest turn, a fraction of the color circle.
    p: probability that an example is changed.
  """
  coin, order, *factors = uniforms.T
  params = {
    "brightness": device_random.draw_within(factors[BRIGHTNESS], 1, brightness),
    "contrast": device_random.draw_within(factors[CONTRAST], 1, contrast),
    "saturation": device_random.draw_within(factors[SATURATION], 1, saturation),
    "hue": device_random.draw_within(factors[HUE], 0, hue),
    "order": jnp.asarray(ORDERS)[device_random.draw_integer(order, len(ORDERS))],
  }
  return device_random.draw_coin(coin, p), params


def apply_color_jitter(
  pixels: UInt32[Array, "n h w"],
  *,
  brightness: Float32[Array, " n"],
  contrast: Float32[Array, " n"],
  saturation: Float32[Array, " n"],
  hue: Float32[Array, " n"],
  order: Int32[Array, "n 4"],
) -> UInt32[Array, "n h w"]:
  """Changes brightness, contrast, saturation and hue, each image in its own order.

  Args:
    pixels: packed, see `device_pixels`.
    brightness: a factor of the pixels; 1 changes nothing.
    contrast: a factor of the distance to the image's mean gray.
    saturation: a factor of the distance to the pixel's gray.
    hue: a turn, a fraction of the color circle; 0 changes nothing.
    order: for each image a permutation of BRIGHTNESS, CONTRAST, SATURATION, HUE.
  """
  factors = jnp.stack([brightness, contrast, saturation], 1)
  # Changing the hue is expensive, so it happens once, between two loops over the other changes:
  # those that come before it and those that come after it.
  turn = jnp.argmax(order == HUE, 1)
  blends = [jnp.where(place < turn, order[:, place], order[:, place + 1]) for place in range(3)]
  channels = device_pixels.split_channels(pixels)
  for place, kind in enumerate(blends):
    channels = blend(channels, kind, factors, place < turn)
  channels = _change_hue(channels, hue)
  for place, kind in enumerate(blends):
    channels = blend(channels, kind, factors, place >= turn)
  return device_pixels.join_channels(channels)


def blend(
  channels: device_pixels.Channels, kind: Array, factors: Array, applied: Array
) -> device_pixels.Channels:
  """Changes brightness, contrast or saturation, whichever `kind` (N,) says, where `applied` (N,).

  A factor, `factors[n, kind[n]]`, scales the distance to black, to the image's mean gray or to the
  pixel's gray.
  """
  factor = jnp.take_along_axis(factors, kind[:, None], axis=1)[:, 0]
  factor, kind = (
    device_pixels.per_image(jnp.where(applied, factor, 1)),
    device_pixels.per_image(kind),
  )
  gray = _to_gray(channels)
  mean = gray.mean((1, 2), keepdims=True)
  base = jnp.where(kind == SATURATION, gray, jnp.where(kind == CONTRAST, mean, 0))
  offset = base * (1 - factor)

  def blend(channel: Array) -> Array:
    value = jnp.clip(channel * factor + offset, 0, 255)
    # The tables of Albumentations truncate, while OpenCV rounds.
    return jnp.where(kind == SATURATION, jnp.rint(value), jnp.floor(value))

  # Without the barrier XLA would repeat all earlier steps for every mean.
  return jax.lax.optimization_barrier(device_pixels.map_channels(blend, channels))


def _to_gray(channels: device_pixels.Channels) -> Array:
  """Computes gray from bytes in 15 bits as OpenCV does; float32 holds these integers exactly."""
  red, green, blue = channels
  return jnp.floor((9798 * red + 19235 * green + 3735 * blue + 16384) / 32768)


def _change_hue(channels: device_pixels.Channels, turn: Array) -> device_pixels.Channels:
  turn = device_pixels.per_image(turn)
  hue, saturation, value = _to_hsv(channels)
  hue = _wrap(hue + jnp.floor(180 * turn), 180)
  changed = _from_hsv(hue, saturation, value)
  # The conversion to HSV and back rounds even if the turn is 0.
  red, green, blue = (jnp.where(turn == 0, *pair) for pair in zip(channels, changed, strict=True))
  return red, green, blue


def _to_hsv(channels: device_pixels.Channels) -> device_pixels.Channels:
  """Converts to hue in 0..179, saturation and value in 0..255, integers rounded as OpenCV does."""
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


def _wrap(number: Array, period: int) -> Array:
  """Wraps `number`, less than one period away, into [0, period); a modulo would be slower."""
  number = jnp.where(number < 0, number + period, number)
  return jnp.where(number >= period, number - period, number)


def _times_rounded(number: Array, factor: int, divisor: Array) -> Array:
  """Rounds number * factor / divisor to an integer, with OpenCV's reciprocals of 12 bits."""
  reciprocal = jnp.where(divisor == 0, 0, jnp.rint((factor << 12) / jnp.maximum(divisor, 1)))
  product = number.astype(jnp.int32) * reciprocal.astype(jnp.int32)
  return (product + (1 << 11) >> 12).astype(jnp.float32)


def _from_hsv(hue: Array, saturation: Array, value: Array) -> device_pixels.Channels:
  """Inverts `_to_hsv` and truncates to integers as OpenCV's vector code does.

  The constants are multiplied at the same places as in OpenCV, because the truncation depends on
  the last bit.
  """
  saturation, value = saturation * jnp.float32(1 / 255), value * jnp.float32(1 / 255)
  sixth = hue * jnp.float32(1 / 30)
  sector = jnp.floor(sixth)
  rest = sixth - sector

  def channel(offset: int) -> Array:
    place = _wrap(sector + offset, 6)
    lack = jnp.where(place == 0, rest, jnp.where(place == 3, 1 - rest, place < 3))
    return jnp.floor(value * (1 - saturation * lack) * 255)

  return channel(5), channel(3), channel(1)
