"""Learning-rate schedules: the share of the peak at each step, and reduce-on-plateau."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import optax

from flax_cifar.errors import choose, require

Schedule = Callable[[Any], Any]  # step -> share of the peak learning rate


MAX_STEPS = 2**31 - 1  # of a run, which counts them in int32
MAX_EPOCHS = 1_000_000  # of plateau's patience and cooldown


def to_steps(epochs: float, steps_per_epoch: int) -> int:
  """A duration in epochs as the nearest whole number of steps."""
  return round(epochs * steps_per_epoch)


def create_schedule(
  *, name: str, steps_per_epoch: int, total_epochs: int, **arguments: Mapping[str, Any]
) -> Schedule:
  """The schedule called `name` with `arguments[name]`; durations there are epochs.

  `plateau` is constant here: its scale is kept in the train state, see `create_plateau`.

  Raises:
    UserError: unknown name or an argument out of range.
  """
  create = choose("schedule.name", name, SCHEDULES)
  most = MAX_STEPS // steps_per_epoch
  expected = f"from 1 to {most:,}, with {steps_per_epoch:,} steps in each"
  require(0 < total_epochs <= most, "total_epochs", total_epochs, expected)
  return create(steps_per_epoch, total_epochs * steps_per_epoch, **arguments[name])


def _constant(steps_per_epoch: int, total_steps: int) -> Schedule:
  del steps_per_epoch, total_steps
  return optax.constant_schedule(1.0)


def _plateau(steps_per_epoch: int, total_steps: int, **arguments: float) -> Schedule:
  del arguments  # create_plateau reads them
  return _constant(steps_per_epoch, total_steps)


def _step(steps_per_epoch: int, total_steps: int, *, factor: float, every: float) -> Schedule:
  require(0 < factor <= 1, "schedule.step.factor", factor, "a fraction in (0, 1]")
  require(0 < every < math.inf, "schedule.step.every", every, "a positive number of epochs")
  # What lies beyond the run's end would not fit int32.
  steps = max(1, to_steps(min(every, total_steps / steps_per_epoch), steps_per_epoch))
  return optax.exponential_decay(1.0, steps, factor, staircase=True)


def _cosine(steps_per_epoch: int, total_steps: int, *, warmup: float, final: float) -> Schedule:
  valid = 0 <= warmup < math.inf and to_steps(warmup, steps_per_epoch) < total_steps
  require(valid, "schedule.cosine.warmup", warmup, "epochs, fewer than the run")
  warmup_steps = to_steps(warmup, steps_per_epoch)
  require(0 <= final <= 1, "schedule.cosine.final", final, "a fraction in [0, 1]")
  decay = optax.cosine_decay_schedule(1.0, total_steps - warmup_steps, alpha=final)
  if warmup_steps == 0:
    return decay
  rise = optax.linear_schedule(0.0, 1.0, warmup_steps)
  return optax.join_schedules([rise, decay], [warmup_steps])


def _one_cycle(
  steps_per_epoch: int, total_steps: int, *, initial: float, peak_at: float, final: float
) -> Schedule:
  """Straight lines; Smith and Topin 2017 (arXiv:1708.07120)."""
  del steps_per_epoch
  require(0 < peak_at < 1, "schedule.one_cycle.peak_at", peak_at, "a fraction in (0, 1)")
  require(0 <= initial <= 1, "schedule.one_cycle.initial", initial, "a fraction in [0, 1]")
  require(0 <= final <= 1, "schedule.one_cycle.final", final, "a fraction in [0, 1]")
  xs = jnp.array([0.0, peak_at * total_steps, total_steps])
  ys = jnp.array([initial, 1.0, final])
  return lambda step: jnp.interp(jnp.asarray(step, jnp.float32), xs, ys)


SCHEDULES: dict[str, Callable[..., Schedule]] = {
  "constant": _constant,
  "step": _step,
  "cosine": _cosine,
  "one_cycle": _one_cycle,
  "plateau": _plateau,
}


def create_plateau(
  *, factor: float, patience: int, threshold: float, cooldown: int, final: float
) -> optax.GradientTransformationExtraArgs:
  """Reduce-on-plateau with the meaning torch's ReduceLROnPlateau gives its arguments.

  torch reduces when the bad epochs in a row exceed `patience`, optax when they equal it: hence
  the one that is added.

  Args:
    factor: what the scale is multiplied by, in (0, 1).
    patience: bad epochs in a row that are endured.
    threshold: relative improvement of the loss that counts as one.
    cooldown: epochs after a reduction in which bad ones are not counted.
    final: the smallest scale, a fraction of the peak learning rate.

  Raises:
    UserError: an argument out of range.
  """
  require(0 < factor < 1, "schedule.plateau.factor", factor, "a fraction in (0, 1)")
  epochs = f"from 0 to {MAX_EPOCHS:,} epochs"
  require(0 <= patience <= MAX_EPOCHS, "schedule.plateau.patience", patience, epochs)
  require(0 < threshold <= 1, "schedule.plateau.threshold", threshold, "a fraction in (0, 1]")
  require(0 <= cooldown <= MAX_EPOCHS, "schedule.plateau.cooldown", cooldown, epochs)
  require(0 <= final < 1, "schedule.plateau.final", final, "a fraction in [0, 1)")
  return optax.contrib.reduce_on_plateau(
    factor, patience=patience + 1, rtol=threshold, atol=0.0, cooldown=cooldown, min_scale=final
  )
