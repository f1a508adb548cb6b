"""Devices that share a batch, and seeds that are trained at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_cifar import errors, metrics
from flax_cifar.parallel import mesh as mesh_lib
from flax_cifar.parallel import seeds as seeds_lib


@pytest.mark.parametrize(("asked", "used"), [(0, 4), (1, 1), (2, 2)])
def test_mesh_size(asked, used):
  assert mesh_lib.create_mesh(asked).size == used


@pytest.mark.parametrize("asked", [-1, 5])
def test_impossible_device_counts_are_errors(asked):
  with pytest.raises(errors.UserError, match=f"num_devices={asked} .* from 0 to 4"):
    mesh_lib.create_mesh(asked)


def test_batches_are_split_and_states_copied():
  mesh, x = mesh_lib.create_mesh(4), np.arange(8.0)
  shards = jax.device_put(x, mesh_lib.split_batch(mesh)).addressable_shards
  assert [shard.data.tolist() for shard in shards] == [[0, 1], [2, 3], [4, 5], [6, 7]]
  copies = jax.device_put(x, mesh_lib.replicated(mesh)).addressable_shards
  assert [copy.data.tolist() for copy in copies] == [x.tolist()] * 4


@pytest.mark.parametrize("size", [0, -4, 6])
def test_uneven_batches_are_errors(size):
  with pytest.raises(errors.UserError, match=f"batch_size={size} .* multiple of the 4 devices"):
    mesh_lib.check_batch_sizes(mesh_lib.create_mesh(4), size, 8)


def test_one_seed_has_no_axis():
  tree = {"a": jnp.arange(3)}
  assert seeds_lib.stack([tree]) is seeds_lib.select(tree, 1) is tree
  mesh = mesh_lib.create_mesh(4)
  assert seeds_lib.map_seeds(len, mesh, num_seeds=1, in_axes=(0,)) is len
  assert seeds_lib.create_keys(5, 1) == jax.random.key(5)


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_several_seeds_are_stacked_and_mapped(devices):
  trees = [{"a": jnp.arange(3) + seed, "key": jax.random.key(seed)} for seed in range(4)]
  stacked = seeds_lib.stack(trees)
  assert stacked["a"].shape == (4, 3)
  assert (stacked["key"] == seeds_lib.create_keys(0, 4)).all()
  first = seeds_lib.select(stacked, 4)
  np.testing.assert_array_equal(first["a"], trees[0]["a"])
  mapped = seeds_lib.map_seeds(
    lambda tree, shift: tree["a"].sum() + shift,
    mesh_lib.create_mesh(devices, 4),
    num_seeds=4,
    in_axes=(0, None),
  )
  sums = jax.jit(mapped)(stacked, 10)
  assert sums.tolist() == [13, 16, 19, 22]


@pytest.mark.parametrize(
  ("values", "fields"),
  [
    (np.float64(0.5), {"loss": 0.5}),
    (np.array(0.5), {"loss": 0.5}),
    (np.array([0.5, 1.0]), {"loss": 0.75, "loss_per_seed": [0.5, 1.0]}),
  ],
)
def test_records_have_the_mean_and_the_values_of_the_seeds(values, fields):
  assert metrics.describe_seeds("loss", values) == fields
