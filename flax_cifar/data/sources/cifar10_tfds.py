"""CIFAR-10 as TensorFlow Datasets prepares it, read without TensorFlow and checked."""

from pathlib import Path

import numpy as np

from flax_cifar import errors
from flax_cifar.data import dataset
from flax_cifar.data.sources import cifar_archive, tfds_files


def read_prepared(folder: Path) -> tuple[dataset.Split, dataset.Split]:
  """Reads the training and test split from a TFDS directory, in array_record or tfrecord format.

  Raises:
    UserError: a file is damaged, the format is another one, or the number of examples or the
      classes are not those of CIFAR-10.
  """
  try:
    info = tfds_files.read_info("cifar10", folder)
    shards = [tfds_files.list_shards(folder, info.splits[name]) for name in ("train", "test")]
  except Exception as error:  # TFDS raises many types for damaged JSON
    raise tfds_files.explain_damage(
      "cifar10", folder, folder / "dataset_info.json", error
    ) from error
  read = tfds_files.get_reader(folder, info)
  _check_names(folder)
  train, test = (
    _join(tfds_files.read_shards("cifar10", folder, files, read, _decode_record))
    for files in shards
  )
  _check_counts(folder, train, test)
  return train, test


def _check_names(folder: Path) -> None:
  file = folder / "label.labels.txt"
  try:
    names = tuple(file.read_text(encoding="utf-8").split())
  except (OSError, ValueError) as error:
    raise tfds_files.explain_damage("cifar10", folder, file, error) from error
  if names != cifar_archive.CLASS_NAMES:
    raise tfds_files.explain_damage("cifar10", folder, file, f"it lists {names}")


def _check_counts(source: Path, train: dataset.Split, test: dataset.Split) -> None:
  expected = (
    cifar_archive.TRAIN_BATCHES * cifar_archive.BATCH_SIZE,
    cifar_archive.BATCH_SIZE,
  )
  if (len(train), len(test)) != expected:
    raise errors.UserError(
      f"{source} holds {len(train)} training and {len(test)} test images, CIFAR-10 has "
      f"{expected[0]} and {expected[1]}; delete it and run again."
    )


def _join(examples: list[tfds_files.Example]) -> dataset.Split:
  images, labels = zip(*examples, strict=True)
  return dataset.Split(np.stack(images), np.array(labels, np.int32))


def _decode_record(record: bytes) -> tfds_files.Example:
  image, label = tfds_files.decode_record(record)
  if image.shape != cifar_archive.IMAGE_SHAPE:
    raise ValueError("a record is not an image of 32x32 pixels")
  if label >= len(cifar_archive.CLASS_NAMES):
    raise ValueError(f"a record has the label {label}, not 0..9")
  return image, label
