"""Steps whose loss or gradient is not finite: found on the host, and dumped to be repeated."""

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from flax_cifar import errors, files
from flax_cifar import state as state_lib
from flax_cifar.data import feeds
from flax_cifar.parallel import agreement
from flax_cifar.parallel import mesh as mesh_lib
from flax_cifar.parallel import seeds as seeds_lib


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
def dump_and_explain(
  feed: feeds.Feed, num_seeds: int, mesh: Mesh, workdir: pathlib.Path
) -> Iterator[None]:
  """Turns NonFinite into a UserError, with the state and the batch of the step dumped."""
  try:
    yield
  except NonFinite as error:
    state = mesh_lib.fetch(error.state.replace(key=jax.random.key_data(error.state.key)), mesh)
    path = workdir / f"nonfinite-step-{error.step + 1}.npz"
    failure = save_nonfinite_dump(
      path,
      state=seeds_lib.select(state, num_seeds, error.number),
      batch=feed.batch_at(error.step, error.number),
    )
    holds = "has the state before that step and its batch"
    if failure:  # a full disk is not what ends this run
      holds = f"could not be written ({failure})"
    raise errors.UserError(
      f"{error}. The checkpoints are kept, and {str(path)!r} {holds}. Lower "
      "optimizer.learning_rate, or warm up with schedule.name=cosine or one_cycle."
    ) from error


@agreement.by_first
def save_nonfinite_dump(
  path: pathlib.Path, *, state: state_lib.TrainState, batch: dict[str, np.ndarray]
) -> str:
  """Writes the step to `path`, an npz file, whole or not at all; returns why not, or "".

  Args:
    path: of the file.
    state: of one seed, before the step, on the host; its key is key data.
    batch: image and label as the step got them, and `example`, their numbers in the training split.
  """
  arrays = {f"state/{name}": leaf for name, leaf in state_lib.name_leaves(state).items()}
  contents: dict[str, Any] = {**arrays, **batch}
  try:
    with files.replace(path) as part, part.open("wb") as file:
      np.savez(file, **contents)
  except OSError as error:
    return error.strerror or str(error)
  return ""
