"""Devices that share a batch, and seeds that are trained at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_cifar import errors, metrics, parallel


@pytest.mark.parametrize(("asked", "used"), [(0, 4), (1, 1), (2, 2)])
def test_mesh_size(asked, used):
  assert parallel.create_mesh(asked).size == used


@pytest.mark.parametrize("asked", [-1, 5])
def test_impossible_device_counts_are_errors(asked):
  with pytest.raises(errors.UserError, match=f"num_devices={asked} .* from 0 to 4"):
    parallel.create_mesh(asked)


def test_batches_are_split_and_states_copied():
  mesh, x = parallel.create_mesh(4), np.arange(8.0)
  shards = jax.device_put(x, parallel.split_batch(mesh)).addressable_shards
  assert [shard.data.tolist() for shard in shards] == [[0, 1], [2, 3], [4, 5], [6, 7]]
  copies = jax.device_put(x, parallel.replicated(mesh)).addressable_shards
  assert [copy.data.tolist() for copy in copies] == [x.tolist()] * 4


@pytest.mark.parametrize("size", [0, -4, 6])
def test_uneven_batches_are_errors(size):
  with pytest.raises(errors.UserError, match=f"batch_size={size} .* multiple of the 4 devices"):
    parallel.check_batch_size("batch_size", size, parallel.create_mesh(4))


def test_one_seed_has_no_axis():
  tree = {"a": jnp.arange(3)}
  assert parallel.stack_seeds([tree]) is parallel.select_seed(tree, 1) is tree
  assert parallel.vmap_seeds(len, 1, (0,)) is len
  assert parallel.create_keys(5, 1) == jax.random.key(5)


def test_several_seeds_are_stacked_and_mapped():
  trees = [{"a": jnp.arange(3) + seed, "key": jax.random.key(seed)} for seed in range(4)]
  stacked = parallel.stack_seeds(trees)
  assert stacked["a"].shape == (4, 3)
  assert (stacked["key"] == parallel.create_keys(0, 4)).all()
  first = parallel.select_seed(stacked, 4)
  np.testing.assert_array_equal(first["a"], trees[0]["a"])
  sums = parallel.vmap_seeds(lambda tree, shift: tree["a"].sum() + shift, 4, (0, None))(stacked, 10)
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
