"""Everything a run must remember, in one pytree.

For several seeds its arrays have an axis for them in front, see `seeds`.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct


class TrainState(struct.PyTreeNode):
  """The state between two steps.

  Attributes:
    step: int32 scalar, steps done.
    params: the network's parameters.
    batch_stats: running statistics of the norms; empty for norms without.
    opt_state: the optimiser's state.
    ema: {"params", "batch_stats"} averaged over steps; empty when it is switched off.
    plateau: state of reduce-on-plateau; its scale multiplies the learning rate.
    key: random key of the run; step t draws from fold_in(key, t).
    finite: False once a loss or gradient was not; the state has stood still since.
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
    """What to evaluate: the moving average where there is one."""
    return self.ema or {"params": self.params, "batch_stats": self.batch_stats}


def create_train_state(
  *,
  model: nn.Module,
  optimizer: optax.GradientTransformation,
  plateau: optax.GradientTransformationExtraArgs,
  image_shape: tuple[int, int, int],
  ema_decay: float,
  seed: int,
) -> TrainState:
  """The state before the first step; a pure function of `seed` on one kind of device."""
  # threefry, the default, takes XLA:CPU ten seconds to compile for this many shapes.
  init_key = jax.random.key(seed, impl="rbg")
  variables = _init(model, init_key, jnp.zeros((1, *image_shape)))
  params, batch_stats = variables["params"], variables.get("batch_stats", {})
  # Copies: a buffer that stands in the state twice could not be donated.
  ema = jax.tree.map(jnp.copy, {"params": params, "batch_stats": batch_stats})
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    batch_stats=batch_stats,
    opt_state=optimizer.init(params),
    ema=ema if ema_decay else {},
    plateau=plateau.init(params),
    key=jax.random.key(seed),
    finite=jnp.ones((), bool),
  )


@functools.partial(jax.jit, static_argnums=0)
def _init(model: nn.Module, key: jax.Array, images: jax.Array) -> Any:
  return model.init(key, images, train=False)


def name_leaf(path: Any) -> str:
  """ "params/unit/conv/kernel" for a path as JAX has it."""
  return jax.tree_util.keystr(path, simple=True, separator="/")


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
