"""Several seeds at once: their arrays are stacked along a first axis, which the mesh may split.

Arrays of a single seed lack that axis, so a run of one seed computes what it would compute alone.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from flax_cifar.parallel import mesh as mesh_lib

Step = Callable[[Any, Any], tuple[Any, Any]]
GetBatch = Callable[[jax.Array, jax.Array, Any], Any]


def create_keys(seed: int, num_seeds: int) -> jax.Array:
  """The random key of each of the runs with `seed`, `seed` + 1, ..."""
  return stack([jax.random.key(seed + number) for number in range(num_seeds)])


def stack(trees: Sequence[Any]) -> Any:
  """Joins a tree per seed."""
  return trees[0] if len(trees) == 1 else jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def select(tree: Any, num_seeds: int, number: int = 0) -> Any:
  """The tree of one of `num_seeds` seeds, counted from 0."""
  return tree if num_seeds == 1 else jax.tree.map(lambda leaf: leaf[number], tree)


def map_seeds(
  function: Callable[..., Any],
  mesh: Mesh,
  *,
  num_seeds: int,
  in_axes: tuple[Any, ...],
  out_axes: Any = 0,
) -> Callable[..., Any]:
  """`function`, which is for one seed, for each of `num_seeds` at once.

  Where the mesh splits the seeds, the devices of a part run a program of their seeds alone: with
  one seed in each, it is the program of a run of that seed.

  Args:
    function: arrays of one seed -> arrays of one seed.
    mesh: whose axis "seed" divides `num_seeds`.
    num_seeds: 1 leaves the function as it is.
    in_axes: as `jax.vmap` takes them; the axis of the seeds is 0 or None.
    out_axes: as `jax.vmap` takes them.
  """
  parts = mesh.shape["seed"]
  local = function if num_seeds == 1 else jax.vmap(function, in_axes, out_axes)
  if mesh.size == 1:
    return local
  if num_seeds == parts > 1:
    local = _map_one_seed(function, in_axes, out_axes)
  get_spec = _get_spec if parts > 1 else lambda axis: PartitionSpec()
  return jax.shard_map(
    local,
    mesh=mesh,
    in_specs=jax.tree.map(get_spec, in_axes, is_leaf=_is_none),
    out_specs=jax.tree.map(get_spec, out_axes, is_leaf=_is_none),
    axis_names={"seed"},
    check_vma=False,
  )


def compile_map(
  function: Callable[..., Any], mesh: Mesh, *, num_seeds: int, in_axes: tuple[Any, ...]
) -> Callable[..., Any]:
  """Compiles `map_seeds` of `function`; the results lie on the devices as the state does."""
  mapped = map_seeds(function, mesh, num_seeds=num_seeds, in_axes=in_axes)
  return jax.jit(mapped, out_shardings=mesh_lib.split_seeds(mesh))


def _map_one_seed(
  function: Callable[..., Any], in_axes: tuple[Any, ...], out_axes: Any
) -> Callable[..., Any]:
  """`jax.vmap` for axes of length 1, without turning convolutions into grouped ones."""

  def squeeze(axis: int | None, tree: Any) -> Any:
    return tree if axis is None else jax.tree.map(lambda x: jnp.squeeze(x, axis), tree)

  def expand(axis: int, tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.expand_dims(x, axis), tree)

  def call(*args: Any) -> Any:
    pairs = zip(in_axes, args, strict=True)
    one = (jax.tree.map(squeeze, axes, tree, is_leaf=_is_none) for axes, tree in pairs)
    return jax.tree.map(expand, out_axes, function(*one))

  return call


def _get_spec(axis: int | None) -> PartitionSpec:
  return PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, "seed")


def _is_none(axis: Any) -> bool:
  return axis is None


def compile_steps(
  step: Step, get_batch: GetBatch, *, input_axes: Any, num_seeds: int, mesh: Mesh
) -> jax.stages.Wrapped:
  """Compiles (state, inputs, number of steps) -> (state, metrics of each step), for all seeds.

  Args:
    step: (state, batch) -> (state, metrics), for one seed.
    get_batch: (key, step, inputs) -> batch, for one seed.
    input_axes: where the inputs have an axis for the seeds, as `jax.vmap` takes it.
    num_seeds: trained at once.
    mesh: the devices; the state is split over them by seed, the metrics are replicated.

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
    one = functools.partial(run, length=length)
    axes: Any = {"in_axes": (0, input_axes), "out_axes": (0, 1)}
    return map_seeds(one, mesh, num_seeds=num_seeds, **axes)(state, inputs)

  shardings = mesh_lib.split_seeds(mesh), mesh_lib.replicated(mesh)
  return jax.jit(run_seeds, static_argnums=2, donate_argnums=0, out_shardings=shardings)
