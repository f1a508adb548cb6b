"""Checks of a config that need no images."""

import pytest

from flax_cifar import errors, train
from flax_cifar.data import splits
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


def test_a_value_of_an_op_is_checked_too(tiny_model, tmp_path, monkeypatch):
  monkeypatch.setattr(splits, "load_splits", lambda **arguments: pytest.fail("data were loaded"))
  changes = {"augment.ops": ("rotate",), "augment.rotate.limit": 200.0}
  with pytest.raises(errors.UserError, match=r"augment\.rotate\.limit=200\.0"):
    train.train_and_evaluate(tiny.get_config("cifar10", **changes), tmp_path / "run")
