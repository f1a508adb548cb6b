"""Every config file: it loads, names what exists, and takes its variants."""

import importlib
import pathlib

import pytest

from configs import common
from flax_cifar.data.augment_host import OPS
from flax_cifar.models import MODELS, create_model
from flax_cifar.models.norms import NORMS
from flax_cifar.optimizers import OPTIMIZERS
from flax_cifar.schedules import SCHEDULES, create_plateau, create_schedule

FOLDER = pathlib.Path(common.__file__).parent
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in ("__init__", "common"))


def load(name, arg=""):
  return importlib.import_module(f"configs.{name}").get_config(arg)


@pytest.mark.parametrize("name", NAMES)
def test_config_is_usable(name):
  config = load(name)
  assert config.name == name
  create_model(
    **config.model, num_classes=10, norm_arguments=config.norm, dtype=config.compute_dtype
  )
  create_schedule(steps_per_epoch=10, total_epochs=config.total_epochs, **config.schedule)
  create_plateau(**config.schedule.plateau)
  assert set(config.augment.ops) <= set(OPS)


@pytest.mark.parametrize("name", NAMES)
def test_header_gives_its_command(name):
  docstring = importlib.import_module(f"configs.{name}").__doc__
  assert f"python main.py --config=configs/{name}.py" in docstring


@pytest.mark.parametrize("name", NAMES)
def test_misspelt_keys_are_named(name):
  config = load(name)
  with pytest.raises(AttributeError, match="batchsize"):
    config.batchsize = 3
  with pytest.raises(AttributeError, match="learning_rat"):
    config.optimizer.learning_rat = 3.0


def test_common_holds_arguments_of_every_choice():
  config = common.get_config()
  assert set(config.norm) == set(NORMS)
  assert set(config.schedule) - {"name"} == set(SCHEDULES)
  assert set(OPTIMIZERS) <= set(config.optimizer)
  assert set(OPS) <= set(config.augment)
  assert config.model.name in MODELS


def test_variants_combine_and_show_in_the_name():
  config = load("s9", "published,norm=group,seed=3,epochs=7")
  assert config.protocol == "published"
  assert config.augment.coarse_dropout.fill == "black"
  assert (config.model.norm, config.seed, config.total_epochs) == ("group", 3, 7)
  assert config.name == "s9-published-norm-group-seed-3-epochs-7"


def test_s9_is_the_published_recipe():
  config = load("s9")
  assert (config.optimizer.learning_rate, config.optimizer.sgd.momentum) == (0.01, 0.9)
  assert config.optimizer.weight_decay == 0
  assert (config.batch_size, config.total_epochs, config.model.dropout_rate) == (128, 51, 0.05)
  plateau = config.schedule.plateau
  assert (plateau.factor, plateau.patience, plateau.threshold) == (0.05, 5, 0.1)
  shift = config.augment.shift_scale_rotate
  assert (shift.shift, shift.scale, shift.rotate, shift.p) == (0.09, 0.09, 6.0, 0.5)
  hole = config.augment.coarse_dropout
  assert (hole.holes, hole.height, hole.width, hole.fill, hole.p) == (1, 16, 16, "mean", 0.5)
  assert config.protocol == "honest"


def test_ghost_is_the_published_recipe():
  config = load("ghost", "published")
  assert (config.optimizer.learning_rate, config.optimizer.sgd.momentum) == (0.016, 0.9)
  assert config.optimizer.weight_decay == 0
  assert (config.batch_size, config.total_epochs, config.model.dropout_rate) == (256, 25, 0.1)
  assert (config.norm.ghost.num_splits, config.norm.ghost.train_scale) == (2, False)
  step = config.schedule.step
  assert (config.schedule.name, step.factor, step.every) == ("step", 0.92, 2.0)
  assert config.augment.ops == ("random_crop", "horizontal_flip", "rotate")
  assert (config.augment.random_crop.padding, config.augment.rotate.limit) == (4, 8.0)
  assert config.augment.std == (0.2023, 0.1994, 0.2010)
  assert config.protocol == "published"
  assert (load("ghost").protocol, load("ghost").augment.std) == ("honest", ())


def test_skip_is_the_published_recipe():
  config = load("skip", "published")
  assert (config.optimizer.learning_rate, config.optimizer.sgd.momentum) == (0.01, 0.9)
  assert config.optimizer.weight_decay == 0
  assert (config.batch_size, config.total_epochs, config.model.dropout_rate) == (32, 20, 0.05)
  assert (config.norm.group.num_groups, config.norm.layer.affine) == (4, False)
  plateau = config.schedule.plateau
  assert (config.schedule.name, plateau.factor, plateau.patience) == ("plateau", 0.8, 0)
  jitter = config.augment.color_jitter
  assert (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue) == (0.1,) * 4
  assert (jitter.p, config.augment.rotate.limit, config.augment.rotate.p) == (1.0, 7.0, 1.0)
  assert config.augment.mean == config.augment.std == (0.5, 0.5, 0.5)
  assert (config.protocol, load("skip").protocol) == ("published", "honest")


@pytest.mark.parametrize("arg", ["smoky", "nrm=group", "norm="])
def test_unknown_variants_list_the_choices(arg):
  with pytest.raises(ValueError, match=f"'{arg}' is unknown; choose from .*smoke.*norm=VALUE"):
    load("s9", arg)


def test_seed_must_be_a_number():
  with pytest.raises((TypeError, ValueError)):
    load("s9", "seed=one")
