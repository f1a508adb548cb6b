"""What is kept of a step whose loss or gradient was not finite: all it takes to repeat it."""

import pathlib
from typing import Any

import jax
import numpy as np

from flax_cifar.state import TrainState, name_leaf


class NonFinite(Exception):
  """The loss or a gradient of `step` (from 0) was not finite for the seed `number` (from 0).

  `state` is that from which the step was made, of all seeds.
  """

  def __init__(self, step: int, number: int, state: TrainState):
    super().__init__(f"the loss or a gradient was not finite at step {step + 1:,}")
    self.step = step
    self.number = number
    self.state = state


def save_post_mortem(
  workdir: pathlib.Path, *, step: int, state: TrainState, batch: dict[str, np.ndarray]
) -> pathlib.Path:
  """Writes `nonfinite-step-N.npz`, N counted from 1, and returns its path.

  Args:
    workdir: of the run.
    step: the step, from 0.
    state: of one seed, before the step.
    batch: image and label, as the step got them, and `example`, their numbers in the train split.
  """
  file = workdir / f"nonfinite-step-{step + 1}.npz"
  arrays = state.replace(key=jax.random.key_data(state.key))
  named = {
    name_leaf(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(arrays)
  }
  contents: dict[str, Any] = {**{f"state/{name}": leaf for name, leaf in named.items()}, **batch}
  np.savez(file, **contents)
  return file
