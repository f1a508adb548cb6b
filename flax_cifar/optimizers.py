"""Optimisers with the weight decay that their users expect."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from flax_cifar.errors import choose, require
from flax_cifar.models.norms import FIXED_SCALE
from flax_cifar.schedules import Schedule

Mask = Callable[[Any], Any] | None


def kernels_only(params: Any) -> Any:
  """True for kernels, False for biases and norm parameters; a decay mask."""
  return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def trained(params: Any) -> Any:
  """False for the scales that a norm keeps at 1, whose gradient is 0; True for all others."""
  fixed = (jax.tree_util.DictKey(FIXED_SCALE),)
  return jax.tree_util.tree_map_with_path(lambda path, _: path[-1:] != fixed, params)


def create_optimizer(
  schedule: Schedule,
  *,
  name: str,
  learning_rate: float,
  weight_decay: float,
  decay_all: bool,
  **arguments: Mapping[str, Any],
) -> optax.GradientTransformation:
  """The optimiser called `name` with `arguments[name]`; it leaves out what is not `trained`.

  Args:
    schedule: step -> share of `learning_rate`.
    name: a key of OPTIMIZERS.
    learning_rate: the peak.
    weight_decay: `sgd` adds weight_decay * p to the gradient before momentum, as torch does;
      `adamw` decouples it from the gradient.
    decay_all: False leaves biases and norm parameters undecayed.
    **arguments: the arguments of each optimiser.

  Raises:
    UserError: unknown name or a value out of range.
  """
  create = choose("optimizer.name", name, OPTIMIZERS)
  require(learning_rate > 0, "optimizer.learning_rate", learning_rate, "positive")
  require(weight_decay >= 0, "optimizer.weight_decay", weight_decay, "0 or more")

  def rate(step: Any) -> Any:
    return learning_rate * schedule(step)

  mask = None if decay_all else kernels_only
  return optax.masked(create(rate, weight_decay, mask, **arguments[name]), trained)


def _sgd(
  rate: Schedule, weight_decay: float, mask: Mask, *, momentum: float, nesterov: bool
) -> optax.GradientTransformation:
  require(0 <= momentum < 1, "optimizer.sgd.momentum", momentum, "at least 0 and below 1")
  return optax.chain(
    optax.add_decayed_weights(weight_decay, mask),
    optax.sgd(rate, momentum=momentum, nesterov=nesterov),
  )


def _adamw(
  rate: Schedule, weight_decay: float, mask: Mask, *, b1: float, b2: float, epsilon: float
) -> optax.GradientTransformation:
  return optax.adamw(rate, b1=b1, b2=b2, eps=epsilon, weight_decay=weight_decay, mask=mask)


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
  "sgd": _sgd,
  "adamw": _adamw,
}
