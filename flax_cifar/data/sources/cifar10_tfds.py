"""CIFAR-10 as TensorFlow Datasets prepares it, read and written without TensorFlow."""

import contextlib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import google_crc32c
import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from array_record.python.array_record_module import ArrayRecordReader
from tensorflow_datasets.image_classification import cifar
from tensorflow_datasets.proto import tf_example_pb2

from flax_cifar import errors
from flax_cifar.data import dataset
from flax_cifar.data.sources import cifar10_archive

# ---- Reading a prepared directory


def read_prepared(folder: Path) -> tuple[dataset.Split, dataset.Split]:
  """Reads the training and test split from a TFDS directory, in array_record or tfrecord format.

  Raises:
    UserError: a file is damaged, the format is another one, or the number of examples or the
      classes are not those of CIFAR-10.
  """
  try:
    info = _read_info(folder)
    file_format = info.as_proto.file_format or "tfrecord"  # the default of TFDS, too
    shards = [_list_shards(folder, info.splits[name]) for name in ("train", "test")]
  except Exception as error:  # TFDS raises many types for damaged JSON
    raise _damaged_prepared(folder, folder / "dataset_info.json", error) from error
  if file_format not in _SHARD_READERS:
    raise errors.UserError(
      f"{folder} is in the format {file_format!r}, but only {' and '.join(_SHARD_READERS)} can be "
      "read here; choose another --config.data.dir (or TFDS_DATA_DIR)."
    )
  _check_names(folder)
  read_shard = _SHARD_READERS[file_format]
  train, test = (_read_split(folder, files, read_shard) for files in shards)
  _check_counts(folder, train, test)
  return train, test


def _read_info(folder: Path) -> tfds.core.DatasetInfo:
  """Reads dataset_info.json.

  It does not use `tfds.builder_from_directory`, which reads features.json, too, and imports, and so
  runs, any module that is named there.
  """
  version = tfds.core.Version(folder.name)
  identity = tfds.core.DatasetIdentity("cifar10", version, str(folder), module_name="")
  features = tfds.features.FeaturesDict(
    {"label": np.int64}
  )  # without features it reads features.json
  info = tfds.core.DatasetInfo(builder=identity, features=features)
  info.read_from_directory(folder)
  return info


def _list_shards(folder: Path, info: tfds.core.SplitInfo) -> list[tuple[Path, int]]:
  """Lists the files of a split, each with the number of records it should hold."""
  files = [folder / path.name for path in info.filepaths]
  return list(zip(files, info.shard_lengths, strict=True))


def _check_names(folder: Path) -> None:
  file = folder / "label.labels.txt"
  try:
    names = tuple(file.read_text(encoding="utf-8").split())
  except (OSError, ValueError) as error:
    raise _damaged_prepared(folder, file, error) from error
  if names != cifar10_archive.CLASS_NAMES:
    raise _damaged_prepared(folder, file, f"it lists {names}")


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


def _damaged_prepared(folder: Path, file: Path, reason: object) -> errors.UserError:
  return errors.UserError(
    f"{file} is missing, damaged or not readable here ({errors.shorten(reason)}); delete the "
    f"directory {folder} and run again."
  )


def _read_split(
  folder: Path, shards: list[tuple[Path, int]], read_shard: Callable[[Path], Sequence[bytes]]
) -> dataset.Split:
  batches = []
  # Not as_data_source(): it refuses tfrecord and decodes on one core, which takes twice as long.
  for file, length in shards:
    try:
      batches.append(_decode_records(read_shard(file), length))
    except Exception as error:  # the readers raise many types for damaged bytes
      raise _damaged_prepared(folder, file, error) from error
  return cifar10_archive.join_batches(batches)


def _decode_records(records: Sequence[bytes], length: int) -> tuple[np.ndarray, np.ndarray]:
  """Decodes serialized tf.train.Examples into images (N, 32, 32, 3) and labels (N,)."""
  if len(records) != length:
    raise ValueError(f"{len(records)} records instead of {length}")
  images, labels = (
    np.empty((length, *cifar10_archive.IMAGE_SHAPE), np.uint8),
    np.empty(length, np.int32),
  )
  block = 500

  def decode_block(start: int) -> None:
    for i in range(start, min(start + block, len(records))):
      images[i], labels[i] = _decode_record(records[i])

  with ThreadPoolExecutor() as pool:  # OpenCV decodes outside the GIL
    for _ in pool.map(decode_block, range(0, len(records), block)):
      pass
  return images, labels


def _decode_record(record: bytes) -> tuple[np.ndarray, int]:
  feature = tf_example_pb2.Example.FromString(record).features.feature
  encoded = np.frombuffer(feature["image"].bytes_list.value[0], np.uint8)
  image = cv2.imdecode(encoded, cv2.IMREAD_COLOR_RGB)
  if image is None or image.shape != cifar10_archive.IMAGE_SHAPE:
    raise ValueError("a record is not an image of 32x32 pixels")
  label = feature["label"].int64_list.value[0]
  if not 0 <= label < len(cifar10_archive.CLASS_NAMES):
    raise ValueError(f"a record has the label {label}, not 0..9")
  return image, label


def _read_array_record(path: Path) -> Sequence[bytes]:
  reader = ArrayRecordReader(os.fspath(path))
  try:
    return reader.read_all()
  finally:
    reader.close()


def _read_tfrecord(path: Path) -> Sequence[bytes]:
  """Reads frames of <u64 length, u32 checksum of it, payload, u32 checksum of it>."""
  blob = path.read_bytes()
  records, start = [], 0
  while start < len(blob):
    length = int.from_bytes(_take_checked(blob, start, 8), "little")
    records.append(_take_checked(blob, start + 12, length))
    start += 12 + length + 4
  return records


def _take_checked(blob: bytes, start: int, length: int) -> bytes:
  """Returns the `length` bytes from `start` on, after checking the masked CRC-32C behind them.

  Raises:
    EOFError: the file ends before the checksum.
    ValueError: the checksum is wrong.
  """
  part, checksum = blob[start : start + length], blob[start + length : start + length + 4]
  if len(checksum) < 4:
    raise EOFError("the last record is cut off")
  crc = google_crc32c.value(part)
  # TFRecord rotates the sum by 15 bits and adds a constant, in case the data contain such sums.
  masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
  if masked != int.from_bytes(checksum, "little"):
    raise ValueError(f"the checksum of the record at byte {start} is wrong")
  return part


_SHARD_READERS = {"array_record": _read_array_record, "tfrecord": _read_tfrecord}


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
