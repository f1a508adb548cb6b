"""Feeds of the compiled training steps, which make batches on the device or on the host."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import jax
from jax.sharding import Mesh

from flax_cifar import errors
from flax_cifar.data import batches, dataset, device_feed, host_feed

MAX_SEEDS = 1000


class Feed(Protocol):
  """The batches of a run, in the form that the compiled steps take.

  Attributes:
    seed_axes: the axis of each input for the seeds, as `jax.vmap` takes it.
    steps_per_epoch: whole batches in an epoch.
    steps_per_call: largest number of steps in one call of compiled code.
  """

  seed_axes: ClassVar[Any]
  steps_per_epoch: int
  steps_per_call: int

  def example_inputs(self) -> batches.Batch:
    """Returns the inputs of the run's first call, to trace the steps with."""

  def chunks(self, steps: range) -> Iterator[batches.Chunk]:
    """Yields, for each call of the compiled steps, its number of steps and its inputs."""

  def get_batch(self, key: jax.Array, step: jax.Array, inputs: batches.Batch) -> batches.Batch:
    """Returns the batch of `step`, made inside the compiled steps with the run's `key`."""

  def batch_at(self, step: int, number: int = 0) -> batches.Batch:
    """Returns the batch of `step` on the host, for the seed `number`.

    Its entry `example` holds the number of each image in the training split.
    """

  def close(self) -> None:
    """Ends the processes and threads of the feed."""


BACKENDS: dict[str, Callable[..., Feed]] = {
  "albumentations": host_feed.create_host_feed,
  "device": device_feed.create_device_feed,
}


def create_feed(
  split: dataset.Split,
  *,
  backend: str,
  batch_size: int,
  total_epochs: int,
  steps_per_call: int,
  seed: int,
  num_seeds: int,
  workers: int,
  ops: Sequence[str],
  op_arguments: Mapping[str, Mapping[str, Any]],
  mean: Sequence[float],
  mesh: Mesh,
) -> Feed:
  """Creates the feed of `backend`.

  Args:
    split: the training split.
    backend: a key of BACKENDS, which says where the images are augmented.
    batch_size: images per step.
    total_epochs: of the run.
    steps_per_call: steps in one call of compiled code; 0 chooses a number for the device.
    seed: of the first run.
    num_seeds: number of runs trained at once.
    workers: number of processes that augment on the host.
    ops: names of the augmentation's ops, in order.
    op_arguments: the arguments of each op.
    mean: the color that the fill "mean" stands for, per channel in [0, 1].
    mesh: the devices that each batch is split over.

  Raises:
    UserError: unknown backend, a value out of range or not for this backend.
  """
  create = errors.choose("augment.backend", backend, BACKENDS)
  check_seeds(seed, num_seeds)
  if "coarse_dropout" in ops:
    _check_hole(op_arguments["coarse_dropout"], split)
  return create(
    split,
    batch_size=batch_size,
    total_epochs=total_epochs,
    steps_per_call=steps_per_call,
    seed=seed,
    num_seeds=num_seeds,
    workers=workers,
    augment_arguments={"ops": ops, "mean": mean, **op_arguments},
    mesh=mesh,
  )


def check_numbers(backend: str, *, steps_per_call: int, num_seeds: int, workers: int) -> None:
  """Checks what `backend` can do, without data.

  Raises:
    UserError: the backend is unknown, or a value is out of range or not for it.
  """
  errors.choose("augment.backend", backend, BACKENDS)
  if backend == "device":
    device_feed.check_steps_per_call(steps_per_call)
  else:
    host_feed.check_numbers(steps_per_call=steps_per_call, num_seeds=num_seeds, workers=workers)


def check_seeds(seed: int, num_seeds: int) -> None:
  """Raises a UserError unless there are runs of the seeds `seed`, `seed` + 1, ..."""
  errors.require(0 < num_seeds <= MAX_SEEDS, "num_seeds", num_seeds, f"from 1 to {MAX_SEEDS:,}")
  last = errors.SEEDS - num_seeds
  expected = f"from 0 to {last}, so that every seed has its own run"
  errors.require(0 <= seed <= last, "seed", seed, expected)


def _check_hole(hole: Mapping[str, Any], split: dataset.Split) -> None:
  for side, pixels in zip(("height", "width"), split.images.shape[1:3], strict=True):
    key, expected = f"augment.coarse_dropout.{side}", f"from 1 to {pixels}, the images' {side}"
    errors.require(1 <= hole[side] <= pixels, key, hole[side], f"{expected} in pixels")
