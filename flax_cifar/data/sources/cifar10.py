"""CIFAR-10, found on disk in any of its usual forms, or downloaded.

The modules that prepare, read and download it are imported only where they are needed, because few
runs need them, and tensorflow_datasets takes most of a second to import.
"""

import hashlib
import re
from pathlib import Path

import numpy as np

from flax_cifar import errors
from flax_cifar.data import dataset
from flax_cifar.data.sources import catalog, cifar_archive, decoded, preparation, prepared

VERSION = re.compile(r"3\.\d+\.\d+")


def load_cifar10(*, dir: str) -> tuple[dataset.Split, dataset.Split, tuple[str, ...]]:
  """Loads CIFAR-10 from a prepared TFDS directory, else from an archive, else from a download.

  The data of an archive or a download are written once to `<dir>/cifar10/3.0.2`, which later runs
  read. The examples are sorted by a hash of their pixels, because TFDS and the archives order them
  differently; so a seed gives the same run wherever the data came from.

  Args:
    dir: root of TFDS data sets; "" means TFDS_DATA_DIR, else ~/tensorflow_datasets.

  Returns:
    Training split (50,000), test split (10,000) and class names; images uint8 (N, 32, 32, 3).

  Raises:
    UserError: damaged files, a wrong number of examples, or no data and no working mirror.
  """
  root = prepared.find_root(dir)
  if folder := find_prepared(root):
    train, test = decoded.load_or_decode(folder, lambda: _sort(read_prepared(folder)), form="")
  else:
    train, test = _sort(_read_and_prepare(root))
  return train, test, cifar_archive.CLASS_NAMES


def find_prepared(root: Path) -> Path | None:
  """Returns the newest complete `<root>/cifar10/3.x.y`, or None."""
  return prepared.find_newest(root / "cifar10", VERSION)


def read_prepared(folder: Path) -> decoded.Splits:
  """Reads the training and test split that TFDS has prepared in `folder`, in its order.

  Raises:
    UserError: a file is damaged, the format is another one, or the classes, the images or their
      number are not those of CIFAR-10.
  """
  found = prepared.read_folder("cifar10", folder)
  test = cifar_archive.BATCH_SIZE
  counts = (cifar_archive.TRAIN_BATCHES * test, test)
  expected = _describe(counts, cifar_archive.IMAGE_SHAPE, cifar_archive.CLASS_NAMES)
  counts = (len(found.train), len(found.test))
  given = _describe(counts, found.train.images.shape[1:], found.class_names)
  if given != expected:
    raise errors.UserError(
      f"{folder} holds {given}, and CIFAR-10 has {expected}; delete it and run again."
    )
  return found.train, found.test


def _describe(counts: tuple[int, int], shape: tuple[int, ...], names: tuple[str, ...]) -> str:
  return f"{counts[0]} training and {counts[1]} test images {shape} of {', '.join(names)}"


def _sort(splits: decoded.Splits) -> decoded.Splits:
  train, test = splits
  return _sort_by_pixels(train), _sort_by_pixels(test)


def _read_and_prepare(root: Path) -> decoded.Splits:
  source = catalog.CATALOG["cifar10"]
  with preparation.lock(source, root):
    if folder := find_prepared(root):  # by the process that held the lock before
      return read_prepared(folder)
    splits = preparation.read_published(source, root)
    try:
      preparation.prepare(source, splits, root)
    except OSError as error:
      preparation.report(
        f"Not prepared ({error}); the run continues, and the next one reads the archive again."
      )
  return splits


def _sort_by_pixels(split: dataset.Split) -> dataset.Split:
  """Sorts by a hash of the pixels, and by label where images are equal."""
  digests = [hashlib.blake2b(image, digest_size=8).digest() for image in split.images]
  keys = np.frombuffer(b"".join(digests), "<u8")
  order = np.lexsort((split.labels, keys))
  return dataset.Split(split.images[order], split.labels[order].astype(np.int32))
