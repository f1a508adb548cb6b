"""Data sets by name: unknown names, image sizes, and the real CIFAR-10."""

import os
import time
from pathlib import Path

import numpy as np
import pytest

from flax_cifar import errors
from flax_cifar.data import load as load_lib
from flax_cifar.data import splits as splits_lib
from flax_cifar.data.sources import cifar10, shapes


def load(name, image_size=8):
  return load_lib.load_dataset(name=name, dir="", image_size=image_size)


@pytest.mark.parametrize("name", ["cifar100", "npz", "npz:", "cifar10:x", "zip:a"])
def test_unknown_name_lists_the_forms(name):
  with pytest.raises(errors.UserError, match="cifar10, shapes, tfds:NAME, npz:PATH, folder:PATH"):
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


PREPARED = Path(os.environ.get("TFDS_DATA_DIR", "")) / "cifar10"


@pytest.mark.skipif(
  "TFDS_DATA_DIR" not in os.environ or not PREPARED.is_dir(),
  reason="TFDS_DATA_DIR is not set or has no cifar10 directory",
)
def test_real_cifar10():
  start = time.monotonic()
  data = load_lib.load_dataset(name="cifar10", dir="", image_size=32)
  assert time.monotonic() - start < 30  # 5 s on two idle cores
  assert (len(data.train), len(data.test)) == (50_000, 10_000)
  np.testing.assert_array_equal(np.bincount(data.train.labels), [5_000] * 10)
  np.testing.assert_array_equal(np.bincount(data.test.labels), [1_000] * 10)
  mean, std = splits_lib.channel_stats(data.train.images)
  np.testing.assert_allclose(mean, (0.49139968, 0.48215841, 0.44653091), atol=1e-7)
  np.testing.assert_allclose(std, (0.24703223, 0.24348513, 0.26158784), atol=1e-7)
  # The labels fit the images: ships and planes are blue, frogs are not.
  blue = [data.train.images[data.train.labels == c][..., 2].mean() for c in (0, 6, 8)]
  assert blue[1] < min(blue[0], blue[2])
