"""Devices that share a batch, and seeds that are trained at once."""

import collections
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks.speed import topology
from flax_cifar import errors, metrics, optim, train
from flax_cifar import state as state_lib
from flax_cifar.configs import common
from flax_cifar.data.augment import normalize
from flax_cifar.parallel import mesh as mesh_lib
from flax_cifar.parallel import seeds as seeds_lib
from tests import tiny

pytestmark = pytest.mark.usefixtures("optimized")


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
    mesh_lib.check_batch_sizes(mesh_lib.create_mesh(4), size, 8, num_examples=100)


@pytest.mark.parametrize(
  ("devices", "size", "num_examples", "expected"),
  [
    (1, 100_000, 90, "from 1 to 90, the number of training images."),
    (1, 91, 90, "from 1 to 90, the number of training images."),
    (1, 100_000, 200_000, "from 1 to 65,536."),
    (4, 100_000, 90, "from 1 to 90, the number of training images; the nearest is 88."),
    (4, 100_000, 200_000, "from 1 to 65,536; the nearest is 65536."),
    (4, 90, 90, "from 1 to 90, the number of training images; the nearest is 88."),
    (4, 6, 90, "from 1 to 90, the number of training images; the nearest are 4 and 8."),
    (4, 0, 90, "from 1 to 90, the number of training images; the nearest is 4."),
  ],
)
def test_the_batch_sizes_that_an_error_proposes_are_valid(devices, size, num_examples, expected):
  mesh = mesh_lib.create_mesh(devices)
  with pytest.raises(errors.UserError) as caught:
    mesh_lib.check_batch_sizes(mesh, size, 8, num_examples=num_examples)
  assert str(caught.value).endswith(expected)
  for proposed in re.findall(r"\d+", expected.replace(",", "").partition("nearest")[2]):
    mesh_lib.check_batch_sizes(mesh, int(proposed), 8, num_examples=num_examples)


def test_evaluation_batches_may_be_larger_than_the_training_split():
  mesh = mesh_lib.create_mesh(1)
  mesh_lib.check_batch_sizes(mesh, 8, 1000, num_examples=90)
  with pytest.raises(errors.UserError, match=r"eval_batch_size=65537 .* from 1 to 65,536\.$"):
    mesh_lib.check_batch_sizes(mesh, 8, 65_537, num_examples=90)


def test_one_seed_has_no_axis():
  tree = {"a": jnp.arange(3)}
  assert seeds_lib.stack([tree]) is seeds_lib.select(tree, 1) is tree
  mesh = mesh_lib.create_mesh(1)
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


def compile_text(num_seeds, num_devices):
  """The compiled step of the tiny network, with two examples for each device."""
  mesh = mesh_lib.create_mesh(num_devices, num_seeds)
  model, optimizer = tiny.TinyNet(), optax.sgd(0.1)
  states = state_lib.create_train_states(
    model=model,
    optimizer=optimizer,
    plateau=optim.create_plateau(enabled=False, **common.get_config().schedule.plateau),
    images=jnp.zeros((1, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE, 3)),
    ema_decay=0,
    seeds=range(num_seeds),
  )
  step = functools.partial(
    train.train_step,
    model=model,
    optimizer=optimizer,
    normalize=normalize.create_normalize((0.5,) * 3, (0.25,) * 3, dtype="float32"),
    mixing=None,
    distillation=None,
    label_smoothing=0.0,
    ema_decay=0.0,
  )
  batch = {
    "image": np.zeros((8, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE, 3), np.uint8),
    "label": np.zeros(8, np.int32),
  }

  def get_batch(key, step, inputs):
    return mesh_lib.share_out(inputs)

  steps = seeds_lib.compile_steps(step, get_batch, input_axes=None, num_seeds=num_seeds, mesh=mesh)
  state = mesh_lib.place(seeds_lib.stack(states), mesh_lib.split_seeds(mesh))
  inputs = mesh_lib.place(batch, mesh_lib.replicated(mesh))
  return steps.lower(state, inputs, 1).compile().as_text()


def count_collectives(text):
  return collections.Counter(kind for kind, _ in topology.list_collectives(text))


def test_a_step_over_devices_exchanges_each_statistic_once_in_each_direction():
  """XLA may join those of the same kind, as it does on a TPU."""
  found = count_collectives(compile_text(1, 4))
  assert found.keys() == {"all-gather", "all-reduce"}
  assert found["all-gather"] == 1  # the norm's mean and variance
  assert found["all-reduce"] <= 3  # back through the norm, and the gradients


def test_devices_with_seeds_of_their_own_exchange_the_metrics_alone():
  text = compile_text(4, 4)
  gathered = re.findall(r"= (\w+\[[\d,]*\])\S* all-gather\(", text)
  assert count_collectives(text) == {"all-gather": len(gathered)}
  assert sorted(gathered) == ["f32[1,4]", "f32[1,4]", "f32[1,4]", "pred[1,4]"]
