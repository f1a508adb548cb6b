"""Looks for a learning rate: trains some steps while it grows, and draws the loss against it.

  python -m flax_cifar.tools.find_lr --config=configs/s9.py --config.batch_size=256

The range test of Smith 2017 (arXiv:1506.01186), with exponential growth. Training ends where the
smoothed loss is four times its lowest value, or not finite. The suggestion is the rate at which the
smoothed loss has fallen half of its way to the lowest value; a tenth of the rate with the lowest
loss is another rule. Both are places to start from, no more: compare rates on validation images
(`:trial,lr=R`).
"""

import argparse
import contextlib
import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from flax_cifar import environment, errors, files
from flax_cifar.tools import command_line

DIVERGED = 4.0  # times the lowest smoothed loss
SMOOTHING = 0.9  # per step
BORDER = 5  # steps at the start, where the average has few values, and at the end
ROWS = 12  # printed
LEAST = 20  # steps
LOWEST = 1e-30  # rate
NOISE = 1.0  # least fall of the smoothed loss, in standard deviations of the losses around it


@dataclasses.dataclass(frozen=True)
class RangeTest:
  """The curve and what follows from it.

  Attributes:
    rates: the learning rate of each step.
    losses: in nats, the mean of the step's batch.
    smoothed: a moving average of them.
    halfway: the rate at which `smoothed` has fallen half of its way.
    lowest: the rate at which it is lowest.
    diverged: whether training ended before the last rate.
    still_falls: whether the loss still fell at the last rate, so that a higher one may be better.
  """

  rates: np.ndarray
  losses: np.ndarray
  smoothed: np.ndarray
  halfway: float
  lowest: float
  diverged: bool
  still_falls: bool


def main() -> None:
  with command_line.one_line_errors():
    options, config = parse(sys.argv[1:])
    environment.check_devices()
    found = find(config, low=options.low, high=options.high, num_steps=options.steps)
    report(found, config, options)


def create_parser() -> command_line.Parser:
  """The flags."""
  parser = command_line.create_parser("find_lr", __doc__)
  parser.add_argument("--low", type=float, default=1e-5, help="the first rate; default: 1e-5")
  parser.add_argument("--high", type=float, default=10.0, help="the last rate; default: 10")
  parser.add_argument(
    "--steps", type=int, default=200, help="steps to train, made whole epochs; default: 200"
  )
  parser.add_argument("--out", default="lr.png", help="the picture; '' draws none; default: lr.png")
  parser.add_argument("--json", action="store_true", help="print JSON")
  return parser


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, ConfigDict]:
  """The options of a command line, and its config.

  Raises:
    UserError: something is missing, unknown or out of range.
  """
  options, config = command_line.parse_with_config(create_parser(), arguments)
  is_possible = LEAST <= options.steps <= errors.MAX_STEPS
  errors.require(is_possible, "--steps", options.steps, f"from {LEAST} to {errors.MAX_STEPS}")
  for name in ("low", "high"):
    rate = getattr(options, name)
    is_possible = LOWEST <= rate <= errors.MAX_NUMBER
    expected = f"from {LOWEST:g} to {errors.MAX_NUMBER:g}, which float32 can hold"
    errors.require(is_possible, f"--{name}", rate, expected)
  options.out = command_line.get_out("--out", options.out, ".png") if options.out else None
  return options, config


def report(found: RangeTest, config: ConfigDict, options: argparse.Namespace) -> None:
  """Draws and prints the result."""
  drawn = bool(options.out) and draw(found, options.out)
  if options.json:
    print(files.encode_json(describe(found)))  # the last loss may be no number
  else:
    print(format_result(found, config, options.out if drawn else None))


def draw(found: RangeTest, out: pathlib.Path) -> bool:
  """Draws the curve; returns whether that was possible."""
  from flax_cifar.run import plots

  return plots.save_range_test(out, found.rates, found.losses, found.smoothed, found.halfway)


def find(config: ConfigDict, *, low: float, high: float, num_steps: int) -> RangeTest:
  """Trains `num_steps` steps, or whole epochs where the data have fewer, from rate low to high.

  Raises:
    UserError: the rates are out of order or too far apart, the loss falls by no more than noise, or
      as a run of `config` would.
  """
  from flax_cifar.tools import first_steps  # it brings JAX

  widest = 1e10
  expected = f"above --low={low:g}, by a factor of at most {widest:g}"
  errors.require(low < high <= widest * low, "--high", high, expected)
  first_steps.check(config)
  setup = first_steps.set_up(change(config, low=low, high=high, num_steps=num_steps), num_steps)
  epoch = setup.feed.steps_per_epoch
  steps = range(epoch * -(-num_steps // epoch))
  losses: list[float] = []
  with contextlib.closing(setup.feed):
    for _, sums in first_steps.iterate(setup, setup.state, steps):
      losses.append(float(sums["loss_sum"] / sums["count"]))
      if has_diverged(losses):
        break
  rates = np.array([low * float(setup.schedule(step)) for step in steps[: len(losses)]])
  return analyze(rates, losses)


def change(config: ConfigDict, *, low: float, high: float, num_steps: int) -> ConfigDict:
  """`config` with the schedule of the test, and with images for `num_steps` in an epoch at most."""
  changed = config.copy_and_resolve_references()
  changed.optimizer.learning_rate = low
  changed.schedule.name = "exponential"
  changed.schedule.exponential.final = high / low
  changed.total_epochs = 1
  changed.steps_per_call = 1  # so that it can end when the loss grows
  images = num_steps * changed.batch_size
  changed.data.limit = min(changed.data.limit or images, images)
  return changed


def has_diverged(losses: Sequence[float]) -> bool:
  """Whether the last smoothed loss is far above the lowest one, or not a number.

  >>> has_diverged([2.0] * 30), has_diverged([2.0] * 30 + [20.0] * 30)
  (False, True)
  """
  smoothed = smooth(losses)
  return not smoothed[-1] <= DIVERGED * smoothed.min()


def smooth(losses: Sequence[float]) -> np.ndarray:
  """The moving average of some values, in which the first ones weigh no more than others."""
  from scipy import signal

  totals = signal.lfilter([1 - SMOOTHING], [1, -SMOOTHING], losses)
  return np.asarray(totals / (1 - SMOOTHING ** np.arange(1, len(losses) + 1)))


def analyze(rates: np.ndarray, losses: Sequence[float]) -> RangeTest:
  """The suggestions of a curve.

  Raises:
    UserError: it ended before it fell anywhere.
  """
  smoothed = smooth(losses)
  lowest = int(np.nanargmin(smoothed))
  start, end = smoothed[min(BORDER, lowest)], smoothed[lowest]
  noise = float(np.std(losses[: max(lowest, 2)] - smoothed[: max(lowest, 2)]))
  if not start - end > NOISE * noise:
    raise errors.UserError(
      f"the loss did not fall by more than its noise, {noise:.2g}, between the rates "
      f"{rates[0]:.2g} and {rates[-1]:.2g}; choose a lower --low, a higher --high, or more --steps."
    )
  # The last step above the middle: noise before the fall may cross it too, but not for long.
  above = np.flatnonzero(smoothed[:lowest] >= (start + end) / 2)
  return RangeTest(
    rates=rates,
    losses=np.array(losses),
    smoothed=smoothed,
    halfway=float(rates[above[-1]]),
    lowest=float(rates[lowest]),
    diverged=has_diverged(losses),
    still_falls=lowest >= len(losses) - BORDER,
  )


def describe(found: RangeTest) -> dict[str, Any]:
  """The result as JSON has it."""
  return {
    "suggestion": found.halfway,
    "tenth_of_lowest": found.lowest / 10,
    "lowest": found.lowest,
    "diverged": found.diverged,
    "still_falls": found.still_falls,
    "rates": [float(f"{rate:.4g}") for rate in found.rates],
    "losses": [float(f"{loss:.4g}") for loss in found.losses],
  }


def format_result(found: RangeTest, config: ConfigDict, out: pathlib.Path | None) -> str:
  """Lines for the screen: a part of the curve, and what follows."""
  from flax_cifar.run import tables

  rows = [["learning rate", "loss", "smoothed"]]
  for i in np.linspace(0, len(found.rates) - 1, min(ROWS, len(found.rates))).round().astype(int):
    rows.append([f"{found.rates[i]:.2g}", f"{found.losses[i]:.3f}", f"{found.smoothed[i]:.3f}"])
  end = "the loss grew too large" if found.diverged else "the last rate"
  return "\n".join(
    [
      *tables.format_text(rows, [False, True, True]),
      f"ended after {len(found.rates)} steps: {end}",
      f"suggestion {found.halfway:.2g}, where the loss has fallen half of its way",
      f"a tenth of the rate with the lowest loss is {found.lowest / 10:.2g}; the config has "
      f"{config.optimizer.learning_rate:g}",
      *(["the loss still fell at the last rate: choose a higher --high"] * found.still_falls),
      *([f"picture {out}"] if out else []),
    ]
  )


if __name__ == "__main__":
  environment.apply_settings()
  main()
