"""Batches that grain and Albumentations make on the host."""

import functools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh

from flax_cifar import errors, signals
from flax_cifar.data import batches as batches_lib
from flax_cifar.data import dataset as dataset_lib
from flax_cifar.parallel import mesh as mesh_lib

if TYPE_CHECKING:
  import grain

PREFETCH = 4  # batches that a thread, or each worker, makes ahead
MAX_WORKERS = 256


class HostFeed:
  """A feed whose batches grain and Albumentations make, one step per call.

  Each process makes the rows of its own devices.
  """

  seed_axes: ClassVar = None
  steps_per_call = 1

  def __init__(
    self,
    create_batches: Callable[[np.ndarray | None], batches_lib.TrainBatches],
    *,
    batch_size: int,
    workers: int,
    mesh: Mesh,
  ):
    # Not the batches of the stream, because grain's thread may be running their augmentation.
    self._batches = create_batches(None)
    self.steps_per_epoch = self._batches.steps_per_epoch
    self._mesh = mesh
    self._rows = mesh_lib.list_rows(mesh, batch_size)
    self._open = functools.partial(iterate_batches, create_batches(self._rows), workers=workers)
    self._stream: Any = None

  def example_inputs(self) -> batches_lib.Batch:
    """Returns the first batch."""
    rows = {name: values[self._rows] for name, values in self._batches[0].items()}
    return mesh_lib.place_rows(rows, self._mesh)

  def batch_at(self, step: int, number: int = 0) -> batches_lib.Batch:
    """Makes the batch again."""
    del number  # there is one seed
    return {**self._batches[step], "example": self._batches.get_examples(step)}

  def chunks(self, steps: range) -> Iterator[batches_lib.Chunk]:
    """Yields one step at a time; `steps` must continue where those of the last call ended.

    Raises:
      UserError: a worker has ended, by itself or by the system.
    """
    self._stream = self._stream or self._open(start_step=steps.start)
    for _ in steps:
      yield 1, mesh_lib.place_rows(self._load(), self._mesh)

  def _load(self) -> Any:
    """The next batch of the stream."""
    try:
      return next(self._stream)
    except RuntimeError as error:
      if "process" not in str(error):
        raise
      raise errors.UserError(
        f"a process of augment.workers has ended ({errors.shorten(error)}). A script that trains "
        "needs `if __name__ == '__main__':` around its calls, because each worker imports it; or "
        "set augment.workers=0."
      ) from error

  @staticmethod
  def get_batch(key: jax.Array, step: jax.Array, inputs: batches_lib.Batch) -> batches_lib.Batch:
    """Returns the inputs, which are the batch."""
    del key, step
    return inputs

  def close(self) -> None:
    """Ends grain's threads and processes."""
    if self._stream:
      self._stream.close()


def check_numbers(*, steps_per_call: int, num_seeds: int, workers: int) -> None:
  """Raises a UserError for one of these keys that the host's feed cannot have."""
  backend = "where augment.backend='albumentations'"
  errors.require(steps_per_call in (0, 1), "steps_per_call", steps_per_call, f"0 or 1 {backend}")
  errors.require(num_seeds == 1, "num_seeds", num_seeds, f"1 {backend}")
  expected = f"from 0 to {MAX_WORKERS}"
  errors.require(0 <= workers <= MAX_WORKERS, "augment.workers", workers, expected)


def create_host_feed(
  split: dataset_lib.Split,
  *,
  batch_size: int,
  total_epochs: int,
  steps_per_call: int,
  seed: int,
  num_seeds: int,
  workers: int,
  augment_arguments: Mapping[str, Any],
  mesh: Mesh,
) -> HostFeed:
  """Creates the feed; the arguments are those of `feeds.create_feed`.

  Raises:
    UserError: a value out of range, or not possible with Albumentations.
  """
  # Imported here, because the import takes most of a second.
  try:
    from flax_cifar.data.augment import host
  except ImportError as error:  # its last version is of May 2025
    raise errors.UserError(
      f"augment.backend='albumentations' cannot be used, as Albumentations cannot be imported "
      f"({errors.shorten(error)}); set augment.backend=device."
    ) from error

  check_numbers(steps_per_call=steps_per_call, num_seeds=num_seeds, workers=workers)

  def create_batches(rows: np.ndarray | None) -> batches_lib.TrainBatches:
    return batches_lib.TrainBatches(
      split,
      batch_size=batch_size,
      total_epochs=total_epochs,
      seed=seed,
      augment=host.create_host_augment(**augment_arguments),
      rows=rows,
    )

  return HostFeed(create_batches, batch_size=batch_size, workers=workers, mesh=mesh)


def iterate_batches(
  batches: batches_lib.TrainBatches, *, start_step: int, workers: int
) -> "grain.DatasetIterator":
  """Returns an iterator over the batches from `start_step` on.

  A thread makes the batches ahead, or `workers` processes if there are any. Close the iterator;
  otherwise its processes end with a warning.
  """
  import grain  # here, because runs that augment on the device start faster without it

  dataset = grain.MapDataset.source(batches)[start_step:]
  options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=PREFETCH)
  stream: Any = dataset.to_iter_dataset(options)
  if workers:
    if not flags.FLAGS.is_parsed():  # grain's workers read absl flags; a notebook parses none
      flags.FLAGS.mark_as_parsed()
    # Batches come through pipes: grain leaves some of those in shared memory behind.
    pipes = grain.experimental.DatasetOptions(min_shm_size=sys.maxsize)
    stream = grain.experimental.WithOptionsIterDataset(stream, pipes)
    options = grain.MultiprocessingOptions(num_workers=workers)
    stream = stream.mp_prefetch(options, worker_init_fn=_follow_parent)
  return stream.__iter__()


def _follow_parent(worker: int, workers: int) -> None:
  """Lets a worker ignore signals and end when the run does; runs in the worker.

  Terminals and schedulers send a signal to every process, but the run still needs its workers then.
  And if the run is killed, its workers would otherwise wait forever.
  """
  del worker, workers
  for signum in signals.SIGNALS:
    signal.signal(signum, signal.SIG_IGN)
  parent = multiprocessing.parent_process()

  def watch() -> None:
    if parent:
      parent.join()
    os._exit(1)

  threading.Thread(target=watch, daemon=True).start()
