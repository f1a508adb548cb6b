"""Builds the network, batches, state and compiled functions of a config."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from flax_cifar import errors, evaluate, optim
from flax_cifar import state as state_lib
from flax_cifar.data import dataset, feeds
from flax_cifar.data.augment import arguments, mixing, normalize
from flax_cifar.parallel import mesh as mesh_lib
from flax_cifar.parallel import seeds as seeds_lib
from flax_cifar.run import checkpoint, teacher
from flax_cifar.run import config as config_lib


@dataclasses.dataclass(frozen=True)
class Setup:
  """A run before its first step; nothing but `state` changes in it.

  Attributes:
    model: the network.
    feed: the batches.
    schedule: step -> learning rate, as a factor of the peak.
    plateau: lowers the learning rate by the validation loss, if enabled.
    state: the train state, of all seeds, on the devices.
    steps_fn: see `seeds.compile_steps`.
    eval_step: see `evaluate.create_eval_step`.
    observe: (state of the plateau, validation loss) -> state of the plateau, for all seeds.
  """

  model: nn.Module
  feed: feeds.Feed
  schedule: optim.Schedule
  plateau: optim.Plateau
  state: state_lib.TrainState
  steps_fn: jax.stages.Wrapped
  eval_step: evaluate.EvalStep
  observe: Callable[[Any, Any], Any]


STEPS = 1000  # of an epoch, where there are no data yet


def check_choices(config: ConfigDict) -> None:
  """Checks what needs no images, so that a mistake shows before any are downloaded.

  Raises:
    UserError: a key has a value that is unknown or out of range.
  """
  config_lib.check_numbers(config, has_validation=True)
  checkpoint.create_policy(config.checkpoint)
  feeds.check_seeds(config.seed, config.num_seeds)
  mesh = mesh_lib.create_mesh(config.num_devices, config.num_seeds)
  sizes = config.batch_size, config.eval_batch_size
  mesh_lib.check_batch_sizes(mesh, *sizes, num_examples=mesh_lib.MAX_BATCH_SIZE)
  teacher.check_options(config)
  config_lib.create_model(config, num_classes=2)
  schedule = optim.create_schedule(
    steps_per_epoch=STEPS,
    total_epochs=min(config.total_epochs, errors.MAX_STEPS // STEPS),
    **config.schedule,
  )
  optim.create_plateau(enabled=False, **config.schedule.plateau)
  optim.create_optimizer(schedule, **config.optimizer)
  mixing.create_mixing(**config.mixing.to_dict())
  feeds.check_numbers(
    config.augment.backend,
    steps_per_call=config.steps_per_call,
    num_seeds=config.num_seeds,
    workers=config.augment.workers,
  )
  mean, std = config.augment.mean or (0.0,) * 3, config.augment.std or (1.0,) * 3
  normalize.check(mean, std)
  for name in config.augment.ops:
    errors.choose("augment.ops", name, arguments.RULES)
    arguments.resolve_arguments(name, config.augment[name], mean)


def create_setup(
  config: ConfigDict,
  train_step: Callable[..., Any],
  split: dataset.Split,
  *,
  class_names: tuple[str, ...],
  mean: tuple[float, ...],
  std: tuple[float, ...],
  mesh: Mesh,
) -> Setup:
  """Makes everything that a run computes with.

  Args:
    config: of the run, settled.
    train_step: `train.train_step`, or another function of its arguments.
    split: the training images.
    class_names: one for each logit.
    mean: that normalization subtracts, per channel in [0, 1].
    std: that normalization divides by.
    mesh: the devices.

  Raises:
    UserError: a key has a value that is unknown, out of range, or does not fit others.
  """
  feed = feeds.create_feed(split, mean=mean, mesh=mesh, **config_lib.get_feed_arguments(config))
  model = config_lib.create_model(config, num_classes=len(class_names))
  schedule = optim.create_schedule(
    steps_per_epoch=feed.steps_per_epoch, total_epochs=config.total_epochs, **config.schedule
  )
  plateau = optim.create_plateau(
    enabled=config.schedule.name == "plateau", **config.schedule.plateau
  )
  optimizer = optim.create_optimizer(schedule, **config.optimizer)
  to_floats = normalize.create_normalize(mean, std, dtype=config.compute_dtype)
  with config_lib.explain_misfit(config):
    states = state_lib.create_train_states(
      model=model,
      optimizer=optimizer,
      plateau=plateau,
      images=to_floats(state_lib.choose_init_images(split.images)),
      ema_decay=config.ema.decay,
      seeds=range(config.seed, config.seed + config.num_seeds),
    )
  distillation = teacher.create_distillation(
    config, split, class_names=class_names, mean=mean, std=std
  )
  step = functools.partial(
    train_step,
    model=model,
    optimizer=optimizer,
    normalize=to_floats,
    mixing=mixing.create_mixing(**config.mixing.to_dict()),
    label_smoothing=config.loss.label_smoothing,
    distillation=distillation,
    ema_decay=config.ema.decay,
  )
  across: dict[str, Any] = {"mesh": mesh, "num_seeds": config.num_seeds}
  return Setup(
    model=model,
    feed=feed,
    schedule=schedule,
    plateau=plateau,
    state=mesh_lib.place(seeds_lib.stack(states), mesh_lib.split_seeds(mesh)),
    steps_fn=seeds_lib.compile_steps(step, feed.get_batch, input_axes=feed.seed_axes, **across),
    eval_step=evaluate.create_eval_step(model=model, normalize=to_floats, **across),
    observe=seeds_lib.compile_map(plateau.observe, in_axes=(0, 0), **across),
  )
