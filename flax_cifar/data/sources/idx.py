"""The files of MNIST and of the data sets that took over its format, IDX."""

import gzip
import math
from pathlib import Path

import numpy as np

from flax_cifar.data import dataset
from flax_cifar.data.sources import published

BYTES = 8  # the type of the numbers; all files of these data sets have it
MAX_UNPACKED_BYTES = 200_000_000  # four times what the images of MNIST unpack to


def read_splits(
  train_images: Path, train_labels: Path, test_images: Path, test_labels: Path
) -> published.Splits:
  """Reads the training and test split from four files that gzip has compressed.

  Returns:
    Images uint8 (N, H, W, 1) and labels int32 (N,), in the order of the files.

  Raises:
    ValueError, OSError, EOFError, zlib.error: a file is damaged, or two do not fit together.
  """
  return _read_split(train_images, train_labels), _read_split(test_images, test_labels)


def _read_split(images: Path, labels: Path) -> dataset.Split:
  pixels, classes = _read_array(images, 3), _read_array(labels, 1)
  if len(pixels) != len(classes):
    raise ValueError(f"there are {len(pixels)} images and {len(classes)} labels")
  return dataset.Split(pixels[..., None], classes.astype(np.int32))


def _read_array(path: Path, rank: int) -> np.ndarray:
  """Reads <u16 0, u8 type, u8 rank, u32 size of each axis, the numbers>, big-endian."""
  with gzip.open(path) as stream:
    blob = stream.read(MAX_UNPACKED_BYTES)
  start = 4 + 4 * rank
  if blob[:4] != bytes([0, 0, BYTES, rank]) or len(blob) < start:
    raise ValueError(f"{path.name} is no array of bytes with {rank} axes")
  shape = np.frombuffer(blob[4:start], ">u4").tolist()
  if len(blob) - start != math.prod(shape):
    raise ValueError(f"{path.name} holds {len(blob) - start} numbers for an array {shape}")
  return np.frombuffer(blob, np.uint8, offset=start).reshape(shape)
