"""Data sets in a NumPy .npz archive."""

import os
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flax_cifar import errors
from flax_cifar.data import dataset

# The keys that npz archives use: ours, those of Keras, and those with the words swapped.
NPZ_KEYS = (
  ("train_images", "train_labels", "test_images", "test_labels"),
  ("x_train", "y_train", "x_test", "y_test"),
  ("train_x", "train_y", "test_x", "test_y"),
)


def read_npz(path: Path) -> tuple[list[np.ndarray], tuple[str, ...]]:
  """Returns the four arrays of one of NPZ_KEYS, and the class names, if any.

  Raises:
    UserError: the file is missing, damaged, larger than the memory, lacks the keys, or holds
      anything but plain arrays.
  """
  if not path.is_file():
    raise errors.UserError(f"npz:{path} does not exist; give the path of a numpy .npz archive.")
  try:
    _check_declared_size(path)
    # Pickled objects could run code, so they are refused.
    with np.load(path, allow_pickle=False) as archive:
      arrays = [_read_array(archive, key) for key in _choose_keys(path, archive.files)]
      if "class_names" not in archive.files:
        return arrays, ()
      return arrays, tuple(_read_array(archive, "class_names").astype(str).ravel().tolist())
  except errors.UserError:
    raise
  except Exception as error:  # zipfile, zlib and numpy raise a dozen types for damaged bytes
    raise errors.UserError(
      f"npz:{path} cannot be read ({errors.shorten(error)}); write it again with numpy.savez, "
      "plain number arrays only."
    ) from error


def flatten_labels(labels: np.ndarray) -> np.ndarray:
  """Turns labels (N, 1), the form of Keras, into (N,)."""
  return labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels


def number_classes(path: Path, labels: Iterable[np.ndarray]) -> tuple[str, ...]:
  """Names the classes "0", "1", ... up to the highest label.

  Raises:
    UserError: the highest label is negative or MAX_CLASSES or more.
  """
  # check_split refuses other dtypes later, with a message.
  highest = max((int(y.max()) for y in labels if y.size and y.dtype.kind in "iu"), default=0)
  if not 0 <= highest < dataset.MAX_CLASSES:
    raise errors.UserError(
      f"npz:{path}: the labels go up to {highest}; number the classes from 0. There may be at most "
      f"{dataset.MAX_CLASSES:,}."
    )
  return tuple(str(index) for index in range(highest + 1))


def _check_declared_size(path: Path) -> None:
  """Refuses a file that would fill the memory; zeros unpack to a thousand times their size."""
  with zipfile.ZipFile(path) as archive:
    size = sum(member.file_size for member in archive.infolist())
  memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  if size > memory:
    raise errors.UserError(
      f"npz:{path} unpacks to {size / 1e9:,.0f} GB, more than the {memory / 1e9:,.0f} GB of "
      "memory here; give fewer or smaller images."
    )


def _choose_keys(path: Path, names: Sequence[str]) -> tuple[str, ...]:
  keys = next((keys for keys in NPZ_KEYS if all(key in names for key in keys)), None)
  if keys is None:
    raise errors.UserError(
      f"npz:{path} holds {sorted(names)}; it must hold "
      + ", or ".join(" ".join(keys) for keys in NPZ_KEYS)
      + ", and may hold class_names."
    )
  return keys


def _read_array(archive: Mapping[str, Any], key: str) -> np.ndarray:
  array = archive[key]
  if not isinstance(array, np.ndarray):  # NumPy returns the bytes of a member that is no array
    raise ValueError(f"{key} is not an array")
  return array
