"""Batches that the compiled steps gather and augment on the device."""

import functools
import sys
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from flax_cifar import errors
from flax_cifar.data import batches, dataset
from flax_cifar.data.augment import device
from flax_cifar.parallel import mesh as mesh_lib
from flax_cifar.parallel import seeds as seeds_lib

# Folded into a run's key, as its steps are, which never reach this number (errors.MAX_STEPS).
ORDER = 2**32 - 1


class DeviceFeed:
  """A feed that gathers and augments batches on the device, which holds the whole split.

  An epoch is a permutation of the examples without its incomplete last batch, so each example
  occurs at most once in it. The split and the epoch's order are arguments of the compiled steps.
  """

  seed_axes: ClassVar = {"image": None, "label": None, "order": 0}

  def __init__(
    self,
    split: dataset.Split,
    *,
    batch_size: int,
    keys: jax.Array,
    augment: device.DeviceAugment | None,
    steps_per_call: int,
    mesh: Mesh,
  ):
    self.steps_per_epoch = batches.count_steps(split, batch_size)
    self.steps_per_call = min(steps_per_call, self.steps_per_epoch)
    self._augment = augment
    self._host_split = split
    self._host_keys = keys
    self._num_seeds = keys.size
    self._keys = mesh_lib.place(keys, mesh_lib.split_seeds(mesh))
    arrays = {"image": split.images, "label": split.labels}
    self._split = mesh_lib.place(arrays, mesh_lib.replicated(mesh))
    self._draw = functools.partial(draw_order, num_examples=len(split), batch_size=batch_size)
    self._draw_order = seeds_lib.compile_map(
      self._draw, mesh, num_seeds=self._num_seeds, in_axes=(0, None)
    )

  def example_inputs(self) -> batches.Batch:
    """Returns the split and the order of epoch 0."""
    return self._get_inputs(0)

  def batch_at(self, step: int, number: int = 0) -> batches.Batch:
    """Makes the batch on one device, so that a process can do so without the others."""
    epoch, position = divmod(step, self.steps_per_epoch)
    key = seeds_lib.select(self._host_keys, self._num_seeds, number)
    example = np.asarray(self._draw(key, jnp.int32(epoch)))[position]
    images = jnp.asarray(self._host_split.images[example])
    if self._augment:
      images = jax.jit(self._augment)(images, key, epoch, example)
    labels = self._host_split.labels[example]
    return {"image": np.asarray(images), "label": labels, "example": example}

  def chunks(self, steps: range) -> Iterator[batches.Chunk]:
    """Yields chunks that cover `steps`, which are all of one epoch.

    Each length needs a program to be compiled, so there are few: `steps_per_call`, the remainder of
    an epoch, and powers of two.
    """
    inputs = self._get_inputs(steps.start // self.steps_per_epoch)
    rest, left = self.steps_per_epoch % self.steps_per_call, len(steps)
    while left:
      length = min(left, self.steps_per_call)
      if length not in (self.steps_per_call, rest):
        length = 1 << (length.bit_length() - 1)
      yield length, inputs
      left -= length

  def _get_inputs(self, epoch: int) -> batches.Batch:
    return {**self._split, "order": self._draw_order(self._keys, epoch)}

  def get_batch(self, key: jax.Array, step: jax.Array, inputs: batches.Batch) -> batches.Batch:
    """Gathers the batch of `step`, splits it over the devices and augments it with `key`."""
    epoch, position = step // self.steps_per_epoch, step % self.steps_per_epoch
    example = mesh_lib.share_out(inputs["order"][position])
    images = inputs["image"][example]
    if self._augment:
      images = self._augment(images, key, epoch, example)
    return {"image": images, "label": inputs["label"][example]}

  def close(self) -> None:
    """Does nothing: no process or thread is open."""


def check_steps_per_call(steps_per_call: int) -> None:
  """Raises a UserError unless it is a number of steps, or 0."""
  expected = "0 (chosen for the device) or a number of steps"
  errors.require(steps_per_call >= 0, "steps_per_call", steps_per_call, expected)


def create_device_feed(
  split: dataset.Split,
  *,
  batch_size: int,
  total_epochs: int,
  steps_per_call: int,
  seed: int,
  num_seeds: int,
  workers: int,
  augment_arguments: Mapping[str, Any],
  mesh: Mesh,
) -> DeviceFeed:
  """Creates the feed; the arguments are those of `feeds.create_feed`.

  Raises:
    UserError: a value out of range.
  """
  del total_epochs, workers  # only the host's batches need them
  check_steps_per_call(steps_per_call)
  return DeviceFeed(
    split,
    batch_size=batch_size,
    keys=seeds_lib.create_keys(seed, num_seeds),
    augment=device.create_device_augment(**augment_arguments),
    steps_per_call=steps_per_call or choose_steps_per_call(mesh.devices.flat[0].platform),
    mesh=mesh,
  )


def choose_steps_per_call(platform: str) -> int:
  """Returns the number of steps that one call of compiled code makes, unless the config sets it.

  It is a whole epoch, except on a CPU, where XLA computes convolutions inside a loop 25 to 50 times
  more slowly.
  """
  return 1 if platform == "cpu" else sys.maxsize


def draw_order(
  key: jax.Array, epoch: jax.Array, *, num_examples: int, batch_size: int
) -> jax.Array:
  """Draws the examples of each step of `epoch`: int32 (steps, batch_size), none twice.

  Args:
    key: of the run.
    epoch: int32 scalar, from 0.
    num_examples: of the split.
    batch_size: examples per step.
  """
  steps = num_examples // batch_size
  key = jax.random.fold_in(jax.random.fold_in(key, ORDER), epoch)
  return jax.random.permutation(key, num_examples)[: steps * batch_size].reshape(steps, batch_size)
