"""The files of SVHN, cropped: MATLAB's, version 5."""

from pathlib import Path

import numpy as np

from flax_cifar.data import dataset
from flax_cifar.data.sources import published


def read_splits(train: Path, test: Path) -> published.Splits:
  """Reads the training and test split from train_32x32.mat and test_32x32.mat.

  Returns:
    Images uint8 (N, 32, 32, 3) and labels int32 (N,), in the order of the files.

  Raises:
    ValueError, KeyError: a file is damaged; SciPy raises other errors, too.
  """
  return _read_split(train), _read_split(test)


def _read_split(path: Path) -> dataset.Split:
  import scipy.io  # imported here, because it takes a fraction of a second

  arrays = scipy.io.loadmat(path, variable_names=("X", "y"))
  images, labels = np.moveaxis(arrays["X"], -1, 0), arrays["y"].reshape(-1)
  if images.dtype != np.uint8 or images.shape != (len(labels), 32, 32, 3):
    raise ValueError(f"{path.name} holds arrays {arrays['X'].shape} and {arrays['y'].shape}")
  if len(labels) and not 1 <= labels.min() <= labels.max() <= 10:
    raise ValueError(f"{path.name} holds labels {labels.min()}..{labels.max()}, not 1..10")
  return dataset.Split(np.ascontiguousarray(images), labels.astype(np.int32) % 10)  # 10 means 0
