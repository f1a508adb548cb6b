"""Steps whose loss or gradient is not finite: found on the host, and dumped to be repeated."""

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from flax_cifar import errors, parallel
from flax_cifar import state as state_lib
from flax_cifar.data import feeds


class NonFinite(Exception):
  """The loss or a gradient of `step` (from 0) was not finite for the seed `number` (from 0).

  `state` is the state of all seeds before the step.
  """

  def __init__(self, step: int, number: int, state: state_lib.TrainState):
    super().__init__(f"the loss or a gradient was not finite at step {step + 1:,}")
    self.step = step
    self.number = number
    self.state = state


@contextlib.contextmanager
def dump_and_explain(feed: feeds.Feed, num_seeds: int, workdir: pathlib.Path) -> Iterator[None]:
  """Turns NonFinite into a UserError, with the state and the batch of the step dumped."""
  try:
    yield
  except NonFinite as error:
    path = save_nonfinite_dump(
      workdir,
      step=error.step,
      state=parallel.select_seed(error.state, num_seeds, error.number),
      batch=feed.batch_at(error.step, error.number),
    )
    raise errors.UserError(
      f"{error}. The checkpoints are kept, and {str(path)!r} has the state before that step and "
      "its batch. Lower optimizer.learning_rate, or warm up with schedule.name=cosine or one_cycle."
    ) from error


def save_nonfinite_dump(
  workdir: pathlib.Path, *, step: int, state: state_lib.TrainState, batch: dict[str, np.ndarray]
) -> pathlib.Path:
  """Writes `nonfinite-step-N.npz`, N counted from 1, and returns its path.

  Args:
    workdir: of the run.
    step: the step, from 0.
    state: of one seed, before the step.
    batch: image and label as the step got them, and `example`, their numbers in the training split.
  """
  file = workdir / f"nonfinite-step-{step + 1}.npz"
  leaves = state_lib.name_leaves(state.replace(key=jax.random.key_data(state.key)))
  arrays = {f"state/{name}": np.asarray(leaf) for name, leaf in leaves.items()}
  contents: dict[str, Any] = {**arrays, **batch}
  np.savez(file, **contents)
  return file
