"""The files of SVHN: arrays that come back, 10 for 0, and files that are refused."""

import numpy as np
import pytest
import scipy.io

from flax_cifar.data.sources import svhn


def write(path, *, images, labels):
  scipy.io.savemat(path, {"X": images, "y": np.asarray(labels, np.uint8)[:, None]})
  return path


def test_arrays_come_back_in_order_and_ten_is_zero(tmp_path):
  images = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 3), np.uint8)
  path = write(tmp_path / "a.mat", images=images, labels=[10, 1, 9])
  for split in svhn.read_splits(path, path):
    assert split.labels.tolist() == [0, 1, 9]
    assert (split.images.dtype, split.labels.dtype) == (np.uint8, np.int32)
    for i, image in enumerate(split.images):
      np.testing.assert_array_equal(image, images[:, :, :, i])


@pytest.mark.parametrize(
  ("shape", "labels", "message"),
  [
    ((32, 32, 3, 2), [1, 2, 3], r"holds arrays \(32, 32, 3, 2\) and \(3, 1\)"),
    ((32, 31, 3, 2), [1, 2], r"holds arrays \(32, 31, 3, 2\)"),
    ((32, 32, 3, 2), [0, 2], r"labels 0\.\.2, not 1\.\.10"),
    ((32, 32, 3, 2), [1, 11], r"labels 1\.\.11, not 1\.\.10"),
  ],
)
def test_other_arrays_are_refused(tmp_path, shape, labels, message):
  path = write(tmp_path / "a.mat", images=np.zeros(shape, np.uint8), labels=labels)
  with pytest.raises(ValueError, match=message):
    svhn.read_splits(path, path)
