"""The training, validation and test splits of each protocol."""

import numpy as np
import pytest

from flax_cifar import errors
from flax_cifar.data import dataset
from flax_cifar.data import load as load_lib
from flax_cifar.data import splits as splits_lib
from tests.data.sources import test_npz


def test_split_validation_is_fixed_and_loses_nothing():
  images = np.arange(50, dtype=np.uint8).repeat(3).reshape(50, 1, 1, 3)
  split = dataset.Split(images, np.arange(50, dtype=np.int32))
  train, held_out = splits_lib.split_validation(split, validation_size=10)
  assert (len(train), len(held_out)) == (40, 10)
  assert sorted([*train.labels, *held_out.labels]) == list(range(50))
  np.testing.assert_array_equal(held_out.images[:, 0, 0, 0], held_out.labels)
  assert list(held_out.labels) == list(np.random.default_rng(0).permutation(50)[-10:])
  _, smaller = splits_lib.split_validation(split, validation_size=4)
  np.testing.assert_array_equal(smaller.labels, held_out.labels[-4:])
  everything, none = splits_lib.split_validation(split, validation_size=0)
  assert (len(everything), len(none)) == (50, 0)
  assert none.images.shape == (0, 1, 1, 3)


@pytest.mark.parametrize("size", [-1, 6, 7])
def test_split_validation_refuses(size):
  with pytest.raises(errors.UserError, match=f"validation_size={size} .*from 0 to 5"):
    splits_lib.split_validation(dataset.Split(*test_npz.arrays(6)), validation_size=size)


def test_channel_stats_match_floats_and_are_exact():
  images, _ = test_npz.arrays(230, size=5)
  mean, std = splits_lib.channel_stats(images)
  np.testing.assert_allclose(mean, (images / 255.0).mean((0, 1, 2)), rtol=1e-12)
  np.testing.assert_allclose(std, (images / 255.0).std((0, 1, 2)), rtol=1e-12)
  assert splits_lib.channel_stats(np.full((3, 7, 7, 3), 85, np.uint8)) == ((1 / 3,) * 3, (0.0,) * 3)


@pytest.fixture
def archive(tmp_path):
  """100 training and 30 test images; pixel value = index, test starting at 128."""
  path = tmp_path / "tiny.npz"
  train, test = np.arange(100, dtype=np.uint8), np.arange(128, 158, dtype=np.uint8)
  np.savez(
    path,
    train_images=np.tile(train[:, None, None, None], (1, 8, 8, 3)),
    train_labels=train % 4,
    test_images=np.tile(test[:, None, None, None], (1, 8, 8, 3)),
    test_labels=test % 4,
  )
  return f"npz:{path}"


def load(archive, **changes):
  defaults = {"protocol": "honest", "dir": "", "image_size": 8, "validation_size": 20, "limit": 0}
  return splits_lib.load_splits(**(defaults | {"name": archive} | changes))


def indices(split):
  return split.images[:, 0, 0, 0].tolist()


def test_honest_validation_comes_from_train(archive):
  splits = load(archive)
  assert len(splits.train) == 80
  assert sorted(indices(splits.train) + indices(splits.validation)) == list(range(100))
  assert indices(splits.test) == list(range(128, 158))


def test_published_trains_on_all_and_validates_on_test(archive):
  splits = load(archive, protocol="published")
  assert sorted(indices(splits.train)) == list(range(100))
  assert indices(splits.validation) == indices(splits.test)


def test_a_trial_has_the_honest_splits_but_its_final_split_is_validation(archive):
  trial, honest = load(archive, protocol="trial"), load(archive)
  assert indices(trial.train) == indices(honest.train)
  assert indices(trial.final_split) == indices(trial.validation) == indices(honest.validation)
  assert indices(honest.final_split) == indices(honest.test)


def test_normalization_uses_the_whole_training_split(archive):
  expected = np.arange(100).mean() / 255, np.arange(100).std() / 255
  for splits in (load(archive), load(archive, limit=10)):
    np.testing.assert_allclose(splits.mean, [expected[0]] * 3, rtol=1e-12)
    np.testing.assert_allclose(splits.std, [expected[1]] * 3, rtol=1e-12)


def test_limit_shortens_every_split(archive):
  splits = load(archive, limit=7)
  assert [len(s) for s in (splits.train, splits.validation, splits.test)] == [7, 7, 7]
  assert splits.image_shape == (8, 8, 3)


@pytest.mark.parametrize("protocol", ["honest", "published"])
def test_limit_keeps_all_classes(tmp_path, protocol):
  """The images are sorted by class, as those of a folder are."""
  images = np.tile(np.arange(200, dtype=np.uint8)[:, None, None, None], (1, 8, 8, 3))
  arrays = {"images": images, "labels": np.arange(200) // 50}
  parts = {f"{part}_{key}": value for part in ("train", "test") for key, value in arrays.items()}
  np.savez(tmp_path / "ordered.npz", **parts)
  name = f"npz:{tmp_path / 'ordered.npz'}"
  first, second = (load(name, protocol=protocol, limit=20) for _ in range(2))
  for part in ("train", "validation", "test"):
    split = getattr(first, part)
    assert len(set(indices(split))) == 20
    assert set(split.labels.tolist()) == {0, 1, 2, 3}
    assert split.labels.tolist() == [index // 50 for index in indices(split)]
    assert indices(split) == indices(getattr(second, part))
  assert indices(first.test) == sorted(indices(first.test))


def write_archive(path, train_labels, **extra):
  """One pixel per image, of the value of its index."""

  def draw(count):
    return np.tile(np.arange(count, dtype=np.uint8)[:, None, None, None], (1, 8, 8, 3))

  labels = np.asarray(train_labels)
  parts = {"train_images": draw(len(labels)), "train_labels": labels}
  np.savez(path, **parts, test_images=draw(4), test_labels=np.arange(4) % 2, **extra)
  return f"npz:{path}"


def test_the_validation_split_of_a_data_set_is_used_whatever_the_size_asked_for(tmp_path):
  own = {"val_images": np.full((5, 8, 8, 3), 99, np.uint8), "val_labels": np.arange(5) % 2}
  archive = write_archive(tmp_path / "a.npz", np.arange(30) % 2, **own)
  for protocol in ("honest", "trial"):
    splits = load(archive, protocol=protocol, validation_size=20)
    assert [len(s) for s in (splits.train, splits.validation, splits.test)] == [30, 5, 4]
    assert indices(splits.validation) == [99] * 5
  assert indices(load(archive, protocol="published").validation) == [0, 1, 2, 3]


def test_a_trial_needs_validation_images_of_the_data_set_or_held_out(tmp_path):
  own = {"val_images": np.zeros((5, 8, 8, 3), np.uint8), "val_labels": np.arange(5) % 2}
  archive = write_archive(tmp_path / "a.npz", np.arange(30) % 2, **own)
  assert len(load(archive, protocol="trial", validation_size=0).validation) == 5
  archive = write_archive(tmp_path / "b.npz", np.arange(30) % 2)
  with pytest.raises(errors.UserError, match=r"size=0 .*positive where protocol='trial'"):
    load(archive, protocol="trial", validation_size=0)


def test_classes_that_training_never_sees_are_named(tmp_path, capsys):
  names = {"class_names": ["cat", "dog", "emu"]}
  archive = write_archive(tmp_path / "a.npz", np.arange(30) % 2, **names)
  load(archive, validation_size=5)
  warning = "1 of 3 classes have no training image, with validation_size=5 and limit=0: emu"
  assert warning in capsys.readouterr().err
  load(archive, validation_size=5, limit=1)
  assert "2 of 3 classes" in capsys.readouterr().err
  rare = write_archive(tmp_path / "b.npz", [0] * 29 + [1])
  held = np.random.default_rng(0).permutation(30)[-20:]
  assert 29 in held  # so that validation has the only image of class 1
  load(rare, validation_size=20)
  assert "1 of 2 classes have no training image" in capsys.readouterr().err
  load(rare, validation_size=0)
  assert capsys.readouterr().err == ""


def test_the_fingerprint_changes_with_every_change_of_the_data(tmp_path):
  labels = np.arange(30) % 2
  same = [
    load(write_archive(tmp_path / "a.npz", labels), validation_size=5).fingerprint for _ in range(2)
  ]
  assert same[0] == same[1]
  assert same[0]["class_names"] == ["0", "1"]
  sizes = [same[0][f"{part}_images"] for part in ("train", "validation", "test")]
  assert sizes == [25, 5, 4]
  others = [
    load(write_archive(tmp_path / "b.npz", labels[::-1]), validation_size=5).fingerprint,
    load(write_archive(tmp_path / "c.npz", labels[1:]), validation_size=5).fingerprint,
    load(
      write_archive(tmp_path / "d.npz", labels, class_names=["b", "a"]), validation_size=5
    ).fingerprint,
    load(write_archive(tmp_path / "e.npz", labels), validation_size=6).fingerprint,
  ]
  assert all(other != same[0] for other in others)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"protocol": "honest", "validation_size": -7}, r"validation_size=-7 .*must be 0 or more"),
    ({"protocol": "published", "validation_size": -7}, r"validation_size=-7 .*must be 0 or more"),
    ({"protocol": "trial", "validation_size": 0}, r"size=0 .*positive where protocol='trial'"),
    ({"limit": -1}, r"limit=-1"),
  ],
)
def test_ranges_are_checked_before_anything_is_loaded(monkeypatch, changes, message):
  def refuse(**arguments):
    raise AssertionError("something was loaded")

  monkeypatch.setattr(load_lib, "load_dataset", refuse)
  with pytest.raises(errors.UserError, match=message):
    load("cifar10", **changes)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"protocol": "peek"}, "protocol='peek' is unknown; choose one of honest, published, trial"),
    ({"limit": -1}, "data.limit=-1"),
    ({"validation_size": 100}, "validation_size=100"),
    ({"name": "imagenet"}, "'imagenet'"),
  ],
)
def test_bad_choices_are_quoted(archive, changes, message):
  with pytest.raises(errors.UserError, match=message):
    load(archive, **changes)
