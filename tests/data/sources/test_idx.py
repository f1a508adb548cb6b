"""The files of MNIST: arrays that come back, and files that are refused."""

import gzip

import numpy as np
import pytest

from flax_cifar.data.sources import idx
from tests import published_files


def write(folder, *arrays):
  paths = [folder / str(number) for number in range(len(arrays))]
  for path, array in zip(paths, arrays, strict=True):
    path.write_bytes(published_files.encode_idx(array))
  return paths


def test_arrays_come_back_in_order(tmp_path):
  rng = np.random.default_rng(0)
  images = [rng.integers(0, 256, (count, 5, 3), np.uint8) for count in (7, 4)]
  labels = [rng.integers(0, 256, count) for count in (7, 4)]
  splits = idx.read_splits(*write(tmp_path, images[0], labels[0], images[1], labels[1]))
  for split, pixels, classes in zip(splits, images, labels, strict=True):
    np.testing.assert_array_equal(split.images[..., 0], pixels)
    np.testing.assert_array_equal(split.labels, classes)
    assert (split.images.dtype, split.labels.dtype) == (np.uint8, np.int32)


IMAGE = np.zeros((1, 2, 2), np.uint8)
GOOD = gzip.decompress(published_files.encode_idx(IMAGE))


@pytest.mark.parametrize(
  ("blob", "message"),
  [
    (b"", "no array of bytes with 3 axes"),
    (GOOD[:10], "no array of bytes"),
    (b"\0\0\x0d" + GOOD[3:], "no array of bytes"),
    (GOOD[:-1], r"holds 3 numbers for an array \[1, 2, 2\]"),
    (GOOD + b"x", "holds 5 numbers"),
    (GOOD[:4] + b"\xff" * 12 + GOOD[16:], "holds 4 numbers"),
  ],
)
def test_a_damaged_file_is_refused(tmp_path, blob, message):
  paths = write(tmp_path, IMAGE, np.zeros(1), IMAGE, np.zeros(1))
  paths[2].write_bytes(gzip.compress(blob))
  with pytest.raises(ValueError, match=message):
    idx.read_splits(*paths)


def test_labels_of_other_images_are_refused(tmp_path):
  paths = write(tmp_path, IMAGE, np.zeros(2), IMAGE, np.zeros(1))
  with pytest.raises(ValueError, match="1 images and 2 labels"):
    idx.read_splits(*paths)


def test_a_file_that_unpacks_to_too_much_is_not_read_whole(tmp_path, monkeypatch):
  paths = write(tmp_path, IMAGE, np.zeros(1), IMAGE, np.zeros(1))
  monkeypatch.setattr(idx, "MAX_UNPACKED_BYTES", len(GOOD) - 1)
  with pytest.raises(ValueError, match="holds 3 numbers"):
    idx.read_splits(*paths)
