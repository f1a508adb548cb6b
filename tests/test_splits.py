"""The protocols: what trains, what chooses, what tests."""

import numpy as np
import pytest

from flax_cifar.data.splits import load_splits
from flax_cifar.errors import UserError


@pytest.fixture
def archive(tmp_path):
  """100 train and 30 test images; pixel value = index, test starting at 128."""
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
  return load_splits(**(defaults | {"name": archive} | changes))


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


def test_a_trial_is_split_as_honest_and_judged_by_validation(archive):
  trial, honest = load(archive, protocol="trial"), load(archive)
  assert indices(trial.train) == indices(honest.train)
  assert indices(trial.get_judge()) == indices(trial.validation) == indices(honest.validation)
  assert indices(honest.get_judge()) == indices(honest.test)


def test_a_trial_needs_validation_images(archive):
  with pytest.raises(UserError, match=r"data\.validation_size=0 .*positive where protocol='trial'"):
    load(archive, protocol="trial", validation_size=0)


def test_normalisation_is_of_the_whole_train_split(archive):
  expected = np.arange(100).mean() / 255, np.arange(100).std() / 255
  for splits in (load(archive), load(archive, limit=10)):
    np.testing.assert_allclose(splits.mean, [expected[0]] * 3, rtol=1e-12)
    np.testing.assert_allclose(splits.std, [expected[1]] * 3, rtol=1e-12)


def test_limit_shortens_every_split(archive):
  splits = load(archive, limit=7)
  assert [len(s) for s in (splits.train, splits.validation, splits.test)] == [7, 7, 7]
  assert splits.image_shape == (8, 8, 3)


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
  with pytest.raises(UserError, match=message):
    load(archive, **changes)
