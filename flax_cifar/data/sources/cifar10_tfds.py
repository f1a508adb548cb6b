"""CIFAR-10 as TensorFlow Datasets prepares it, read and written without TensorFlow."""

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from tensorflow_datasets.image_classification import cifar

from flax_cifar import errors
from flax_cifar.data import dataset
from flax_cifar.data.sources import cifar10_archive, tfds_files

# ---- Reading a prepared directory


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
    raise tfds_files.explain_damage(folder, folder / "dataset_info.json", error) from error
  read = tfds_files.get_reader(folder, info)
  _check_names(folder)
  train, test = (
    _join(tfds_files.read_shards(folder, files, read, _decode_record)) for files in shards
  )
  _check_counts(folder, train, test)
  return train, test


def _check_names(folder: Path) -> None:
  file = folder / "label.labels.txt"
  try:
    names = tuple(file.read_text(encoding="utf-8").split())
  except (OSError, ValueError) as error:
    raise tfds_files.explain_damage(folder, file, error) from error
  if names != cifar10_archive.CLASS_NAMES:
    raise tfds_files.explain_damage(folder, file, f"it lists {names}")


def _check_counts(source: Path, train: dataset.Split, test: dataset.Split) -> None:
  expected = (
    cifar10_archive.TRAIN_BATCHES * cifar10_archive.BATCH_SIZE,
    cifar10_archive.BATCH_SIZE,
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
  if image.shape != cifar10_archive.IMAGE_SHAPE:
    raise ValueError("a record is not an image of 32x32 pixels")
  if label >= len(cifar10_archive.CLASS_NAMES):
    raise ValueError(f"a record has the label {label}, not 0..9")
  return image, label


# ---- Writing a prepared directory


def prepare_cifar10(
  *, train: dataset.Split, test: dataset.Split, data_dir: str | os.PathLike[str]
) -> Path:
  """Writes `<data_dir>/cifar10/3.0.2` in array_record format, without the network.

  The directory appears under its name only when it is complete. Any TFDS user can read it with
  `tfds.data_source("cifar10", data_dir=data_dir)`.

  Args:
    train: uint8 (N, 32, 32, 3) images and (N,) labels; example i gets the id `train_{i:05d}`.
    test: the same, with ids `test_{i:05d}`.
    data_dir: root of TFDS data sets; created if it is missing.

  Returns:
    The directory that was written.

  Raises:
    FileExistsError: the directory exists already.
    OSError: `data_dir` cannot be written to, or the disk is full.
  """
  builder = Cifar10(data_dir=data_dir, file_format="array_record")
  folder = Path(builder.data_dir)
  if folder.exists():  # TFDS would treat it as prepared, whatever it holds
    raise FileExistsError(f"{folder} exists already; delete it to prepare it again")
  builder.splits = {"train": train, "test": test}
  config = tfds.download.DownloadConfig(try_download_gcs=False, register_checksums=False)
  try:
    with _quiet():
      builder.download_and_prepare(download_config=config)
  except RuntimeError as error:  # raised by array_record if a write fails
    raise OSError(errors.shorten(error)) from error
  return folder


with tfds.core.registered.skip_registration():

  class Cifar10(cifar.Cifar10):
    """The CIFAR-10 of TFDS, whose examples come from arrays instead of a download."""

    splits: dict[str, dataset.Split]

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
      del dl_manager
      self.info.features["label"].names = list(cifar10_archive.CLASS_NAMES)
      return {name: _examples(name, split) for name, split in self.splits.items()}


def _examples(name: str, split: dataset.Split) -> Iterator[tuple[int, dict[str, Any]]]:
  """Yields (key, record); TFDS shuffles by the key, as when it prepares a download."""
  for i, (image, label) in enumerate(zip(split.images, split.labels, strict=True)):
    yield i, {"id": f"{name}_{i:05d}", "image": _png(image), "label": int(label)}


def _png(image: np.ndarray) -> bytes:
  # Bytes, because TFDS would encode arrays with TensorFlow. Level 3 is the best trade-off: 7 %
  # smaller than OpenCV's default and as fast; level 9 gains only 0.5 % more.
  options = [cv2.IMWRITE_PNG_COMPRESSION, 3]
  return cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), options)[1].tobytes()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Silences the progress bars of TFDS, its printed messages and its log."""
  verbosity = logging.get_verbosity()
  logging.set_verbosity(logging.WARNING)
  tfds.disable_progress_bar()
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      yield
  finally:
    tfds.enable_progress_bar()
    logging.set_verbosity(verbosity)
