"""Checks of a config that need no images, and what a run computes with."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_cifar import errors, train
from flax_cifar.data import splits
from flax_cifar.parallel import mesh as mesh_lib
from flax_cifar.parallel import seeds as seeds_lib
from flax_cifar.run import setup as setup_lib
from tests import tiny


@pytest.mark.parametrize(
  ("key", "value"),
  [
    ("optimizer.name", "adam"),
    ("optimizer.learning_rate", -1.0),
    ("schedule.name", "linear"),
    ("model.name", "resnet"),
    ("model.norm", "bach"),
    ("model.dropout_rate", 1.5),
    ("mixing.name", "mix"),
    ("augment.backend", "host"),
    ("augment.ops", ("rotat",)),
    ("total_epochs", 0),
    ("seed", -1),
    ("num_seeds", 0),
    ("num_devices", -1),
    ("batch_size", 0),
    ("eval_batch_size", 0),
    ("checkpoint.every", 0),
    ("schedule.plateau.factor", 2.0),
    ("steps_per_call", -1),
    ("augment.std", (0.0, 1.0, 1.0)),
    ("loss.distillation.weight", 0.0),
    ("loss.distillation.teacher", "tiny50"),
    ("compute_dtype", "float64"),
  ],
)
def test_a_mistake_is_named_before_data_are_loaded(tiny_model, tmp_path, monkeypatch, key, value):
  monkeypatch.setattr(splits, "load_splits", lambda **arguments: pytest.fail("data were loaded"))
  config = tiny.get_config("cifar10", **{key: value})
  with pytest.raises(errors.UserError, match=f"{key}="):
    train.train_and_evaluate(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
  ("key", "value"), [("num_seeds", 2), ("steps_per_call", 5), ("augment.workers", -1)]
)
def test_what_the_host_cannot_do_is_named_before_data_are_loaded(
  tiny_model, tmp_path, monkeypatch, key, value
):
  monkeypatch.setattr(splits, "load_splits", lambda **arguments: pytest.fail("data were loaded"))
  config = tiny.get_config("cifar10", **{"augment.backend": "albumentations", key: value})
  with pytest.raises(errors.UserError, match=f"{key}={value}"):
    train.train_and_evaluate(config, tmp_path / "run")


def test_a_value_of_an_op_is_checked_too(tiny_model, tmp_path, monkeypatch):
  monkeypatch.setattr(splits, "load_splits", lambda **arguments: pytest.fail("data were loaded"))
  changes = {"augment.ops": ("rotate",), "augment.rotate.limit": 200.0}
  with pytest.raises(errors.UserError, match=r"augment\.rotate\.limit=200\.0"):
    train.train_and_evaluate(tiny.get_config("cifar10", **changes), tmp_path / "run")


def test_a_run_gets_what_its_config_says(tiny_model, data, monkeypatch):
  changes = {
    "loss.label_smoothing": 0.13,
    "ema.decay": 0.77,
    "mixing.name": "cutmix",
    "schedule.name": "one_cycle",
    "schedule.one_cycle.initial": 0.5,
    "optimizer.name": "sgd",
    "optimizer.weight_decay": 0.5,
    "augment.horizontal_flip.p": 1.0,
  }
  config = tiny.get_config(data, **changes)
  compile_steps, caught = seeds_lib.compile_steps, {}

  def spy(step, *args, **kwargs):
    caught.update(step.keywords)
    return compile_steps(step, *args, **kwargs)

  monkeypatch.setattr(seeds_lib, "compile_steps", spy)
  loaded = splits.load_splits(protocol="honest", **config.data)
  mean, std = (0.1, 0.2, 0.3), (0.5, 0.4, 0.3)
  setup = setup_lib.create_setup(
    config,
    train.train_step,
    loaded.train,
    class_names=loaded.class_names,
    mean=mean,
    std=std,
    mesh=mesh_lib.create_mesh(1),
  )
  assert (caught["label_smoothing"], caught["ema_decay"]) == (0.13, 0.77)
  white = caught["normalize"](np.full((1, 1, 1, 3), 255, np.uint8))
  np.testing.assert_allclose(white.ravel(), (1 - np.array(mean)) / std, rtol=1e-6)
  images = jax.random.uniform(jax.random.key(0), (16, 8, 8, 3))
  mixed, _ = caught["mixing"](images, jnp.eye(16), jax.random.key(1))
  assert (mixed != images).any()
  batch = setup.feed.batch_at(0)
  np.testing.assert_array_equal(batch["image"], loaded.train.images[batch["example"]][:, :, ::-1])
  # SGD takes rate times decay times weight where there is no gradient; one_cycle ends at `final`.
  kernel = {"unit": {"conv": {"kernel": jnp.ones((3, 3, 3, 6))}}}
  optimizer = caught["optimizer"]
  zeros = jax.tree.map(jnp.zeros_like, kernel)
  update, _ = optimizer.update(zeros, optimizer.init(kernel), kernel)
  expected = -0.1 * config.schedule.one_cycle.initial * 0.5
  np.testing.assert_allclose(update["unit"]["conv"]["kernel"], expected, rtol=1e-5)
  assert float(setup.schedule(15)) == pytest.approx(config.schedule.one_cycle.final, abs=1e-6)
  assert float(setup.schedule(10)) > config.schedule.one_cycle.final + 0.01
