"""One random change per image on the device, of random strength: a policy like TrivialAugment."""

import jax.numpy as jnp
from jaxtyping import Array, Float32, Int32, UInt32

from flax_cifar.data.augment import arguments, device_color, device_pixels, device_random

KIND = {name: number for number, name in enumerate(arguments.TRIVIAL_KINDS)}
BLENDS = {  # the kinds that `device_color.blend` makes
  "brightness": device_color.BRIGHTNESS,
  "contrast": device_color.CONTRAST,
  "saturation": device_color.SATURATION,
}


def draw_trivial_augment(
  uniforms: Float32[Array, "n 3"], *, strength: float, p: float
) -> device_random.Drawn:
  """Draws which examples are changed, and the parameters of `apply_trivial_augment`.

  Args:
    uniforms: numbers in [0, 1).
    strength: largest size of a level, in [0, 1].
    p: probability that an example is changed.
  """
  coin, kind, level = uniforms.T
  params = {
    "kind": device_random.draw_integer(kind, len(KIND)),
    "level": device_random.draw_within(level, 0, strength),
  }
  return device_random.draw_coin(coin, p), params


def apply_trivial_augment(
  pixels: UInt32[Array, "n h w"],
  *,
  kind: Int32[Array, " n"],
  level: Float32[Array, " n"],
  interpolation: str,
  border: str,
  fill: device_pixels.Fill,
) -> UInt32[Array, "n h w"]:
  """Makes the change `kind` of each image, a number of KIND, by `level` in [-1, 1].

  `arguments.TRIVIAL_KINDS` says what a level means.

  Args:
    pixels: packed, see `device_pixels`.
    kind: of each image.
    level: of each image.
    interpolation: a key of `device_pixels.SAMPLERS`.
    border: "fill" or "reflect".
    fill: color of the border "fill".
  """
  moved = _move(pixels, kind, level, interpolation=interpolation, border=border, fill=fill)
  channels = _blend(device_pixels.split_channels(moved), kind, level)
  return device_pixels.join_channels(_quantize(channels, kind, level))


def _move(
  pixels: Array,
  kind: Array,
  level: Array,
  *,
  interpolation: str,
  border: str,
  fill: device_pixels.Fill,
) -> Array:
  """Shifts, shears and turns; one map for all images, which leaves those of other kinds alone."""
  _, height, width = pixels.shape

  def choose(name: str, amount: Array) -> Array:
    return jnp.where(kind == KIND[name], amount, jnp.zeros_like(amount))

  angle = choose("rotate", jnp.deg2rad(arguments.TRIVIAL_DEGREES * level))
  shear = arguments.TRIVIAL_FACTOR * level
  return device_pixels.warp(
    pixels,
    linear=(
      (jnp.cos(angle), -jnp.sin(angle) - choose("shear_x", shear)),
      (jnp.sin(angle) - choose("shear_y", shear), jnp.cos(angle)),
    ),
    shift_x=choose("shift_x", jnp.trunc(level * width)),
    shift_y=choose("shift_y", jnp.trunc(level * height)),
    interpolation=interpolation,
    border=border,
    fill=fill,
  )


def _blend(channels: device_pixels.Channels, kind: Array, level: Array) -> device_pixels.Channels:
  """Changes brightness, contrast or saturation."""
  blend, applied = jnp.zeros_like(kind), jnp.zeros(kind.shape, bool)
  for name, number in BLENDS.items():
    blend = jnp.where(kind == KIND[name], number, blend)
    applied |= kind == KIND[name]
  factors = jnp.tile((1 + arguments.TRIVIAL_FACTOR * level)[:, None], (1, len(BLENDS)))
  return device_color.blend(channels, blend, factors, applied)


def _quantize(
  channels: device_pixels.Channels, kind: Array, level: Array
) -> device_pixels.Channels:
  """Posterizes and solarizes."""
  size = jnp.abs(level)
  bits = jnp.rint(arguments.TRIVIAL_BITS * size).astype(jnp.int32)
  step = jnp.ldexp(jnp.float32(1), bits)  # exact everywhere, as exp2 need not be
  step = device_pixels.per_image(jnp.where(kind == KIND["posterize"], step, 1))
  # Above 255 no pixel is inverted.
  threshold = jnp.where(kind == KIND["solarize"], 255 * (1 - size), 256)
  threshold = device_pixels.per_image(threshold)

  def change(channel: Array) -> Array:
    channel = jnp.floor(channel / step) * step
    return jnp.where(channel >= threshold, 255 - channel, channel)

  return device_pixels.map_channels(change, channels)
