"""The arguments of the augmentation's ops, which mean the same to every backend."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flax_cifar.errors import require

Fill = str | Sequence[float]
Rule = tuple[Callable[[Any], bool], str]  # what holds for a valid value, and how to say it
BORDERS = ("fill", "reflect")


def _within(low: float, high: float, unit: str) -> Rule:
  return lambda value: low <= value <= high, f"{unit} in [{low:g}, {high:g}]"


def _below_one(unit: str) -> Rule:
  return lambda value: 0 <= value < 1, f"{unit} in [0, 1)"


def _at_least(low: int, unit: str) -> Rule:
  return lambda value: value >= low, f"{low} or more {unit}"


SHARED_RULES: dict[str, Rule] = {
  "p": _within(0, 1, "a probability"),
  "border": (lambda value: value in BORDERS, " or ".join(map(repr, BORDERS))),
}
# Every op, with what holds for its arguments.
RULES: dict[str, dict[str, Rule]] = {
  "horizontal_flip": {},
  "alternating_flip": {},
  "shift_scale_rotate": {
    "shift": _below_one("a fraction"),
    "scale": _below_one("a fraction"),
    "rotate": _within(0, 180, "degrees"),
  },
  "rotate": {"limit": _within(0, 180, "degrees")},
  "random_crop": {"padding": _at_least(1, "pixels")},
  "coarse_dropout": {
    "holes": _at_least(1, "holes"),
    "height": _at_least(1, "pixels"),
    "width": _at_least(1, "pixels"),
  },
  "color_jitter": {
    "brightness": _within(0, 1, "a fraction"),
    "contrast": _within(0, 1, "a fraction"),
    "saturation": _within(0, 1, "a fraction"),
    "hue": _within(0, 0.5, "a fraction of the circle"),
  },
}


def resolve_arguments(
  name: str, arguments: Mapping[str, Any], mean: Sequence[float]
) -> dict[str, Any]:
  """The arguments of op `name`, checked, with `fill` as a value per channel.

  Raises:
    UserError: a value out of range; the message quotes the key and the value.
  """
  rules = SHARED_RULES | RULES[name]
  for key in rules.keys() & arguments.keys():
    is_valid, expected = rules[key]
    require(is_valid(arguments[key]), f"augment.{name}.{key}", arguments[key], expected)
  resolved = dict(arguments)
  if "fill" in arguments:
    resolved["fill"] = get_fill(arguments["fill"], mean)
  return resolved


def get_fill(fill: Fill, mean: Sequence[float]) -> tuple[float, ...]:
  """The named fill as a value per channel in 0..255: whole numbers, as uint8 images hold.

  Raises:
    UserError: neither "mean" nor "black" nor a whole number in 0..255 per channel.
  """
  if fill == "mean":
    return tuple(float(int(255 * m)) for m in mean)
  if fill == "black":
    return (0.0,) * len(mean)
  expected = '"mean", "black" or a whole number in 0..255 per channel'
  require(not isinstance(fill, str) and len(fill) == len(mean), "augment fill", fill, expected)
  require(all(v in range(256) for v in fill), "augment fill", fill, expected)
  return tuple(float(v) for v in fill)
