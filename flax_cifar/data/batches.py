"""Order and batches on the host; both are pure functions of (seed, epoch, step)."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from flax_cifar import errors
from flax_cifar.data import dataset

Batch = dict[str, Any]  # image uint8 (N, H, W, C) and label int32 (N,)
Chunk = tuple[int, Batch]  # steps of a call of the compiled code, and its inputs
Augment = Callable[[np.ndarray, tuple[int, int, int]], np.ndarray]  # (image, stream) -> image


class TrainBatches:
  """All batches of a run by step, a random-access source for grain.

  An epoch is a permutation of the examples without its incomplete last batch, so each example
  occurs at most once in it. The stream (seed, e, i) augments example `i` in epoch `e`. `rows`
  limits an item to some rows of the batch: those of this process, if there are several.
  """

  def __init__(
    self,
    split: dataset.Split,
    *,
    batch_size: int,
    total_epochs: int,
    seed: int,
    augment: Augment | None,
    rows: np.ndarray | None = None,
  ):
    self._split = split
    self._batch_size = batch_size
    self._total_epochs = total_epochs
    self._seed = seed
    self._augment = augment
    self._rows = slice(None) if rows is None else rows
    self.steps_per_epoch = count_steps(split, batch_size)

  def __len__(self) -> int:
    return self._total_epochs * self.steps_per_epoch

  def __getitem__(self, step: int) -> dict[str, np.ndarray]:
    """Returns image uint8 (B, H, W, C) and label int32 (B,) of `step` (from 0)."""
    index = self.get_examples(step)[self._rows]
    images = self._split.images[index]
    if self._augment:
      epoch = int(step) // self.steps_per_epoch
      streams = ((self._seed, epoch, int(i)) for i in index)
      images = np.stack([self._augment(*pair) for pair in zip(images, streams, strict=True)])
    return {"image": images, "label": self._split.labels[index]}

  def get_examples(self, step: int) -> np.ndarray:
    """Returns the number of each example in the batch of `step`: int64 (B,)."""
    epoch, position = divmod(int(step), self.steps_per_epoch)
    order = epoch_permutation(seed=self._seed, epoch=epoch, num_examples=len(self._split))
    return order[position * self._batch_size :][: self._batch_size]


@functools.lru_cache(maxsize=2)  # every step asks for that of its epoch; some steps are made ahead
def epoch_permutation(*, seed: int, epoch: int, num_examples: int) -> np.ndarray:
  """Returns the order of the examples in `epoch` (from 0): int64 (num_examples,), read-only."""
  order = np.random.default_rng([seed, epoch]).permutation(num_examples)
  order.flags.writeable = False
  return order


def count_steps(split: dataset.Split, batch_size: int) -> int:
  """Counts the whole batches in an epoch.

  Raises:
    UserError: there is none.
  """
  expected = f"positive and at most the {len(split)} training images"
  errors.require(0 < batch_size <= len(split), "batch_size", batch_size, expected)
  return len(split) // batch_size


def padded_batches(split: dataset.Split, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
  """Yields image, label and mask of `split` in order; padding of the last batch has mask 0.

  The shapes are uint8 (B, H, W, C), int32 (B,) and float32 (B,).
  """
  for start in range(0, len(split), batch_size):
    images = split.images[start : start + batch_size]
    labels = split.labels[start : start + batch_size]
    missing = batch_size - len(images)
    yield {
      "image": np.pad(images, ((0, missing), (0, 0), (0, 0), (0, 0))),
      "label": np.pad(labels, (0, missing)),
      "mask": np.pad(np.ones(len(images), np.float32), (0, missing)),
    }
