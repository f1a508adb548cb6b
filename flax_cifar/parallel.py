"""Devices and seeds: batches are split over a mesh, seeds are stacked along a first axis.

Arrays of a single seed lack that axis, so a run of one seed computes what it would compute alone.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flax_cifar import errors

Step = Callable[[Any, Any], tuple[Any, Any]]
GetBatch = Callable[[jax.Array, jax.Array, Any], Any]

MAX_BATCH_SIZE = (
  65_536  # evaluation pads its last batch to the full size, so a huge one needs as much memory
)


def create_mesh(num_devices: int) -> Mesh:
  """A mesh with the axis "batch" over the first `num_devices` local devices; 0 means all.

  Raises:
    UserError: there are not that many devices.
  """
  devices = jax.local_devices()
  errors.require(
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
  """Raises a UserError unless `batch_size` is a multiple of the devices, up to MAX_BATCH_SIZE."""
  errors.require(
    0 < batch_size <= MAX_BATCH_SIZE and batch_size % mesh.size == 0,
    name,
    batch_size,
    f"a multiple of the {mesh.size} devices (or set num_devices) from 1 to {MAX_BATCH_SIZE:,}",
  )


def vmap_seeds(
  function: Callable[..., Any], num_seeds: int, in_axes: Any, out_axes: Any = 0
) -> Callable[..., Any]:
  """`function` for each seed at once, with the axes as `jax.vmap` takes them."""
  return function if num_seeds == 1 else jax.vmap(function, in_axes, out_axes)


def stack_seeds(trees: Sequence[Any]) -> Any:
  """Joins a tree per seed."""
  return trees[0] if len(trees) == 1 else jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def select_seed(tree: Any, num_seeds: int, number: int = 0) -> Any:
  """The tree of one of `num_seeds` seeds, counted from 0."""
  return tree if num_seeds == 1 else jax.tree.map(lambda leaf: leaf[number], tree)


def compile_steps(
  step: Step, get_batch: GetBatch, *, input_axes: Any, num_seeds: int, mesh: Mesh
) -> jax.stages.Wrapped:
  """Compiles (state, inputs, number of steps) -> (state, metrics of each step), for all seeds.

  Args:
    step: (state, batch) -> (state, metrics), for one seed.
    get_batch: (key, step, inputs) -> batch, for one seed.
    input_axes: where the inputs have an axis for the seeds, as `jax.vmap` takes it.
    num_seeds: trained at once.
    mesh: the devices; the state and the metrics are replicated over them.

  Returns:
    The compiled function. It donates the state; its metrics are arrays (steps,), for several seeds
    (steps, seeds).
  """

  def run(state: Any, inputs: Any, length: int) -> Any:
    def body(state: Any, _: None) -> Any:
      return step(state, get_batch(state.key, state.step, inputs))

    if length > 1:
      return jax.lax.scan(body, state, length=length)
    state, metrics = body(state, None)  # no loop, see `device_feed.choose_steps_per_call`
    return state, jax.tree.map(lambda value: value[None], metrics)

  def run_seeds(state: Any, inputs: Any, length: int) -> Any:
    function = functools.partial(run, length=length)
    return vmap_seeds(function, num_seeds, (0, input_axes), out_axes=(0, 1))(state, inputs)

  sharding = replicated(mesh)
  return jax.jit(run_seeds, static_argnums=2, donate_argnums=0, out_shardings=sharding)


def create_keys(seed: int, num_seeds: int) -> jax.Array:
  """The random key of each of the runs with `seed`, `seed` + 1, ..."""
  return stack_seeds([jax.random.key(seed + number) for number in range(num_seeds)])
