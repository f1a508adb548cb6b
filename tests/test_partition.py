"""The mesh over four forced CPU devices."""

import jax
import numpy as np
import pytest

from flax_cifar.errors import UserError
from flax_cifar.partition import check_batch_size, create_mesh, replicated, split_batch


@pytest.mark.parametrize(("asked", "used"), [(0, 4), (1, 1), (2, 2)])
def test_mesh_size(asked, used):
  assert create_mesh(asked).size == used


@pytest.mark.parametrize("asked", [-1, 5])
def test_impossible_device_counts_are_errors(asked):
  with pytest.raises(UserError, match=f"num_devices={asked} .* from 0 to 4"):
    create_mesh(asked)


def test_batches_are_split_and_states_copied():
  mesh, x = create_mesh(4), np.arange(8.0)
  shards = jax.device_put(x, split_batch(mesh)).addressable_shards
  assert [shard.data.tolist() for shard in shards] == [[0, 1], [2, 3], [4, 5], [6, 7]]
  copies = jax.device_put(x, replicated(mesh)).addressable_shards
  assert [copy.data.tolist() for copy in copies] == [x.tolist()] * 4


@pytest.mark.parametrize("size", [0, -4, 6])
def test_uneven_batches_are_errors(size):
  with pytest.raises(UserError, match=f"batch_size={size} .* multiple of the 4 devices"):
    check_batch_size("batch_size", size, create_mesh(4))
