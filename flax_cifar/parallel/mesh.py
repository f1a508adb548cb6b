"""The mesh of all devices of all processes, and how arrays lie on it.

Its axis "batch" splits each batch. Its axis "seed" splits the seeds of a run of several: devices
that train different seeds never wait for each other.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flax_cifar import errors

MAX_BATCH_SIZE = (
  65_536  # evaluation pads its last batch to the full size, so a huge one needs as much memory
)


def create_mesh(num_devices: int, num_seeds: int = 1) -> Mesh:
  """A mesh with the axes "seed" and "batch" over the first `num_devices` devices; 0 means all.

  The axis "seed" is as long as possible: the largest common divisor of seeds and devices.

  Raises:
    UserError: there are not that many devices, or some process would have none.
  """
  devices = jax.devices()
  if jax.process_count() > 1:
    expected = f"0 (all) or {len(devices)}, as every process needs devices"
    errors.require(num_devices in (0, len(devices)), "num_devices", num_devices, expected)
  errors.require(
    0 <= num_devices <= len(devices), "num_devices", num_devices, f"from 0 to {len(devices)} here"
  )
  used = devices[: num_devices or None]
  parts = math.gcd(num_seeds, len(used))
  return Mesh(np.array(used).reshape(parts, -1), ("seed", "batch"))


def replicated(mesh: Mesh) -> NamedSharding:
  """A whole copy on each device."""
  return NamedSharding(mesh, PartitionSpec())


def split_batch(mesh: Mesh) -> NamedSharding:
  """The sharding of arrays (N, ...): a part of the examples on each device of a seed."""
  return NamedSharding(mesh, PartitionSpec("batch"))


def split_seeds(mesh: Mesh) -> NamedSharding:
  """The sharding of the state: arrays (seeds, ...) along "seed"; whole copies for one seed."""
  return NamedSharding(mesh, PartitionSpec("seed") if mesh.shape["seed"] > 1 else PartitionSpec())


def count_shards() -> int:
  """The devices that share a batch in the program that is traced; see `seeds.map_seeds`."""
  return int(jax.sharding.get_abstract_mesh().shape.get("batch", 1))


def replicate(tree: Any) -> Any:
  """Within a traced program: a whole copy on each device that shares the batch, in one exchange."""
  if count_shards() == 1:
    return tree
  return jax.lax.with_sharding_constraint(tree, PartitionSpec())


def share_out(tree: Any) -> Any:
  """Within a traced program: splits arrays (N, ...) over the devices that share the batch."""
  if count_shards() == 1:
    return tree
  return jax.lax.with_sharding_constraint(tree, PartitionSpec("batch"))


def place(tree: Any, sharding: NamedSharding) -> Any:
  """Copies arrays to the devices of `sharding`; every process has the same ones whole.

  `jax.device_put` would send them from process to process to compare them, and refuses keys.
  """
  if jax.process_count() == 1:
    return jax.device_put(tree, sharding)

  def place_leaf(leaf: Any) -> jax.Array:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      data = place_leaf(jax.random.key_data(leaf))
      return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

  return jax.tree.map(place_leaf, tree)


def list_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
  """The rows of a batch that lie on this process's devices, in order: int64."""
  parts = split_batch(mesh).addressable_devices_indices_map((batch_size,)).values()
  rows = np.arange(batch_size)
  return np.unique(np.concatenate([rows[index] for index in parts if index is not None]))


def place_rows(batch: Any, mesh: Mesh) -> Any:
  """Joins the rows of all processes, each of which has those of `list_rows`, to a batch."""
  sharding = split_batch(mesh)
  if jax.process_count() == 1:
    return jax.device_put(batch, sharding)
  return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def fetch(tree: Any, mesh: Mesh) -> Any:
  """Copies arrays to the host of every process, whole; each process must call it."""
  return jax.device_get(tree if jax.process_count() == 1 else _create_gather(mesh)(tree))


@functools.cache
def _create_gather(mesh: Mesh) -> Callable[[Any], Any]:
  return jax.jit(lambda tree: tree, out_shardings=replicated(mesh))


def check_batch_sizes(
  mesh: Mesh, batch_size: int, eval_batch_size: int, *, num_examples: int
) -> None:
  """Raises a UserError unless batches can be split over the devices that share one.

  Args:
    mesh: the devices.
    batch_size: of training, at most `num_examples`.
    eval_batch_size: of evaluation, which pads its batches.
    num_examples: the number of training images.
  """
  _check_batch_size("batch_size", batch_size, mesh, num_examples)
  _check_batch_size("eval_batch_size", eval_batch_size, mesh, MAX_BATCH_SIZE)


def _check_batch_size(name: str, batch_size: int, mesh: Mesh, num_examples: int) -> None:
  parts, most = mesh.shape["batch"], min(num_examples, MAX_BATCH_SIZE)
  reason = ", the number of training images" if most < MAX_BATCH_SIZE else ""
  expected = f"from 1 to {most:,}{reason}"
  if 1 < parts <= most:
    nearest = _list_nearest_multiples(batch_size, parts, most)
    expected = f"a multiple of the {parts} devices that share a batch, {expected}; {nearest}"
  fits = 0 < batch_size <= most and batch_size % parts == 0
  errors.require(fits, name, batch_size, expected)


def _list_nearest_multiples(number: int, factor: int, most: int) -> str:
  """The multiples of `factor` next to `number`, from `factor` to `most`.

  >>> _list_nearest_multiples(6, 4, 100), _list_nearest_multiples(6, 4, 7)
  ('the nearest are 4 and 8', 'the nearest is 4')
  """
  lower = number // factor
  nearest = {max(1, min(n, most // factor)) * factor for n in (lower, lower + 1)}
  verb = "are" if len(nearest) > 1 else "is"
  return f"the nearest {verb} {' and '.join(map(str, sorted(nearest)))}"
