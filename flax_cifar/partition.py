"""One mesh axis over the local devices: batches are split over it, the state is on every one."""

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flax_cifar.errors import require

MAX_BATCH_SIZE = 65_536  # an evaluation fills its last batch up to this, whatever the split holds


def create_mesh(num_devices: int) -> Mesh:
  """A mesh with the axis "batch" over the first `num_devices` local devices; 0 means all.

  Raises:
    UserError: there are not that many devices.
  """
  devices = jax.local_devices()
  require(
    0 <= num_devices <= len(devices), "num_devices", num_devices, f"from 0 to {len(devices)} here"
  )
  return Mesh(devices[: num_devices or None], ("batch",))


def replicated(mesh: Mesh) -> NamedSharding:
  """The sharding of the state: a whole copy on each device."""
  return NamedSharding(mesh, PartitionSpec())


def split_batch(mesh: Mesh) -> NamedSharding:
  """The sharding of arrays (N, ...): N / devices examples on each device."""
  return NamedSharding(mesh, PartitionSpec("batch"))


def check_batch_size(name: str, batch_size: int, mesh: Mesh) -> None:
  """A UserError unless `batch_size` is in 1..MAX_BATCH_SIZE and divides evenly over the devices."""
  require(
    0 < batch_size <= MAX_BATCH_SIZE and batch_size % mesh.size == 0,
    name,
    batch_size,
    f"a multiple of the {mesh.size} devices (or set num_devices) from 1 to {MAX_BATCH_SIZE:,}",
  )
