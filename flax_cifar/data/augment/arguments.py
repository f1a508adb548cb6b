"""The arguments of the augmentation's ops, which mean the same in every backend."""

import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flax_cifar import errors

Fill = str | Sequence[float]
Rule = tuple[Callable[[Any], bool], str]  # whether a value is valid, and what it must be
BORDERS = ("fill", "reflect")
INTERPOLATIONS = ("nearest", "bilinear")
MAX_PIXELS = 512  # of an image's side, of a padding and of a hole
MAX_HOLES = 100  # each hole is a part of the compiled program


# The changes of trivial_augment, at a level in [-1, 1]; TrivialAugment (Müller and Hutter 2021,
# arXiv:2103.10158) in its "wide" ranges, without autocontrast, equalization and sharpness.
TRIVIAL_KINDS = (
  "identity",
  *("shift_x", "shift_y"),  # by level times the width or height, truncated to whole pixels
  *("shear_x", "shear_y"),  # by TRIVIAL_FACTOR * level pixels for each pixel
  "rotate",  # by TRIVIAL_DEGREES * level
  *("brightness", "contrast", "saturation"),  # times 1 + TRIVIAL_FACTOR * level
  "posterize",  # drops TRIVIAL_BITS * |level| of the eight bits
  "solarize",  # inverts what is at or above 255 * (1 - |level|)
)
TRIVIAL_DEGREES, TRIVIAL_FACTOR, TRIVIAL_BITS = 135.0, 0.99, 6


def within(low: float, high: float, unit: str) -> Rule:
  """The rule for a number in [low, high], in `unit`."""
  return lambda value: low <= value <= high, f"{unit} in [{low:g}, {high:g}]"


def below_one(unit: str) -> Rule:
  """The rule for a number in [0, 1), in `unit`."""
  return lambda value: 0 <= value < 1, f"{unit} in [0, 1)"


def one_of(choices: tuple[str, ...]) -> Rule:
  """The rule for text that is one of `choices`."""
  return lambda value: value in choices, " or ".join(map(repr, choices))


SHARED_RULES: dict[str, Rule] = {
  "p": within(0, 1, "a probability"),
  "border": one_of(BORDERS),
  "interpolation": one_of(INTERPOLATIONS),
}
# The rules of each op's own arguments.
RULES: dict[str, dict[str, Rule]] = {
  "horizontal_flip": {},
  "alternating_flip": {},
  "shift_scale_rotate": {
    "shift": below_one("a fraction"),
    "scale": within(0, 0.99, "a fraction"),  # at 1 an image could shrink to nothing
    "rotate": within(0, 180, "degrees"),
  },
  "rotate": {"limit": within(0, 180, "degrees")},
  "random_crop": {"padding": within(1, MAX_PIXELS, "pixels")},
  "coarse_dropout": {
    "holes": within(1, MAX_HOLES, "holes"),
    "height": within(1, MAX_PIXELS, "pixels"),
    "width": within(1, MAX_PIXELS, "pixels"),
  },
  "color_jitter": {
    "brightness": within(0, 1, "a fraction"),
    "contrast": within(0, 1, "a fraction"),
    "saturation": within(0, 1, "a fraction"),
    "hue": within(0, 0.5, "a fraction of the circle"),
  },
  "trivial_augment": {"strength": within(0, 1, "a fraction")},
}


def resolve_arguments(
  name: str, arguments: Mapping[str, Any], mean: Sequence[float]
) -> dict[str, Any]:
  """Checks the arguments of op `name` and returns them with `fill` as a value per channel.

  Args:
    name: a key of RULES.
    arguments: of the op.
    mean: the color that the fill "mean" stands for, per channel in [0, 1].

  Raises:
    UserError: a value out of range; the message quotes the key and the value.
  """
  check_channels("augment.mean", mean)
  rules = SHARED_RULES | RULES[name]
  for key in rules.keys() & arguments.keys():
    is_valid, expected = rules[key]
    errors.require(is_valid(arguments[key]), f"augment.{name}.{key}", arguments[key], expected)
  resolved = dict(arguments)
  if "fill" in arguments:
    resolved["fill"] = get_fill(f"augment.{name}.fill", arguments["fill"], mean)
  return resolved


def check_image_size(image_size: int) -> None:
  """Raises a UserError unless it is a side that images may have, in pixels."""
  expected = f"from 1 to {MAX_PIXELS} pixels"
  errors.require(1 <= image_size <= MAX_PIXELS, "data.image_size", image_size, expected)


def check_channels(key: str, values: Sequence[float], *, low: float = 0.0) -> None:
  """Raises a UserError unless `values` are a number in [low, 1] for each of the three channels."""
  valid = [isinstance(value, numbers.Real) and low <= value <= 1 for value in values]
  errors.require(
    valid == [True] * 3, key, values, f"three numbers in [{low:g}, 1]: red, green, blue"
  )


def get_fill(key: str, fill: Fill, mean: Sequence[float]) -> tuple[float, ...]:
  """Returns the color of a fill: per channel a whole number in 0..255, as uint8 images hold.

  >>> get_fill("augment.rotate.fill", "mean", (0.49, 0.48, 0.447))
  (124.0, 122.0, 113.0)
  >>> get_fill("augment.rotate.fill", "125,30,200", (0.49, 0.48, 0.447))
  (125.0, 30.0, 200.0)

  Args:
    key: the config key of the fill, for the message.
    fill: "mean", "black", or a whole number in 0..255 per channel, as a sequence or as text
      like "125,30,200".
    mean: the color of "mean", per channel in [0, 1]; it is truncated to whole numbers, not rounded.

  Raises:
    UserError: `fill` is none of these.
  """
  if fill == "mean":
    return tuple(float(int(255 * m)) for m in mean)
  if fill == "black":
    return (0.0,) * len(mean)
  expected = '"mean", "black" or a whole number in 0..255 per channel, as in "125,30,200"'
  values = _read_numbers(fill) if isinstance(fill, str) else fill
  errors.require(len(values) == len(mean), key, fill, expected)
  errors.require(all(v in range(256) for v in values), key, fill, expected)
  return tuple(float(v) for v in values)


def _read_numbers(text: str) -> list[float]:
  """Reads text like "125,30,200", which a config can hold where its default is text.

  Returns an empty list for other text.
  """
  parts = [part.strip() for part in text.strip("()").split(",")]
  return [float(part) for part in parts] if all(map(str.isdecimal, parts)) else []
