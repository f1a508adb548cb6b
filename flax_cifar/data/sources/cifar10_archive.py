"""CIFAR-10 as its authors publish it: its constants and its archives."""

import _codecs
import dataclasses
import gzip
import io
import pickle
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from flax_cifar import errors
from flax_cifar.data import dataset

CLASS_NAMES = (
  "airplane",
  "automobile",
  "bird",
  "cat",
  "deer",
  "dog",
  "frog",
  "horse",
  "ship",
  "truck",
)
BATCH_SIZE = 10_000  # images per file of the archive: five files for training, one for testing
TRAIN_BATCHES = 5
IMAGE_SHAPE = (32, 32, 3)

ARCHIVE = "cifar-10-python.tar.gz"
ARCHIVE_MD5 = "c58f30108f718f92721af3b95e74349a"
CHUNK_BYTES = 1 << 18
MAX_UNPACKED_BYTES = 1_000_000_000  # five times what an archive unpacks to


def find_archive(root: Path) -> Path | None:
  """Returns an archive, or its unpacked folder, in `root` or in the folders of TFDS below it."""
  folders = (root, root / "downloads", root / "downloads" / "manual")
  paths = (folder / name for folder in folders for name in _ARCHIVES)
  # Not a pipe of that name: reading it would wait forever.
  return next((path for path in paths if path.is_file() or path.is_dir()), None)


def read_archive(path: Path) -> tuple[dataset.Split, dataset.Split]:
  """Reads the training and test split, in the order of the files, from an archive or its folder.

  Args:
    path: cifar-10-python.tar.gz, cifar-10-binary.tar.gz, cifar-10-batches-py or
      cifar-10-batches-bin. Nothing is extracted to disk.

  Raises:
    UserError: truncated, damaged or incomplete, or a pickle that holds anything but arrays.
  """
  layout = _ARCHIVES[path.name]
  try:
    blobs = _folder_members(path, layout) if path.is_dir() else _tar_members(path, layout)
    batches = [_decode_batch(layout, file, blobs) for file in layout.files]
  except Exception as error:  # gzip, tar, zlib and pickle raise a dozen types for damaged bytes
    raise errors.UserError(
      f"{path} is damaged or not CIFAR-10 ({errors.shorten(error)}); delete it and run again to "
      f"download it, or put a good copy there (md5 of {ARCHIVE}: {ARCHIVE_MD5})."
    ) from error
  return join_batches(batches[:-1]), join_batches(batches[-1:])


def join_batches(batches: Iterable[tuple[np.ndarray, np.ndarray]]) -> dataset.Split:
  """Concatenates batches of images (N, 32, 32, 3) and labels (N,)."""
  images, labels = zip(*batches, strict=True)
  return dataset.Split(np.ascontiguousarray(np.concatenate(images)), np.concatenate(labels))


@dataclasses.dataclass(frozen=True)
class _Layout:
  """The names and the encoding of the six batch files."""

  folder: str
  suffix: str
  decode: Callable[[bytes], tuple[np.ndarray, np.ndarray]]  # pixels (N, 3072), labels (N,)

  @property
  def files(self) -> list[str]:
    stems = [f"data_batch_{i + 1}" for i in range(TRAIN_BATCHES)] + ["test_batch"]
    return [stem + self.suffix for stem in stems]


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
    while stream.read(CHUNK_BYTES):  # up to the end, where gzip compares its checksum
      if stream.tell() > MAX_UNPACKED_BYTES:
        raise ValueError("it unpacks to more than a gigabyte")
  return blobs


def _decode_batch(
  layout: _Layout, file: str, blobs: dict[str, bytes]
) -> tuple[np.ndarray, np.ndarray]:
  """Decodes a batch file into images (BATCH_SIZE, 32, 32, 3) and labels (BATCH_SIZE,)."""
  if file not in blobs:
    raise ValueError(f"{layout.folder}/{file} is not in it")
  pixels, labels = layout.decode(blobs[file])
  if pixels.shape != (BATCH_SIZE, 3 * 32 * 32) or labels.shape != (BATCH_SIZE,):
    raise ValueError(
      f"{file} holds arrays {pixels.shape} and {labels.shape}, not {BATCH_SIZE} images"
    )
  if labels.min() < 0 or labels.max() >= len(CLASS_NAMES):
    raise ValueError(f"{file} holds labels {labels.min()}..{labels.max()}, not 0..9")
  return pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels  # color planes come first


# ---- Layouts of the archives


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
  """Unpickles only arrays and plain containers, because a pickle could otherwise run any code."""

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


_PYTHON = _Layout("cifar-10-batches-py", "", _decode_pickled)
_BINARY = _Layout("cifar-10-batches-bin", ".bin", _decode_binary)
_ARCHIVES = {
  ARCHIVE: _PYTHON,
  "cifar-10-binary.tar.gz": _BINARY,
  _PYTHON.folder: _PYTHON,
  _BINARY.folder: _BINARY,
}
