"""Every config file loads, names existing components and accepts its variants."""

import importlib
import pathlib

import pytest

from flax_cifar import models, optim
from flax_cifar.configs import common, variants
from flax_cifar.data.augment import host
from flax_cifar.models import norms
from flax_cifar.run import config as config_lib

FOLDER = pathlib.Path(common.__file__).parent
SHARED = ("__init__", "common", "recipes", "variants")  # modules that are not configs
OWN = ("quickstart", "sprint", "tiny50k", "tiny100k", "tiny200k", "tiny700k")  # no replays
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in SHARED)


def load(name, arg=""):
  return importlib.import_module(f"flax_cifar.configs.{name}").get_config(arg)


@pytest.mark.parametrize("name", NAMES)
def test_config_is_usable(name):
  config = load(name)
  assert config.name == name
  config_lib.create_model(config, num_classes=10)
  optim.create_schedule(steps_per_epoch=10, total_epochs=config.total_epochs, **config.schedule)
  optim.create_plateau(enabled=True, **config.schedule.plateau)
  assert set(config.augment.ops) <= set(host.OPS)


@pytest.mark.parametrize("name", NAMES)
def test_header_gives_its_command(name):
  docstring = importlib.import_module(f"flax_cifar.configs.{name}").__doc__
  assert f"python main.py --config=configs/{name}.py" in docstring


@pytest.mark.parametrize("name", NAMES)
def test_misspelled_keys_are_named(name):
  config = load(name)
  with pytest.raises(AttributeError, match="batchsize"):
    config.batchsize = 3
  with pytest.raises(AttributeError, match="learning_rat"):
    config.optimizer.learning_rat = 3.0


def test_common_holds_arguments_of_every_choice():
  config = common.get_config()
  assert set(config.norm) == set(norms.NORMS)
  assert set(config.schedule) - {"name"} == set(optim.SCHEDULES)
  assert set(optim.OPTIMIZERS) <= set(config.optimizer)
  assert set(host.OPS) <= set(config.augment)
  assert config.model.name in models.MODELS


def test_later_keys_have_their_defaults():
  flat = config_lib.flatten(common.get_config().to_dict())
  assert {key: flat[key] for key in config_lib.LATER_KEYS} == config_lib.LATER_KEYS


def test_variants_combine_and_show_in_the_name():
  config = load("s9", "published,norm=group,seed=3,epochs=7")
  assert config.protocol == "published"
  assert config.augment.coarse_dropout.fill == "black"
  assert (config.model.norm, config.seed, config.total_epochs) == ("group", 3, 7)
  assert config.name == "s9-published-norm-group-seed-3-epochs-7"


def test_the_recipe_sees_the_norm_and_other_variants_override_the_recipe():
  def recipe(config):
    config.optimizer.learning_rate = 0.5 if config.model.norm == "group" else 0.25
    config.total_epochs = 9

  for arg, expected in (("epochs=4,norm=group", (0.5, 4)), ("", (0.25, 9))):
    config = variants.apply_arg(common.get_config(), arg, {"ours": recipe})
    assert (config.optimizer.learning_rate, config.total_epochs) == expected


@pytest.mark.parametrize("name", NAMES)
def test_only_replays_are_published_protocol_and_ours_takes_no_more_epochs(name):
  ours = load(name)
  assert ours.protocol == "honest"
  assert ours.data.validation_size > 0
  if name in OWN:
    return
  replay = load(name, "published")
  assert replay.protocol == "published"
  assert ours.total_epochs <= replay.total_epochs
  assert ours.model.name == replay.model.name
  assert ours.model.norm == replay.model.norm
  assert ours.norm == replay.norm


# The values that the sources state, or imply by calling torchvision, for each `file:variant`.
RECIPES = {
  "s9:published": {
    "batch_size": 128,
    "total_epochs": 51,
    "optimizer.learning_rate": 0.01,
    "schedule.name": "plateau",
    "schedule.plateau.factor": 0.05,
    "schedule.plateau.patience": 5,
    "schedule.plateau.threshold": 0.1,
    "model.dropout_rate": 0.05,
    "augment.ops": ("horizontal_flip", "shift_scale_rotate", "coarse_dropout"),
    "augment.horizontal_flip.p": 0.5,
    "augment.shift_scale_rotate.shift": 0.09,
    "augment.shift_scale_rotate.scale": 0.09,
    "augment.shift_scale_rotate.rotate": 6.0,
    "augment.shift_scale_rotate.p": 0.5,
    "augment.coarse_dropout.holes": 1,
    "augment.coarse_dropout.height": 16,
    "augment.coarse_dropout.width": 16,
    "augment.coarse_dropout.p": 0.5,
    "augment.coarse_dropout.fill": "black",
  },
  "ghost:published": {
    "batch_size": 256,
    "total_epochs": 25,
    "optimizer.learning_rate": 0.016,
    "schedule.name": "step",
    "schedule.step.factor": 0.92,
    "schedule.step.every": 2.0,
    "model.norm": "ghost",
    "model.dropout_rate": 0.1,
    "norm.ghost.num_splits": 2,
    "norm.ghost.train_scale": False,
    "augment.ops": ("random_crop", "horizontal_flip", "rotate"),
    "augment.random_crop.padding": 4,
    "augment.rotate.limit": 8.0,
    "augment.rotate.interpolation": "nearest",
    "augment.rotate.p": 1.0,
    "augment.std": (0.2023, 0.1994, 0.2010),
  },
  "skip:published": {
    "batch_size": 32,
    "total_epochs": 20,
    "optimizer.learning_rate": 0.01,
    "schedule.name": "plateau",
    "schedule.plateau.factor": 0.8,
    "schedule.plateau.patience": 0,
    "model.dropout_rate": 0.05,
    "norm.group.num_groups": 4,
    "norm.layer.affine": False,
    "augment.ops": ("color_jitter", "rotate"),
    "augment.color_jitter.brightness": 0.1,
    "augment.color_jitter.contrast": 0.1,
    "augment.color_jitter.saturation": 0.1,
    "augment.color_jitter.hue": 0.1,
    "augment.color_jitter.p": 1.0,
    "augment.rotate.limit": 7.0,
    "augment.rotate.interpolation": "nearest",
    "augment.rotate.p": 1.0,
    "augment.mean": (0.5, 0.5, 0.5),  # to (-1, 1)
    "augment.std": (0.5, 0.5, 0.5),
  },
  "skip_dilated:published": {"total_epochs": 37, "model.dropout_rate": 0.05},
  "keras_base:published": {
    "model.norm": "none",
    "model.dropout_rate": 0.25,
    "model.init": "keras",
    "optimizer.name": "adamw",
    "optimizer.learning_rate": 0.001,
    "optimizer.adamw.epsilon": 1e-7,
  },
  "keras_fcn:published": {"total_epochs": 100, "model.norm": "batch"},
  "five_convs:published": {"total_epochs": 50, "model.norm": "batch"},
}
STUDY = {
  "batch_size": 128,
  "total_epochs": 21,
  "optimizer.learning_rate": 0.01,
  "schedule.name": "step",
  "schedule.step.factor": 0.1,
  "schedule.step.every": 6.0,
  "model.dropout_rate": 0.05,
  "norm.group.num_groups": 2,
  "augment.ops": ("rotate",),
  "augment.rotate.limit": 6.0,
  "augment.rotate.interpolation": "nearest",
  "augment.rotate.p": 1.0,
}
RECIPES |= {"s9:study": STUDY, "pyramid:published": STUDY}


def test_every_replay_is_checked():
  replays = {f"{name}:published" for name in NAMES if name not in OWN}
  assert set(RECIPES) == replays | {"s9:study"}


@pytest.mark.parametrize("name", RECIPES)
def test_replays_are_as_published(name):
  config = load(*name.split(":"))
  assert config.protocol == "published"
  values = config.to_dict()
  for key, expected in ({"model.init": "torch"} | RECIPES[name]).items():
    value = values
    for part in key.split("."):
      value = value[part]
    assert value == expected, key
  if config.optimizer.name == "sgd":
    assert config.optimizer.sgd.to_dict() == {"momentum": 0.9, "nesterov": False}
  assert config.optimizer.weight_decay == config.ema.decay == config.loss.label_smoothing == 0


@pytest.mark.parametrize("arg", ["smoky", "nrm=group", "norm="])
def test_unknown_variants_list_the_choices(arg):
  with pytest.raises(ValueError, match=f"'{arg}' is unknown; choose from .*smoke.*norm=VALUE"):
    load("s9", arg)


def test_full_holds_out_no_validation_images():
  config = load("skip", "full,norm=group")
  assert (config.protocol, config.data.validation_size) == ("honest", 0)
  assert config.name == "skip-full-norm-group"


def test_any_recipe_may_be_a_trial():
  assert load("skip", "trial").protocol == "trial"
  config = load("skip", "published,trial,lr=0.5")
  assert (config.protocol, config.schedule.name) == ("trial", "plateau")
  assert config.optimizer.learning_rate == 0.5
  assert config.name == "skip-published-trial-lr-0.5"


def test_a_value_counts_wherever_it_stands():
  first, last = (load("quickstart", arg) for arg in ("epochs=1,smoke", "smoke,epochs=1"))
  assert (first.total_epochs, last.total_epochs) == (1, 1)
  assert first.name == "quickstart-epochs-1-smoke"


def test_two_recipes_are_refused():
  with pytest.raises(ValueError, match="'published' and 'study' are both recipes"):
    load("s9", "published,study")


@pytest.mark.parametrize(
  ("arg", "kind"), [("seed=one", "int"), ("epochs=²", "int"), ("lr=x", "float")]
)
def test_values_of_the_wrong_type_are_quoted(arg, kind):
  with pytest.raises(ValueError, match=f"'{arg}' needs a value of type {kind}"):
    load("s9", arg)


@pytest.mark.parametrize("arg", ["seed=1,seed=2", "full,full"])
def test_a_part_that_is_there_twice_is_refused(arg):
  one, other = arg.split(",")
  with pytest.raises(ValueError, match=f"'{one}' and '{other}' set the same"):
    load("s9", arg)
