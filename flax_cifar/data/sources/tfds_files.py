"""The files of a data set that TensorFlow Datasets has prepared, read without TensorFlow."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import google_crc32c
import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader
from tensorflow_datasets.proto import tf_example_pb2

from flax_cifar import errors
from flax_cifar.data.sources import catalog

BLOCK = 500  # records that a thread decodes at once
Shard = tuple[Path, int]  # a file, and the number of records it should hold
Example = tuple[np.ndarray, int]  # image uint8 (H, W, 3) and label


def read_info(name: str, folder: Path) -> tfds.core.DatasetInfo:
  """Reads the dataset_info.json of the data set `name` in `folder`.

  It does not use `tfds.builder_from_directory`, which reads features.json, too, and imports, and so
  runs, any module that is named there.
  """
  version = tfds.core.Version(folder.name)
  identity = tfds.core.DatasetIdentity(name, version, str(folder), module_name="")
  features = tfds.features.FeaturesDict(
    {"label": np.int64}
  )  # without features it reads features.json
  info = tfds.core.DatasetInfo(builder=identity, features=features)
  info.read_from_directory(folder)
  return info


def list_shards(folder: Path, info: tfds.core.SplitInfo) -> list[Shard]:
  """Lists the files of a split, each with the number of records it should hold."""
  files = [folder / path.name for path in info.filepaths]
  return list(zip(files, info.shard_lengths, strict=True))


def get_reader(folder: Path, info: tfds.core.DatasetInfo) -> Callable[[Path], Sequence[bytes]]:
  """Returns the function that reads the records of a file; a UserError for an unknown format."""
  file_format = info.as_proto.file_format or "tfrecord"  # the default of TFDS, too
  if file_format not in READERS:
    raise errors.UserError(
      f"{folder} is in the format {file_format!r}, but only {' and '.join(READERS)} can be "
      "read here; choose another data.dir (--data_dir of a tool, or TFDS_DATA_DIR)."
    )
  return READERS[file_format]


def read_shards(
  name: str,
  folder: Path,
  shards: Sequence[Shard],
  read: Callable[[Path], Sequence[bytes]],
  decode: Callable[[bytes], Example],
) -> list[Example]:
  """Reads and decodes all records of a split of the data set `name`, in order.

  `decode` may raise anything for a damaged record.

  Raises:
    UserError: a file is damaged.
  """
  examples: list[Example] = []
  # Not as_data_source(): it refuses tfrecord and decodes on one core, which takes twice as long.
  for file, length in shards:
    try:
      examples += _decode_records(read(file), length, decode)
    except errors.UserError:  # sound, but nothing to train on
      raise
    except Exception as error:  # the readers raise many types for damaged bytes
      raise explain_damage(name, folder, file, error) from error
  return examples


def decode_record(record: bytes) -> Example:
  """Decodes a serialized tf.train.Example into an image uint8 (H, W, 3) and its label.

  Raises:
    UserError: it has no image or no label.
    ValueError: it is damaged.
  """
  feature = tf_example_pb2.Example.FromString(record).features.feature
  if "image" not in feature or "label" not in feature:
    raise errors.UserError(
      f"an example of the data set has the features {', '.join(sorted(feature))}; image and label "
      "are needed: choose another data set, or save these as npz:PATH."
    )
  encoded = np.frombuffer(feature["image"].bytes_list.value[0], np.uint8)
  image = cv2.imdecode(encoded, cv2.IMREAD_COLOR_RGB)  # gray images, too
  if image is None:
    raise ValueError("a record is no image")
  label = feature["label"].int64_list.value[0]
  if label < 0:
    raise errors.UserError(
      f"an example of the data set has the label {label}, so it has no class; all splits need "
      "labels: choose another data set, or save the labeled images as npz:PATH."
    )
  return image, label


def _decode_records(
  records: Sequence[bytes], length: int, decode: Callable[[bytes], Example]
) -> list[Example]:
  if len(records) != length:
    raise ValueError(f"{len(records)} records instead of {length}")

  def decode_block(start: int) -> list[Example]:
    return [decode(record) for record in records[start : start + BLOCK]]

  with ThreadPoolExecutor() as pool:  # OpenCV decodes outside the GIL
    blocks = pool.map(decode_block, range(0, length, BLOCK))
    return [example for block in blocks for example in block]


def explain_damage(name: str, folder: Path, file: Path, reason: object) -> errors.UserError:
  """The error for a damaged `file` of the prepared `folder` of the data set `name`."""
  root = folder.parents[1 + name.count("/")]
  remedy = "run again" if name in catalog.CATALOG else catalog.advise(name, root)
  return errors.UserError(
    f"{file} is missing, damaged or not readable here ({errors.shorten(reason)}); delete the "
    f"directory {folder} and {remedy}."
  )


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


READERS = {"array_record": _read_array_record, "tfrecord": _read_tfrecord}
