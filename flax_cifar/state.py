"""All that a run must remember: the train state, and the progress of the run around it.

The arrays of several seeds have an axis for them in front, see `parallel`.

Nothing is random but what is drawn from one of these streams. Those in the upper part use
`key = jax.random.key(seed)`, which the state holds; `step`, `epoch` and `example` count from 0.

| what is drawn | stream |
|---|---|
| initialization | `jax.random.key(seed, impl="rbg")` |
| order of an epoch, on the device | `fold_in(fold_in(key, device_feed.ORDER), epoch)` |
| augmentation, on the device | threefry with `key`; the counter is (example, epoch, column) |
| dropout | `fold_in(key, step)`, then Linen's path of the module |
| mixing | `fold_in(fold_in(key, step), train.MIXING)` |
| order of an epoch, on the host | `numpy.random.default_rng([seed, epoch])` |
| augmentation, on the host | `numpy.random.default_rng((seed, epoch, example))` |
| images held out, `data.limit` | `numpy.random.default_rng(0)`, whatever the seed |
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jaxtyping import Array, Float

from flax_cifar import metrics, optim

INIT_IMAGES = 1024  # enough for the covariance of the pixels of a patch


class TrainState(struct.PyTreeNode):
  """The state between two steps.

  Attributes:
    step: int32 scalar, steps done.
    params: the network's parameters.
    batch_stats: running statistics of the norms; empty for norms without.
    opt_state: the optimizer's state.
    ema: {"params", "batch_stats"} averaged over steps; empty when it is switched off.
    plateau: state of reduce-on-plateau; its scale multiplies the learning rate.
    key: random key of the run; step t draws from fold_in(key, t).
    finite: False once a loss or gradient was not finite; the state is frozen from then on.
  """

  step: jax.Array
  params: Any
  batch_stats: Any
  opt_state: Any
  ema: Any
  plateau: Any
  key: jax.Array
  finite: jax.Array

  @property
  def eval_variables(self) -> dict[str, Any]:
    """The variables to evaluate: the moving average where there is one."""
    return self.ema or {"params": self.params, "batch_stats": self.batch_stats}


@dataclasses.dataclass
class Progress:
  """How far a run has come: the content of a checkpoint.

  Attributes:
    step: steps done.
    state: the train state.
    totals: training metrics of the unfinished epoch.
    records: of the finished epochs.
  """

  step: int
  state: TrainState
  totals: metrics.Totals
  records: list[metrics.Record]


def choose_init_images(images: np.ndarray) -> np.ndarray:
  """At most INIT_IMAGES of `images`, evenly spaced, because a data set may be sorted by class."""
  count = min(len(images), INIT_IMAGES)
  return images[np.linspace(0, len(images) - 1, count).astype(int)]


def create_train_states(
  *,
  model: nn.Module,
  optimizer: optax.GradientTransformation,
  plateau: optim.Plateau,
  images: Float[Array | np.ndarray, "n h w 3"],
  ema_decay: float,
  seeds: Iterable[int],
) -> list[TrainState]:
  """The state before the first step for each of the `seeds`.

  It is a pure function of the seed and of `images`, which a whitening layer reads, on one kind of
  device.
  """

  def create(init_key: jax.Array, key: jax.Array, images: jax.Array) -> TrainState:
    variables = model.init(init_key, images, train=False)
    params, batch_stats = variables["params"], variables.get("batch_stats", {})
    return TrainState(
      step=jnp.zeros((), jnp.int32),
      params=params,
      batch_stats=batch_stats,
      opt_state=optimizer.init(params),
      ema={"params": params, "batch_stats": batch_stats} if ema_decay else {},
      plateau=plateau.init(params),
      key=key,
      finite=jnp.ones((), bool),
    )

  # One program: a program for each array would take seconds to load. It runs once, so on a CPU half
  # the time of its compilation, which is that of LLVM's optimizations, is not worth it.
  quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else {}
  compiled = jax.jit(create, compiler_options=quick)
  # threefry, the default, takes XLA:CPU ten seconds to compile for this many shapes.
  keys = ((jax.random.key(seed, impl="rbg"), jax.random.key(seed)) for seed in seeds)
  return [compiled(*pair, images) for pair in keys]


def name_leaves(tree: Any) -> dict[str, Any]:
  """{"params/unit/conv/kernel": array, ...}: the leaves of `tree` by their paths.

  >>> name_leaves({"params": {"head": {"bias": 1.0, "kernel": 2.0}}})
  {'params/head/bias': 1.0, 'params/head/kernel': 2.0}
  """
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def count_parameters(params: Any) -> int:
  """The number of values in `params`, counted by clu where that can be imported."""
  try:
    from clu import parameter_overview
  except ImportError:  # it is hardly maintained
    return sum(leaf.size for leaf in jax.tree.leaves(params))
  return int(parameter_overview.count_parameters(params))


def all_finite(tree: Any) -> jax.Array:
  """Whether every number of every array is finite: bool ().

  In one piece: a reduction per array costs a CPU 5 % of a small network's step.
  """
  return jnp.isfinite(jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])).all()


def choose_tree(condition: jax.Array, yes: Any, no: Any) -> Any:
  """`yes` where `condition` (bool ()) holds, else `no`; trees of the same arrays."""
  return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)


def update_ema(ema: Any, new: Any, step: jax.Array, decay: float) -> Any:
  """Moving average whose decay grows as (1 + step) / (10 + step) up to `decay`.

  The ramp lets the first steps forget the initial values.
  """
  decay_now = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
  return optax.incremental_update(new, ema, 1.0 - decay_now)
