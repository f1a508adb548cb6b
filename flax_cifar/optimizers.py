"""Optimisers with the weight decay that their users expect."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from flax_cifar.errors import choose, require
from flax_cifar.models.norms import FIXED_SCALE, check_epsilon
from flax_cifar.schedules import Schedule

Mask = Callable[[Any], Any] | None


MAX_NUMBER = 1e38  # float32 ends soon after


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
      `adamw` and `muon` decouple it from the gradient.
    decay_all: False leaves biases and norm parameters undecayed.
    **arguments: the arguments of each optimiser.

  Raises:
    UserError: unknown name or a value out of range.
  """
  create = choose("optimizer.name", name, OPTIMIZERS)
  require(
    0 < learning_rate <= MAX_NUMBER, "optimizer.learning_rate", learning_rate, "positive and finite"
  )
  require(
    0 <= weight_decay <= MAX_NUMBER, "optimizer.weight_decay", weight_decay, "0 or more and finite"
  )

  def rate(step: Any) -> Any:
    return learning_rate * schedule(step)

  mask = None if decay_all else kernels_only
  return optax.masked(create(rate, weight_decay, mask, **arguments[name]), trained)


def _sgd(
  rate: Schedule, weight_decay: float, mask: Mask, *, momentum: float, nesterov: bool
) -> optax.GradientTransformation:
  _check_decay("optimizer.sgd.momentum", momentum)
  return optax.chain(
    optax.add_decayed_weights(weight_decay, mask),
    optax.sgd(rate, momentum=momentum, nesterov=nesterov),
  )


def _adamw(
  rate: Schedule, weight_decay: float, mask: Mask, *, b1: float, b2: float, epsilon: float
) -> optax.GradientTransformation:
  _check_decay("optimizer.adamw.b1", b1)
  _check_decay("optimizer.adamw.b2", b2)
  check_epsilon("optimizer.adamw.epsilon", epsilon)
  return optax.adamw(rate, b1=b1, b2=b2, eps=epsilon, weight_decay=weight_decay, mask=mask)


def _muon(
  rate: Schedule, weight_decay: float, mask: Mask, *, momentum: float, rms: float
) -> optax.GradientTransformation:
  """Orthogonal updates for dense kernels, NAdam for all else, at the same learning rate.

  Sources: Jordan et al. 2024 (kellerjordan.github.io/posts/muon); Liu et al. 2025
  (arXiv:2502.16982) for updates whose root mean square is that of Adam's, `rms`.
  """
  _check_decay("optimizer.muon.momentum", momentum)
  require(0 < rms <= MAX_NUMBER, "optimizer.muon.rms", rms, "positive and finite")
  decayed = optax.contrib.muon(
    rate,
    beta=momentum,
    weight_decay=weight_decay,
    adam_weight_decay=weight_decay,
    consistent_rms=rms,
    muon_weight_dimension_numbers=get_matrices,
  )
  # The mask it takes is for matrices alone, and all of them are kernels.
  return optax.partition({True: decayed, False: optax.nadam(rate)}, mask) if mask else decayed


def _check_decay(key: str, decay: float) -> None:
  # 1 as float32 has it: an average that divides by 1 - decay would be nan.
  require(0 <= decay <= 1 - 1e-7, key, decay, "at least 0 and below 1")


def get_matrices(params: Any) -> Any:
  """Which axes of a kernel (height, width, in, out) Muon takes as the rows of a matrix.

  None for what is no matrix: depthwise kernels, biases and the parameters of norms.
  """
  whole = optax.contrib.MuonDimensionNumbers(reduction_axis=(0, 1, 2), output_axis=3)
  dense = optax.contrib.MuonDimensionNumbers(reduction_axis=0, output_axis=1)

  def get(leaf: jax.Array) -> Any:
    if leaf.ndim == 2:
      return dense
    return whole if leaf.ndim == 4 and leaf.shape[2] > 1 else None

  return jax.tree.map(get, params)


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
  "sgd": _sgd,
  "adamw": _adamw,
  "muon": _muon,
}
