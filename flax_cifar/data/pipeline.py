"""Order and batches on the host: what stands where is a pure function of (seed, epoch, step)."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.typing import DTypeLike

from flax_cifar.data.augment_arguments import check_channels
from flax_cifar.data.dataset import Split
from flax_cifar.errors import require
from flax_cifar.interrupt import SIGNALS

if TYPE_CHECKING:
  import grain

MIN_STD = 1e-6  # less than one level of one pixel in a million makes
PREFETCH = 4  # batches that a thread, or each worker, makes ahead

Normalize = Callable[[jax.Array], jax.Array]  # uint8 (N, H, W, C) -> float (N, H, W, C)
Augment = Callable[[np.ndarray, tuple[int, int, int]], np.ndarray]  # (image, stream) -> image


def epoch_permutation(*, seed: int, epoch: int, num_examples: int) -> np.ndarray:
  """The order of the examples in `epoch` (from 0): int64 (num_examples,)."""
  return np.random.default_rng([seed, epoch]).permutation(num_examples)


def count_steps(split: Split, batch_size: int) -> int:
  """Whole batches in an epoch.

  Raises:
    UserError: there is none.
  """
  expected = f"positive and at most the {len(split)} train images"
  require(0 < batch_size <= len(split), "batch_size", batch_size, expected)
  return len(split) // batch_size


class TrainBatches:
  """All batches of a run, by step: a source of random access for grain.

  An epoch is a permutation of the examples without its incomplete last batch, so each example
  occurs at most once in it. Example `i` is augmented in epoch `e` with the stream (seed, e, i).
  """

  def __init__(
    self, split: Split, *, batch_size: int, total_epochs: int, seed: int, augment: Augment | None
  ):
    self._split = split
    self._batch_size = batch_size
    self._total_epochs = total_epochs
    self._seed = seed
    self._augment = augment
    self.steps_per_epoch = count_steps(split, batch_size)

  def __len__(self) -> int:
    return self._total_epochs * self.steps_per_epoch

  def __getitem__(self, step: int) -> dict[str, np.ndarray]:
    """image uint8 (B, H, W, C) and label int32 (B,) for `step` (from 0)."""
    index = self.get_examples(step)
    images = self._split.images[index]
    if self._augment:
      epoch = int(step) // self.steps_per_epoch
      streams = ((self._seed, epoch, int(i)) for i in index)
      images = np.stack([self._augment(*pair) for pair in zip(images, streams, strict=True)])
    return {"image": images, "label": self._split.labels[index]}

  def get_examples(self, step: int) -> np.ndarray:
    """Which examples of the split are the batch of `step`: int64 (B,)."""
    epoch, position = divmod(int(step), self.steps_per_epoch)
    order = epoch_permutation(seed=self._seed, epoch=epoch, num_examples=len(self._split))
    return order[position * self._batch_size :][: self._batch_size]


def iterate(batches: TrainBatches, *, start_step: int, workers: int) -> "grain.DatasetIterator":
  """Batches from `start_step` on, made ahead by a thread or by `workers` processes.

  Close the iterator, or its processes end with a warning.
  """
  import grain  # here, because a run that augments on the device starts faster without it

  dataset = grain.MapDataset.source(batches)[start_step:]
  options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=PREFETCH)
  stream: Any = dataset.to_iter_dataset(options)
  if workers:
    if not flags.FLAGS.is_parsed():  # grain's workers read absl flags; a notebook parses none
      flags.FLAGS.mark_as_parsed()
    options = grain.MultiprocessingOptions(num_workers=workers)
    stream = stream.mp_prefetch(options, worker_init_fn=_follow_parent)
  return stream.__iter__()


def _follow_parent(worker: int, workers: int) -> None:
  """Run in a worker, which ends when the run does.

  Terminals and schedulers send a signal to every process; the run still needs its workers then. And
  when the run is killed, they would wait for ever.
  """
  del worker, workers
  for signum in SIGNALS:
    signal.signal(signum, signal.SIG_IGN)
  parent = multiprocessing.parent_process()

  def watch() -> None:
    if parent:
      parent.join()
    os._exit(1)

  threading.Thread(target=watch, daemon=True).start()


def padded_batches(split: Split, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
  """image, label and mask of `split` in order; the last batch is filled up under mask 0."""
  for start in range(0, len(split), batch_size):
    images = split.images[start : start + batch_size]
    labels = split.labels[start : start + batch_size]
    missing = batch_size - len(images)
    yield {
      "image": np.pad(images, ((0, missing), (0, 0), (0, 0), (0, 0))),
      "label": np.pad(labels, (0, missing)),
      "mask": np.pad(np.ones(len(images), np.float32), (0, missing)),
    }


def create_normalize(
  mean: tuple[float, ...], std: tuple[float, ...], *, dtype: DTypeLike
) -> Normalize:
  """(x / 255 - mean) / std per channel; `mean` and `std` in units of [0, 1].

  It runs on the device, so that images travel there as bytes, in float32; the result is `dtype`.
  """
  check_channels("augment.mean", mean)
  check_channels("augment.std", std, low=MIN_STD)
  scale = 1 / (255 * np.asarray(std, np.float64))
  shift = -np.asarray(mean, np.float64) / np.asarray(std, np.float64)

  def normalize(images: jax.Array) -> jax.Array:
    normalized = images * jnp.asarray(scale, jnp.float32) + jnp.asarray(shift, jnp.float32)
    return normalized.astype(dtype)

  return normalize
