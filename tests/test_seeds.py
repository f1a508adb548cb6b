"""Several seeds: stacked arrays, and what a record says of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_cifar.seeds import create_keys, describe_seeds, first_seed, over_seeds, stack_seeds


def test_one_seed_has_no_axis():
  tree = {"a": jnp.arange(3)}
  assert stack_seeds([tree]) is first_seed(tree, 1) is tree
  assert over_seeds(len, 1, (0,)) is len
  assert create_keys(5, 1) == jax.random.key(5)


def test_several_seeds_are_stacked_and_mapped():
  trees = [{"a": jnp.arange(3) + seed, "key": jax.random.key(seed)} for seed in range(4)]
  stacked = stack_seeds(trees)
  assert stacked["a"].shape == (4, 3)
  assert (stacked["key"] == create_keys(0, 4)).all()
  first = first_seed(stacked, 4)
  np.testing.assert_array_equal(first["a"], trees[0]["a"])
  sums = over_seeds(lambda tree, shift: tree["a"].sum() + shift, 4, (0, None))(stacked, 10)
  assert sums.tolist() == [13, 16, 19, 22]


@pytest.mark.parametrize(
  ("values", "fields"),
  [
    (np.float64(0.5), {"loss": 0.5}),
    (np.array(0.5), {"loss": 0.5}),
    (np.array([0.5, 1.0]), {"loss": 0.75, "loss_per_seed": [0.5, 1.0]}),
  ],
)
def test_records_hold_the_mean_and_the_list(values, fields):
  assert describe_seeds("loss", values) == fields
