"""What the compiled train steps are fed with, by the backend that augments.

Every feed has
  steps_per_epoch, steps_per_call
  first_inputs()      the inputs of the run's first call
  look_up(step)       the batch of a step on the host, and as `example` which ones of the split they
                      are; an argument `number` chooses among several seeds
  calls(steps)        yields, for each call of the compiled steps, how many they are and the inputs
  get_batch           (key, step, inputs) -> batch, inside the compiled steps
  seed_axes           where the inputs have an axis for the seeds, as `jax.vmap` takes it
  close()
"""

import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import jax
from jax.sharding import Mesh

from flax_cifar.data.augment_device import DeviceAugment, create_device_augment
from flax_cifar.data.dataset import Split
from flax_cifar.data.pipeline import TrainBatches, count_steps, iterate
from flax_cifar.errors import choose, require
from flax_cifar.partition import replicated, split_batch
from flax_cifar.seeds import create_keys, over_seeds, take_seed

Batch = dict[str, Any]  # image uint8 (N, H, W, C) and label int32 (N,)
Call = tuple[int, Batch]
SEEDS = 2**32  # JAX takes a seed modulo this
MAX_SEEDS, MAX_WORKERS = 1000, 256
ORDER = 2**32 - 1  # folded into a run's key where its steps are too, which never come that far


class HostFeed:
  """Batches that grain and Albumentations make, a step per call."""

  seed_axes: ClassVar = None
  steps_per_call = 1

  def __init__(self, create_batches: Callable[[], TrainBatches], *, workers: int, mesh: Mesh):
    # Not those of the stream, whose augmentation may be at work in grain's thread.
    self._batches = create_batches()
    self.steps_per_epoch = self._batches.steps_per_epoch
    self._sharding = split_batch(mesh)
    self._open = functools.partial(iterate, create_batches(), workers=workers)
    self._stream: Any = None

  def first_inputs(self) -> Batch:
    """The first batch."""
    return jax.device_put(self._batches[0], self._sharding)

  def look_up(self, step: int, number: int = 0) -> Batch:
    """Makes the batch once more."""
    del number  # there is one seed
    return {**self._batches[step], "example": self._batches.get_examples(step)}

  def calls(self, steps: range) -> Iterator[Call]:
    """One call for each step of the run in `steps`, which go on where the last ones ended."""
    self._stream = self._stream or self._open(start_step=steps.start)
    for _ in steps:
      yield 1, jax.device_put(next(self._stream), self._sharding)

  @staticmethod
  def get_batch(key: jax.Array, step: jax.Array, inputs: Batch) -> Batch:
    """The inputs are the batch."""
    del key, step
    return inputs

  def close(self) -> None:
    """Ends the processes of grain."""
    if self._stream:
      self._stream.close()


class DeviceFeed:
  """Batches that are gathered and augmented on the device, which holds the whole split.

  An epoch is a permutation of the examples without its incomplete last batch, so each example
  occurs at most once in it. The split and the epoch's order are arguments of the compiled steps.
  """

  seed_axes: ClassVar = {"image": None, "label": None, "order": 0}

  def __init__(
    self,
    split: Split,
    *,
    batch_size: int,
    keys: jax.Array,
    augment: DeviceAugment | None,
    steps_per_call: int,
    mesh: Mesh,
  ):
    self.steps_per_epoch = count_steps(split, batch_size)
    self.steps_per_call = min(steps_per_call, self.steps_per_epoch)
    self._augment = augment
    self._sharding = split_batch(mesh)
    self._keys = keys
    self._num_seeds = keys.size
    self._split = jax.device_put({"image": split.images, "label": split.labels}, replicated(mesh))
    draw = functools.partial(draw_order, num_examples=len(split), batch_size=batch_size)
    self._draw_order = jax.jit(
      over_seeds(draw, self._num_seeds, in_axes=(0, None)), out_shardings=replicated(mesh)
    )

  def first_inputs(self) -> Batch:
    """The split and the order of epoch 0."""
    return self._get_inputs(0)

  def look_up(self, step: int, number: int = 0) -> Batch:
    """Compiles and runs `get_batch` by itself."""
    epoch, position = divmod(step, self.steps_per_epoch)
    inputs = self._get_inputs(epoch)
    order, key = take_seed((inputs["order"], self._keys), self._num_seeds, number)
    batch = jax.jit(self.get_batch)(key, step, {**inputs, "order": order})
    return jax.device_get({**batch, "example": order[position]})

  def calls(self, steps: range) -> Iterator[Call]:
    """Calls for the steps of the run in `steps`, all of one epoch.

    Each length is a program to compile, so there are few: `steps_per_call`, what that leaves of an
    epoch, and powers of two.
    """
    inputs = self._get_inputs(steps.start // self.steps_per_epoch)
    rest, left = self.steps_per_epoch % self.steps_per_call, len(steps)
    while left:
      length = min(left, self.steps_per_call)
      if length not in (self.steps_per_call, rest):
        length = 1 << (length.bit_length() - 1)
      yield length, inputs
      left -= length

  def _get_inputs(self, epoch: int) -> Batch:
    return {**self._split, "order": self._draw_order(self._keys, epoch)}

  def get_batch(self, key: jax.Array, step: jax.Array, inputs: Batch) -> Batch:
    """The batch of `step`, split over the devices, augmented with `key`."""
    epoch, position = step // self.steps_per_epoch, step % self.steps_per_epoch
    example = jax.lax.with_sharding_constraint(inputs["order"][position], self._sharding)
    images = inputs["image"][example]
    if self._augment:
      images = self._augment(images, key, epoch, example)
    return {"image": images, "label": inputs["label"][example]}

  def close(self) -> None:
    """Holds nothing open."""


def draw_order(
  key: jax.Array, epoch: jax.Array, *, num_examples: int, batch_size: int
) -> jax.Array:
  """The examples of each step of `epoch` (from 0): int32 (steps, batch_size), none twice.

  Args:
    key: of the run.
    epoch: int32 scalar.
    num_examples: of the split.
    batch_size: examples per step.
  """
  steps = num_examples // batch_size
  key = jax.random.fold_in(jax.random.fold_in(key, ORDER), epoch)
  return jax.random.permutation(key, num_examples)[: steps * batch_size].reshape(steps, batch_size)


Feed = HostFeed | DeviceFeed


def create_feed(split: Split, *, backend: str, **arguments: Any) -> Feed:
  """The feed of `backend`, a key of BACKENDS.

  Args:
    split: what to train on.
    backend: who augments, where.
    **arguments: `batch_size`, `total_epochs`, `steps_per_call`, `mesh`; `seed` and `num_seeds`;
      `mean`, what the fill "mean" stands for; `workers`, `ops` and the arguments of each op.

  Raises:
    UserError: unknown backend, a value out of range or not for this backend.
  """
  create = choose("augment.backend", backend, BACKENDS)
  if "coarse_dropout" in arguments["ops"]:
    _check_hole(arguments["coarse_dropout"], split)
  return create(split, **arguments)


def _check_hole(hole: Mapping[str, Any], split: Split) -> None:
  for side, pixels in zip(("height", "width"), split.images.shape[1:3], strict=True):
    expected = f"from 1 to {pixels}, the {side} of the images in pixels"
    require(1 <= hole[side] <= pixels, f"augment.coarse_dropout.{side}", hole[side], expected)


def _create_host_feed(
  split: Split,
  *,
  batch_size: int,
  total_epochs: int,
  steps_per_call: int,
  mesh: Mesh,
  seed: int,
  num_seeds: int,
  workers: int,
  **augment: Any,
) -> HostFeed:
  # Here, because the import takes most of a second.
  from flax_cifar.data.augment_host import create_host_augment

  backend = "where augment.backend='albumentations'"
  require(steps_per_call in (0, 1), "steps_per_call", steps_per_call, f"0 or 1 {backend}")
  require(num_seeds == 1, "num_seeds", num_seeds, f"1 {backend}")
  _check_seeds(seed, num_seeds)
  require(0 <= workers <= MAX_WORKERS, "augment.workers", workers, f"from 0 to {MAX_WORKERS}")

  def create_batches() -> TrainBatches:
    return TrainBatches(
      split,
      batch_size=batch_size,
      total_epochs=total_epochs,
      seed=seed,
      augment=create_host_augment(**augment),
    )

  return HostFeed(create_batches, workers=workers, mesh=mesh)


def _create_device_feed(
  split: Split,
  *,
  batch_size: int,
  total_epochs: int,
  steps_per_call: int,
  mesh: Mesh,
  seed: int,
  num_seeds: int,
  workers: int,
  **augment: Any,
) -> DeviceFeed:
  del total_epochs, workers  # grain's
  require(0 < num_seeds <= MAX_SEEDS, "num_seeds", num_seeds, f"from 1 to {MAX_SEEDS:,}")
  _check_seeds(seed, num_seeds)
  expected = "0 (chosen for the device) or a number of steps"
  require(steps_per_call >= 0, "steps_per_call", steps_per_call, expected)
  return DeviceFeed(
    split,
    batch_size=batch_size,
    keys=create_keys(seed, num_seeds),
    augment=create_device_augment(**augment),
    steps_per_call=steps_per_call or choose_steps_per_call(mesh.devices.flat[0].platform),
    mesh=mesh,
  )


def _check_seeds(seed: int, num_seeds: int) -> None:
  last = SEEDS - num_seeds
  require(0 <= seed <= last, "seed", seed, f"from 0 to {last}, so that every seed has its own run")


def choose_steps_per_call(platform: str) -> int:
  """A whole epoch, except where XLA computes convolutions inside a loop 25 to 50 times slower."""
  return 1 if platform == "cpu" else sys.maxsize


BACKENDS: dict[str, Callable[..., Feed]] = {
  "albumentations": _create_host_feed,
  "device": _create_device_feed,
}
