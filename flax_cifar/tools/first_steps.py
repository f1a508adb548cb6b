"""The first steps of a run, outside its folder, for tools that watch them."""

from collections.abc import Iterator

import numpy as np
from ml_collections import ConfigDict

from flax_cifar import metrics, train
from flax_cifar import state as state_lib
from flax_cifar.data import splits as splits_lib
from flax_cifar.parallel import mesh as mesh_lib
from flax_cifar.run import config as config_lib
from flax_cifar.run import setup as setup_lib


def check(config: ConfigDict) -> None:
  """Raises a UserError for a config that a run would refuse before it loads data."""
  setup_lib.check_choices(config_lib.settle(config))


def set_up(config: ConfigDict, num_steps: int) -> setup_lib.Setup:
  """The run of one seed that `config` describes, with as many epochs as `num_steps` take.

  Raises:
    UserError: as a run of `config` would.
  """
  config = config_lib.settle(config)
  config.num_seeds = 1
  splits = splits_lib.load_splits(protocol=config.protocol, **config.data)
  mesh = mesh_lib.create_mesh(config.num_devices, config.num_seeds)
  mesh_lib.check_batch_sizes(
    mesh, config.batch_size, config.eval_batch_size, num_examples=len(splits.train)
  )
  steps_per_epoch = max(1, len(splits.train) // config.batch_size)
  config.total_epochs = max(config.total_epochs, -(-num_steps // steps_per_epoch))
  mean, std = config_lib.choose_normalization(config.augment, splits)
  return setup_lib.create_setup(
    config,
    train.train_step,
    splits.train,
    class_names=splits.class_names,
    mean=mean,
    std=std,
    mesh=mesh,
  )


def iterate(
  setup: setup_lib.Setup, state: state_lib.TrainState, steps: range
) -> Iterator[tuple[state_lib.TrainState, dict[str, np.ndarray]]]:
  """Trains from `state`, and yields the state and the metrics after each of `steps`.

  Where a call of compiled code makes several steps, they have the same state. `state` is used up.
  """
  epoch = setup.feed.steps_per_epoch
  while steps:
    end = min(steps.stop, (steps.start // epoch + 1) * epoch)
    for length, inputs in setup.feed.chunks(range(steps.start, end)):
      state, sums = setup.steps_fn(state, inputs, length)
      for values in metrics.iterate_steps([sums]):
        yield state, values
    steps = range(end, steps.stop)
