"""Data sets in a NumPy .npz archive."""

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flax_cifar import errors
from flax_cifar.data import dataset

# The keys that npz archives use: ours, those of Keras, and those with the words swapped.
KEYS = (("{}_images", "{}_labels"), ("x_{}", "y_{}"), ("{}_x", "{}_y"))

Splits = dict[str, dataset.Split]  # "train", "test" and perhaps "validation"


def load_npz(path: Path) -> dataset.Dataset:
  """Loads the splits in the arrays that KEYS names.

  The classes are called by the array `class_names`, or "0", "1", ... up to the highest label.

  Raises:
    UserError: the file is missing, damaged, larger than the memory, lacks the keys, or holds
      anything but plain arrays; or the classes have no names, and no training image has one of the
      labels.
  """
  if not path.is_file():
    raise errors.UserError(f"npz:{path} does not exist; give the path of a numpy .npz archive.")
  try:
    _check_declared_size(path)
    # Pickled objects could run code, so they are refused.
    with np.load(path, allow_pickle=False) as archive:
      splits, names = _read_splits(path, archive), _read_class_names(archive)
  except errors.UserError:
    raise
  except Exception as error:  # zipfile, zlib and numpy raise a dozen types for damaged bytes
    raise errors.UserError(
      f"npz:{path} cannot be read ({errors.shorten(error)}); write it again with numpy.savez, "
      "plain number arrays only."
    ) from error
  return dataset.Dataset(
    splits["train"],
    splits["test"],
    names or number_classes(path, splits),
    validation=splits.get("validation"),
  )


def number_classes(path: Path, splits: Mapping[str, dataset.Split]) -> tuple[str, ...]:
  """Names the classes "0", "1", ... up to the highest label.

  Raises:
    UserError: the highest label is negative or MAX_CLASSES or more, or the training split lacks a
      label.
  """
  # The checks of a split come later, with messages for what is passed over here.
  labels = [split.labels for split in splits.values() if split.labels.dtype.kind in "iu"]
  highest = max((int(values.max()) for values in labels if values.size), default=0)
  names = dataset.number_classes(f"npz:{path}", highest)
  if unseen := _find_unseen(splits["train"], highest):
    raise errors.UserError(
      f"npz:{path}: the labels go up to {highest}, but no training image has the label "
      f"{errors.list_some(unseen)}; number the classes from 0 without gaps, or name all of them in "
      "an array class_names."
    )
  return names


def _find_unseen(split: dataset.Split, highest: int) -> list[int]:
  """The labels up to `highest` that no image has; none where check_split will refuse the labels."""
  labels = split.labels
  is_valid = labels.dtype.kind in "iu" and labels.shape == split.images.shape[:1]
  if not is_valid or not labels.shape or not labels.size or labels.min() < 0:
    return []
  return sorted({*range(highest + 1)} - {*labels.tolist()})


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


def _read_splits(path: Path, archive: Any) -> Splits:
  """Reads the splits of the first of KEYS that has both; warns of arrays that are left out."""
  names = archive.files
  form = next(
    (form for form in KEYS if _has(names, form, "train") and _has(names, form, "test")), None
  )
  if form is None:
    needed = [
      " ".join(key.format(part) for part in ("train", "test") for key in form) for form in KEYS
    ]
    raise errors.UserError(
      f"npz:{path} holds {sorted(names)}; it must hold {', or '.join(needed)}, and may hold the "
      "same keys for validation, and class_names."
    )
  parts = {"train": "train", "test": "test"}
  own_name = next((name for name in dataset.VALIDATION_NAMES if _has(names, form, name)), None)
  if own_name:
    parts["validation"] = own_name
  used = {key.format(part) for part in parts.values() for key in form} | {"class_names"}
  if unused := sorted(set(names) - used):
    errors.warn(f"npz:{path}: left out the arrays {errors.list_some(unused)}")
  return {name: _read_split(archive, form, part) for name, part in parts.items()}


def _has(names: list[str], form: tuple[str, str], part: str) -> bool:
  return all(key.format(part) in names for key in form)


def _read_split(archive: Any, form: tuple[str, str], part: str) -> dataset.Split:
  images, labels = (_read_array(archive, key.format(part)) for key in form)
  return dataset.Split(images, _flatten_labels(labels))


def _flatten_labels(labels: np.ndarray) -> np.ndarray:
  """Turns labels (N, 1), the form of Keras, into (N,)."""
  return labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels


def _read_class_names(archive: Any) -> tuple[str, ...]:
  """Returns the class names; () where the archive has none."""
  if "class_names" not in archive.files:
    return ()
  return tuple(_read_array(archive, "class_names").astype(str).ravel().tolist())


def _read_array(archive: Mapping[str, Any], key: str) -> np.ndarray:
  array = archive[key]
  if not isinstance(array, np.ndarray):  # NumPy returns the bytes of a member that is no array
    raise ValueError(f"{key} is not an array")
  return array
