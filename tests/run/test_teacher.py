"""Distillation: the teacher sees what its student sees, and a run keeps to its teacher."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flax_cifar import errors
from flax_cifar.data import dataset, splits
from flax_cifar.data.augment import normalize
from flax_cifar.run import classifier, teacher
from flax_cifar.run import weights as weights_lib
from tests import runs, tiny

QUICK = {"total_epochs": 1, "schedule.name": "constant"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A folder with `data` and a trained network, `weights`."""
  folder = tmp_path_factory.mktemp("teacher")
  with tiny.registered():
    runs.run(folder / "run", tiny.write_data(folder / "tiny.npz"), **QUICK)
  shutil.copy(folder / "run" / "weights.safetensors", folder / "weights")
  return folder


TRAIN = dataset.Split(
  np.zeros((4, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE, 3), np.uint8), np.zeros(4, np.int32)
)
STUDENT = {"class_names": ("0", "1", "2"), "mean": (0,) * 3, "std": (1,) * 3}


def get_config(folder, **changes):
  keys = {"loss.distillation.teacher": str(folder / "weights"), **QUICK, **changes}
  return tiny.get_config(f"npz:{folder / 'tiny.npz'}", **keys)


def test_the_teacher_gets_the_images_in_its_own_normalization(tiny_model, folder):
  weights = weights_lib.load_weights(folder / "weights")
  images = np.load(folder / "tiny.npz")["test_images"]
  trained = classifier.create_classifier(weights, dtype="float32").predict(images)
  mean, std = (0.1, 0.2, 0.3), (0.5, 0.4, 0.3)
  predict = teacher._create_predict(weights, mean=mean, std=std, dtype="float32")
  logits = predict(normalize.create_normalize(mean, std, dtype="float32")(images))
  np.testing.assert_allclose(jax.nn.softmax(logits), trained, atol=1e-5)


def test_without_a_teacher_there_is_none(folder):
  config = get_config(folder, **{"loss.distillation.teacher": ""})
  assert teacher.get_fingerprint(config) == {}
  assert teacher.create_distillation(config, TRAIN, **STUDENT) is None


def test_a_run_follows_its_teacher_and_stays_with_it(tiny_model, folder, tmp_path):
  """With the teacher's part alone, labels that are all wrong do no harm."""
  with np.load(folder / "tiny.npz") as arrays:
    wrong = {**arrays, "train_labels": (arrays["train_labels"] + 1) % tiny.CLASSES}
  np.savez(tmp_path / "wrong.npz", **wrong)
  changes = {"loss.distillation.weight": 1.0, "loss.distillation.temperature": 2.0}
  path = tmp_path / "teacher"
  shutil.copy(folder / "weights", path)
  changes |= {"loss.distillation.teacher": str(path), "total_epochs": 12, "model.dropout_rate": 0.0}
  result = runs.run(tmp_path / "run", f"npz:{tmp_path / 'wrong.npz'}", **QUICK | changes)
  weights = weights_lib.load_weights(folder / "weights")
  images = np.load(folder / "tiny.npz")["test_images"]
  taught = classifier.create_classifier(weights, dtype="float32").predict(images).argmax(1)
  student = weights_lib.load_weights(tmp_path / "run" / "weights.safetensors")
  learned = classifier.create_classifier(student, dtype="float32").predict(images).argmax(1)
  assert (taught == learned).mean() > 0.8
  assert result["config"]["loss"]["distillation"]["teacher"] == str(path)
  path.write_bytes(b"another")
  with pytest.raises(errors.UserError, match="teacher_sha256"):
    runs.run(tmp_path / "run", f"npz:{tmp_path / 'wrong.npz'}", **QUICK | changes)


def test_a_teacher_is_no_array_that_a_device_would_send_back(tiny_model, folder):
  config = get_config(folder)
  distill = teacher.create_distillation(config, TRAIN, **STUDENT)
  images = jnp.zeros((4, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE, 3))
  jaxpr = jax.make_jaxpr(distill)(jnp.zeros(4), jnp.zeros((4, 3)), images)
  assert not [value for value in jaxpr.consts if isinstance(value, jax.Array)]


@pytest.mark.parametrize(
  ("size", "protocol", "warns"),
  [
    (16, "honest", False),
    (20, "honest", True),
    (0, "honest", False),
    (20, "published", False),  # it validates on the test split
  ],
)
def test_a_teacher_that_knows_the_validation_images_is_a_warning(
  tiny_model, folder, capsys, size, protocol, warns
):
  """The teacher held 16 images out."""
  config = get_config(folder, **{"data.validation_size": size, "protocol": protocol})
  teacher.create_distillation(config, TRAIN, **STUDENT)
  assert ("was trained on images of this run's validation" in capsys.readouterr().err) is warns


def test_a_teacher_of_the_same_training_images_is_none_that_knows_others(
  tiny_model, folder, capsys
):
  """As where the data set has validation images of its own, whatever the protocol."""
  config = get_config(folder, **{"data.validation_size": 20})
  held_out = {**config.data.to_dict(), "validation_size": 16}
  train = splits.load_splits(protocol="honest", **held_out).train
  teacher.create_distillation(config, train, **STUDENT)
  assert "was trained on images" not in capsys.readouterr().err


def test_a_teacher_whose_classes_have_other_names_is_a_warning(tiny_model, folder, capsys):
  names = weights_lib.load_weights(folder / "weights").class_names
  config = get_config(folder)
  teacher.create_distillation(config, TRAIN, **STUDENT | {"class_names": names})
  assert "its classes are called" not in capsys.readouterr().err
  teacher.create_distillation(config, TRAIN, **STUDENT | {"class_names": ("x", "y", "z")})
  assert "those of this run x, y, z; both must have the same order" in capsys.readouterr().err


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"teacher": "tiny50"}, r"teacher='tiny50' is unknown.*tiny50k"),
    ({"teacher": "tiny50k"}, r"a network of 10 classes and 32x32 pixels"),
    ({"weight": 0.0}, r"loss\.distillation\.weight=0\.0"),
    ({"temperature": 0.0}, r"loss\.distillation\.temperature=0\.0"),
  ],
)
def test_what_does_not_fit_is_named(tiny_model, folder, tmp_path, changes, message):
  changes = {"teacher": str(folder / "weights")} | changes
  keys = {f"loss.distillation.{key}": value for key, value in changes.items()}
  with pytest.raises(errors.UserError, match=message):
    runs.run(tmp_path / "run", f"npz:{folder / 'tiny.npz'}", **keys)
  assert not (tmp_path / "run").exists()


def test_the_folder_of_a_run_is_a_teacher(folder):
  assert teacher.find_teacher(str(folder / "run")) == folder / "run" / "weights.safetensors"
