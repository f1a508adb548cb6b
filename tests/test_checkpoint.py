"""Checkpoints: what is saved comes back, latest and best are kept, strangers are refused."""


import jax
import numpy as np
import optax
import pytest

from flax_cifar.checkpoint import Checkpoints
from flax_cifar.errors import UserError
from flax_cifar.metrics import create_totals
from flax_cifar.partition import create_mesh
from flax_cifar.schedules import create_plateau
from flax_cifar.state import create_train_state
from tests.tiny import IMAGE_SIZE, TinyNet

PLATEAU = {"factor": 0.5, "patience": 1, "threshold": 0.1, "cooldown": 0, "final": 0.0}
TOTALS = {
  "loss_sum": np.array(1 / 3),
  "correct": np.array(2.0),
  "count": np.array(3.0),
  "seconds": np.array(0.1),
}


def create(seed=0, **network):
  return create_train_state(
    model=TinyNet(**network),
    optimizer=optax.sgd(0.1, momentum=0.9),
    plateau=create_plateau(**PLATEAU),
    image_shape=(IMAGE_SIZE, IMAGE_SIZE, 3),
    ema_decay=0.9,
    seed=seed,
  )


def leaves(state):
  """Every array, keys as their data."""
  arrays = jax.tree.leaves(state.replace(key=jax.random.key_data(state.key)))
  return [np.asarray(array) for array in arrays]


def save(folder, *steps):
  """Saves (step, accuracy) pairs; accuracy None is a save within an epoch."""
  checkpoints = Checkpoints(folder, keep=1)
  for step, accuracy in steps:
    scores = None if accuracy is None else {"loss": 1.0, "accuracy": accuracy}
    checkpoints.save(step, create(seed=step), TOTALS, [{"step": step}], scores)
  checkpoints.close()


def kept(folder):
  return sorted(int(path.name) for path in folder.iterdir())


@pytest.mark.parametrize("devices", [1, 4])
def test_everything_comes_back_on_any_number_of_devices(tmp_path, devices):
  save(tmp_path / "c", (7, 0.5))
  checkpoints = Checkpoints(tmp_path / "c", keep=1)
  state, totals, records = checkpoints.restore_or(create(), create_totals(1), create_mesh(devices))
  checkpoints.close()
  assert totals == TOTALS
  assert records == [{"step": 7}]
  assert len(state.params["head"]["conv"]["kernel"].sharding.device_set) == devices
  for saved, restored in zip(leaves(create(seed=7)), leaves(state), strict=True):
    np.testing.assert_array_equal(saved, restored)


def test_without_a_checkpoint_the_arguments_come_back(tmp_path):
  checkpoints = Checkpoints(tmp_path / "c", keep=1)
  state, totals, records = checkpoints.restore_or(create(), create_totals(1), create_mesh(1))
  checkpoints.close()
  assert totals == create_totals(1)
  assert records == []
  for given, returned in zip(leaves(create()), leaves(state), strict=True):
    np.testing.assert_array_equal(given, returned)


def test_state_may_be_donated_right_after_save(tmp_path):
  """The write goes on in the background while the buffers are used again."""
  scramble = jax.jit(
    lambda params: jax.tree.map(lambda x: x * 0 - 7, params), donate_argnums=0, keep_unused=True
  )
  state = jax.device_put(create(features=600))
  expected = leaves(state)
  checkpoints = Checkpoints(tmp_path / "c", keep=1)
  checkpoints.save(1, state, TOTALS, [])
  params = state.params
  for _ in range(20):
    params = scramble(params)
  checkpoints.close()
  checkpoints = Checkpoints(tmp_path / "c", keep=1)
  restored, _, _ = checkpoints.restore_or(create(features=600), create_totals(1), create_mesh(1))
  checkpoints.close()
  for saved, back in zip(expected, leaves(restored), strict=True):
    np.testing.assert_array_equal(saved, back)


def test_latest_and_best_are_kept(tmp_path):
  save(tmp_path / "c", (1, 0.3), (2, 0.9), (3, 0.5), (4, 0.6))
  assert kept(tmp_path / "c") == [2, 4]


def test_best_survives_a_restart_and_saves_within_an_epoch(tmp_path):
  save(tmp_path / "c", (1, 0.3), (2, 0.9), (3, None))
  save(tmp_path / "c", (4, 0.5), (5, None))
  save(tmp_path / "c", (6, 0.7))
  assert kept(tmp_path / "c") == [2, 6]


def test_saving_a_step_twice_does_nothing(tmp_path):
  save(tmp_path / "c", (1, 0.3))
  save(tmp_path / "c", (1, 0.3))
  assert kept(tmp_path / "c") == [1]


@pytest.mark.parametrize(
  ("network", "message"),
  [
    ({"features": 5}, r"unit/conv/kernel is \(3, 3, 3, 6\) there and \(3, 3, 3, 5\) here"),
    ({"norm": "none"}, r"unit/norm/bias is \(6,\) there and 'absent' here"),
  ],
)
def test_another_network_is_refused(tmp_path, network, message):
  from flax_cifar.models.norms import NoNorm

  save(tmp_path / "c", (1, 0.3))
  checkpoints = Checkpoints(tmp_path / "c", keep=1)
  other = create(**{k: NoNorm if v == "none" else v for k, v in network.items()})
  with pytest.raises(UserError, match=f"another network: .*{message}"):
    checkpoints.restore_or(other, create_totals(1), create_mesh(1))
  checkpoints.close()
