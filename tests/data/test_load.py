"""Names to arrays: npz, folder, shapes, the validation split and the channel statistics."""

import numpy as np
import pytest

from flax_cifar import errors
from flax_cifar.data import load as load_lib
from flax_cifar.data.sources import cifar10, shapes


def load(name, image_size=8):
  return load_lib.load_dataset(name=name, dir="", image_size=image_size)


@pytest.mark.parametrize("name", ["cifar100", "npz", "npz:", "cifar10:x", "zip:a"])
def test_unknown_name_lists_the_four_forms(name):
  with pytest.raises(errors.UserError, match="cifar10, shapes, npz:PATH, folder:PATH"):
    load(name)


@pytest.mark.parametrize("size", [1, 31, 64])
def test_cifar10_of_another_size_is_refused_unread(monkeypatch, size):
  monkeypatch.setattr(cifar10, "load_cifar10", lambda **arguments: pytest.fail("it was loaded"))
  with pytest.raises(errors.UserError, match=f"image_size={size} .*must be 32 for cifar10"):
    load("cifar10", image_size=size)


def test_shapes_passes_the_image_size(monkeypatch):
  monkeypatch.setattr(shapes, "NUM_TRAIN", 20)
  monkeypatch.setattr(shapes, "NUM_TEST", 10)
  data = load("shapes", image_size=24)
  assert data.train.images.shape == (20, 24, 24, 3)
  assert data.test.images.shape == (10, 24, 24, 3)
  assert data.train.images.dtype == np.uint8
  assert data.train.labels.dtype == np.int32
