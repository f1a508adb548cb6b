"""Optimizers with the weight decay that their users expect, and learning-rate schedules."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from flax_cifar import errors, muon
from flax_cifar.models import blocks, norms
from flax_cifar.parallel import mesh as mesh_lib

Schedule = Callable[[Any], Any]  # step -> learning rate, as a factor of the peak
Mask = Callable[[Any], Any] | None

FIXED = (norms.FIXED_SCALE, blocks.FIXED_KERNEL)  # names of parameters that training keeps
MAX_PATIENCE = 1_000_000  # of plateau's patience and cooldown


# ---- Schedules


def to_steps(epochs: float, steps_per_epoch: int) -> int:
  """A duration in epochs as the nearest whole number of steps."""
  return round(epochs * steps_per_epoch)


def create_schedule(
  *, name: str, steps_per_epoch: int, total_epochs: int, **arguments: Mapping[str, Any]
) -> Schedule:
  """The schedule called `name` with `arguments[name]`; durations there are epochs.

  `plateau` is constant here: its scale is kept in the train state, see `create_plateau`.

  >>> triangle = {"initial": 0.0, "peak_at": 0.25, "final": 0.0}
  >>> lr = create_schedule(name="one_cycle", steps_per_epoch=10, total_epochs=4, one_cycle=triangle)
  >>> [float(lr(step)) for step in (0, 5, 10, 25, 40)]
  [0.0, 0.5, 1.0, 0.5, 0.0]

  Raises:
    UserError: unknown name or an argument out of range.
  """
  create = errors.choose("schedule.name", name, SCHEDULES)
  most = errors.MAX_STEPS // steps_per_epoch
  expected = f"from 1 to {most:,}, with {steps_per_epoch:,} steps in each"
  errors.require(0 < total_epochs <= most, "total_epochs", total_epochs, expected)
  return create(steps_per_epoch, total_epochs * steps_per_epoch, **arguments[name])


def _constant(steps_per_epoch: int, total_steps: int) -> Schedule:
  del steps_per_epoch, total_steps
  return optax.constant_schedule(1.0)


def _plateau(steps_per_epoch: int, total_steps: int, **arguments: float) -> Schedule:
  del arguments  # create_plateau reads them
  return _constant(steps_per_epoch, total_steps)


def _step(steps_per_epoch: int, total_steps: int, *, factor: float, every: float) -> Schedule:
  errors.require(0 < factor <= 1, "schedule.step.factor", factor, "a fraction in (0, 1]")
  errors.require(0 < every < math.inf, "schedule.step.every", every, "a positive number of epochs")
  # Steps beyond the end of the run would not fit int32.
  steps = max(1, to_steps(min(every, total_steps / steps_per_epoch), steps_per_epoch))
  return optax.exponential_decay(1.0, steps, factor, staircase=True)


def _exponential(steps_per_epoch: int, total_steps: int, *, final: float) -> Schedule:
  """`final ** (step / total_steps)`: a straight line on a logarithmic scale."""
  del steps_per_epoch
  expected = "from 1e-10 to 1e10"
  errors.require(1e-10 <= final <= 1e10, "schedule.exponential.final", final, expected)
  return optax.exponential_decay(1.0, total_steps, final)


def _cosine(steps_per_epoch: int, total_steps: int, *, warmup: float, final: float) -> Schedule:
  valid = 0 <= warmup < math.inf and to_steps(warmup, steps_per_epoch) < total_steps
  errors.require(valid, "schedule.cosine.warmup", warmup, "epochs, fewer than the run")
  warmup_steps = to_steps(warmup, steps_per_epoch)
  errors.require(0 <= final <= 1, "schedule.cosine.final", final, "a fraction in [0, 1]")
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
  errors.require(0 < peak_at < 1, "schedule.one_cycle.peak_at", peak_at, "a fraction in (0, 1)")
  errors.require(0 <= initial <= 1, "schedule.one_cycle.initial", initial, "a fraction in [0, 1]")
  errors.require(0 <= final <= 1, "schedule.one_cycle.final", final, "a fraction in [0, 1]")
  points = np.array([0.0, peak_at * total_steps, total_steps], np.float32)
  factors = np.array([initial, 1.0, final], np.float32)

  def get_factor(step: Any) -> jax.Array:
    xs, ys = jnp.asarray(points), jnp.asarray(factors)
    # jnp.interp would search for the segment in a loop, for whose end a GPU waits.
    step = jnp.minimum(jnp.asarray(step, jnp.float32), xs[2])
    i = jnp.asarray(step >= xs[1], jnp.int32)
    return ys[i] + (step - xs[i]) / (xs[i + 1] - xs[i]) * (ys[i + 1] - ys[i])

  return get_factor


SCHEDULES: dict[str, Callable[..., Schedule]] = {
  "constant": _constant,
  "step": _step,
  "exponential": _exponential,
  "cosine": _cosine,
  "one_cycle": _one_cycle,
  "plateau": _plateau,
}


# ---- Reduce on plateau


@dataclasses.dataclass(frozen=True)
class Plateau:
  """Reduce-on-plateau with the meaning torch's ReduceLROnPlateau gives its arguments.

  Attributes:
    enabled: whether the learning rate follows the validation loss; if not, its factor stays 1.
    transform: optax's, whose state has the factor as `scale`.
  """

  enabled: bool
  transform: optax.GradientTransformationExtraArgs

  def init(self, params: Any) -> Any:
    """The state before the first epoch."""
    return self.transform.init(params)

  def observe(self, state: Any, loss: jax.Array) -> Any:
    """The state after an epoch with the validation `loss`, a float ()."""
    return self.transform.update({}, state, value=loss)[1] if self.enabled else state


def create_plateau(
  *,
  enabled: bool,
  factor: float,
  patience: int,
  threshold: float,
  cooldown: int,
  final: float,
) -> Plateau:
  """Reduce-on-plateau; it reduces when the loss has not improved for more than `patience` epochs.

  torch reduces when the epochs without improvement exceed `patience`, optax when they equal it:
  this is why one is added.

  Args:
    enabled: whether it does anything.
    factor: what the learning rate is multiplied by, in (0, 1).
    patience: epochs without improvement that are tolerated.
    threshold: relative improvement of the loss that counts as one.
    cooldown: epochs after a reduction in which a lack of improvement is not counted.
    final: the smallest learning rate, as a factor of the peak.

  Raises:
    UserError: an argument out of range.
  """
  errors.require(0 < factor < 1, "schedule.plateau.factor", factor, "a fraction in (0, 1)")
  epochs = f"from 0 to {MAX_PATIENCE:,} epochs"
  errors.require(0 <= patience <= MAX_PATIENCE, "schedule.plateau.patience", patience, epochs)
  errors.require(
    0 < threshold <= 1, "schedule.plateau.threshold", threshold, "a fraction in (0, 1]"
  )
  errors.require(0 <= cooldown <= MAX_PATIENCE, "schedule.plateau.cooldown", cooldown, epochs)
  errors.require(0 <= final < 1, "schedule.plateau.final", final, "a fraction in [0, 1)")
  transform = optax.contrib.reduce_on_plateau(
    factor, patience=patience + 1, rtol=threshold, atol=0.0, cooldown=cooldown, min_scale=final
  )
  return Plateau(enabled, transform)


def compute_lr_factor(schedule: Schedule, step: int, plateau_state: Any, mesh: Mesh) -> np.ndarray:
  """The learning rate of `step` as a factor of the peak: float64 () or (seeds,)."""
  return np.asarray(schedule(step) * mesh_lib.fetch(plateau_state.scale, mesh), np.float64)


# ---- Optimizers


def kernels_only(params: Any) -> Any:
  """True for kernels, False for biases and norm parameters; a decay mask."""
  return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def trainable_mask(params: Any) -> Any:
  """False for parameters that training keeps, such as a whitening kernel; True for all others.

  Their gradient is 0, but weight decay would shrink them.
  """

  def is_trainable(path: Any, _: Any) -> bool:
    return getattr(path[-1], "key", None) not in FIXED

  return jax.tree_util.tree_map_with_path(is_trainable, params)


def create_optimizer(
  schedule: Schedule,
  *,
  name: str,
  learning_rate: float,
  weight_decay: float,
  decay_all: bool,
  **arguments: Mapping[str, Any],
) -> optax.GradientTransformation:
  """The optimizer called `name` with `arguments[name]`, for the leaves of `trainable_mask`.

  Args:
    schedule: step -> learning rate, as a factor of the peak.
    name: a key of OPTIMIZERS.
    learning_rate: the peak.
    weight_decay: `sgd` adds weight_decay * p to the gradient before momentum, as torch does;
      `adamw` and `muon` decouple it from the gradient.
    decay_all: False leaves biases and norm parameters undecayed.
    **arguments: the arguments of each optimizer.

  Raises:
    UserError: unknown name or a value out of range.
  """
  create = errors.choose("optimizer.name", name, OPTIMIZERS)
  most = errors.MAX_NUMBER
  positive, decay = 0 < learning_rate <= most, 0 <= weight_decay <= most
  errors.require(positive, "optimizer.learning_rate", learning_rate, "positive and finite")
  errors.require(decay, "optimizer.weight_decay", weight_decay, "0 or more and finite")

  def rate(step: Any) -> Any:
    return learning_rate * schedule(step)

  mask = None if decay_all else kernels_only
  return optax.masked(create(rate, weight_decay, mask, **arguments[name]), trainable_mask)


def _sgd(
  rate: Schedule, weight_decay: float, mask: Mask, *, momentum: float, nesterov: bool
) -> optax.GradientTransformation:
  check_decay("optimizer.sgd.momentum", momentum)
  return optax.chain(
    optax.add_decayed_weights(weight_decay, mask),
    optax.sgd(rate, momentum=momentum, nesterov=nesterov),
  )


def _adamw(
  rate: Schedule, weight_decay: float, mask: Mask, *, b1: float, b2: float, epsilon: float
) -> optax.GradientTransformation:
  check_decay("optimizer.adamw.b1", b1)
  check_decay("optimizer.adamw.b2", b2)
  errors.check_epsilon("optimizer.adamw.epsilon", epsilon)
  return optax.adamw(rate, b1=b1, b2=b2, eps=epsilon, weight_decay=weight_decay, mask=mask)


def _muon(
  rate: Schedule, weight_decay: float, mask: Mask, *, momentum: float, rms: float
) -> optax.GradientTransformation:
  """Orthogonal updates for dense kernels, NAdam for all else, at the same learning rate.

  Sources: Jordan et al. 2024 (kellerjordan.github.io/posts/muon); Liu et al. 2025
  (arXiv:2502.16982) for updates whose root mean square is that of Adam's, `rms`.
  """
  check_decay("optimizer.muon.momentum", momentum)
  errors.require(0 < rms <= errors.MAX_NUMBER, "optimizer.muon.rms", rms, "positive and finite")
  create = muon.create if jax.default_backend() == "gpu" else optax.contrib.muon
  decayed = create(
    rate,
    beta=momentum,
    weight_decay=weight_decay,
    adam_weight_decay=weight_decay,
    consistent_rms=rms,
    muon_weight_dimension_numbers=muon.get_matrices,
  )
  # The mask it takes is for matrices alone, and all of them are kernels.
  return optax.partition({True: decayed, False: optax.nadam(rate)}, mask) if mask else decayed


def check_decay(key: str, decay: float) -> None:
  """Raises a UserError unless `decay` is in [0, 1) in float32 too."""
  # Closer to 1, float32 rounds to 1, and an average that divides by 1 - decay would be NaN.
  errors.require(0 <= decay <= 1 - 1e-7, key, decay, "at least 0 and below 1")


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
  "sgd": _sgd,
  "adamw": _adamw,
  "muon": _muon,
}
