"""The splits of a run: which images train it, which choose a network, and which test it."""

import dataclasses
import functools
import hashlib
import math
from typing import Any

import numpy as np

from flax_cifar import errors
from flax_cifar.data import dataset as dataset_lib
from flax_cifar.data import load

PROTOCOLS = {
  "honest": "validation images are held out of training; test is read once, at the end",
  "published": "trains on all training images and validates on the test split, as the source did",
  "trial": "validation images are held out of training; the test split is never read",
}


SPLITS = ("train", "validation", "test")
DIGEST_DIGITS = 16  # hexadecimal; enough to tell data sets apart


@dataclasses.dataclass(frozen=True)
class Splits:
  """The splits of a run, with the statistics that normalize their images.

  Attributes:
    train: the training images.
    validation: the images that choose a network; may be empty.
    test: the images that test it.
    final_split_name: the split scored at the end of the run: "test", or "validation" of a trial.
    class_names: the name of each label.
    mean: of each channel over the data set's whole training split, in [0, 1].
    std: the standard deviation, likewise.
  """

  train: dataset_lib.Split
  validation: dataset_lib.Split
  test: dataset_lib.Split
  final_split_name: str
  class_names: tuple[str, ...]
  mean: tuple[float, ...]
  std: tuple[float, ...]

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """(H, W, C)."""
    height, width, channels = self.train.images.shape[1:]
    return height, width, channels

  @property
  def final_split(self) -> dataset_lib.Split:
    """The split that scores the finished network."""
    return self.validation if self.final_split_name == "validation" else self.test

  @functools.cached_property
  def fingerprint(self) -> dict[str, Any]:
    """The class names, and for each split its number of images and a digest of its arrays.

    A run or weights of the same data have the same one.
    """
    fingerprint: dict[str, Any] = {"class_names": list(self.class_names)}
    for name in SPLITS:
      split = getattr(self, name)
      fingerprint |= {f"{name}_images": len(split), f"{name}_sha256": compute_digest(split)}
    return fingerprint


def compute_digest(split: dataset_lib.Split) -> str:
  """A digest of the images and labels, in their order."""
  digest = hashlib.sha256()
  for array in (split.images, split.labels):
    digest.update(f"{array.dtype.str} {array.shape}".encode())
    digest.update(np.ascontiguousarray(array).data)
  return digest.hexdigest()[:DIGEST_DIGITS]


def load_splits(
  *, protocol: str, name: str, dir: str, image_size: int, validation_size: int, limit: int
) -> Splits:
  """Loads a data set, see `load.load_dataset`, and splits it as `protocol` says.

  Args:
    protocol: a key of PROTOCOLS.
    name: of the data set.
    dir: root of the data sets of TFDS; "" means TFDS_DATA_DIR, else ~/tensorflow_datasets.
    image_size: height and width in pixels.
    validation_size: number of training images held out, unless the protocol is "published" or the
      data set has validation images of its own, which are then used, all of them.
    limit: number of images to keep of each split, chosen at random but always the same ones; 0
      keeps all.

  Raises:
    UserError: an unknown choice, a size out of range, missing or damaged data.
  """
  errors.choose("protocol", protocol, PROTOCOLS)
  errors.require(limit >= 0, "data.limit", limit, "0 (all) or a number of images")
  errors.require(validation_size >= 0, "data.validation_size", validation_size, "0 or more")
  if ":" not in name:  # cifar10 and shapes have no validation images of their own
    _check_trial(protocol, validation_size, validation_size)
  dataset = load.load_dataset(name=name, dir=dir, image_size=image_size)
  mean, std = channel_stats(dataset.train.images)
  if protocol == "published":
    train, validation = dataset.train, dataset.test
  elif dataset.validation is not None:
    train, validation = dataset.train, dataset.validation
  else:
    train, validation = split_validation(dataset.train, validation_size=validation_size)
  _check_trial(protocol, len(validation), validation_size)
  train = _limit(train, limit)
  if unseen := dataset_lib.find_unseen(train, dataset.class_names):
    errors.warn(
      f"{name}: {len(unseen)} of {len(dataset.class_names)} classes have no training image, with "
      f"validation_size={validation_size} and limit={limit}: {errors.list_some(unseen)}"
    )
  return Splits(
    train=train,
    validation=_limit(validation, limit),
    test=_limit(dataset.test, limit),
    final_split_name="validation" if protocol == "trial" else "test",
    class_names=dataset.class_names,
    mean=mean,
    std=std,
  )


def _check_trial(protocol: str, count: int, validation_size: int) -> None:
  """Raises a UserError for a trial with `count` = 0 validation images."""
  sufficient = count > 0 or protocol != "trial"
  errors.require(
    sufficient, "data.validation_size", validation_size, "positive where protocol='trial'"
  )


def _limit(split: dataset_lib.Split, limit: int) -> dataset_lib.Split:
  """Keeps `limit` random examples in their order; the first ones may all be of one class."""
  if not 0 < limit < len(split):
    return split
  kept = np.sort(np.random.default_rng(0).permutation(len(split))[:limit])
  return dataset_lib.Split(split.images[kept], split.labels[kept])


def split_validation(
  train: dataset_lib.Split, *, validation_size: int
) -> tuple[dataset_lib.Split, dataset_lib.Split]:
  """Holds out the last `validation_size` examples of a fixed permutation of `train`.

  The permutation depends only on the number of examples, so every run and every seed holds out
  the same ones.

  Returns:
    (train, validation) of len(train) - validation_size and validation_size examples.

  Raises:
    UserError: `validation_size` is negative or leaves nothing to train on.
  """
  errors.require(
    0 <= validation_size < len(train),
    "data.validation_size",
    validation_size,
    f"from 0 to {len(train) - 1} (there are {len(train)} training images)",
  )
  order = np.random.default_rng(0).permutation(len(train))
  kept, held = np.split(order, [len(train) - validation_size])
  return (
    dataset_lib.Split(train.images[kept], train.labels[kept]),
    dataset_lib.Split(train.images[held], train.labels[held]),
  )


def channel_stats(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
  """Computes mean and population standard deviation of each channel.

  Both come from integer histograms, so they are rounded only once, whatever the number of images.

  Args:
    images: uint8 (N, H, W, C), N >= 1.

  Returns:
    (mean, std), C floats each, in units where 255 is 1.
  """
  stats = [_histogram_stats(_histogram(images[..., c])) for c in range(images.shape[-1])]
  mean, std = zip(*stats, strict=True)
  return mean, std


def _histogram(values: np.ndarray) -> np.ndarray:
  # bincount first converts its input to int64; blocks that fit into the cache halve the time.
  block = 100
  counts = np.zeros(256, np.int64)
  for start in range(0, len(values), block):
    counts += np.bincount(values[start : start + block].ravel(), minlength=256)
  return counts


def _histogram_stats(histogram: np.ndarray) -> tuple[float, float]:
  # Python integers, so that the difference of two large products neither overflows nor rounds.
  counts = histogram.tolist()
  n = sum(counts)
  total = sum(value * count for value, count in enumerate(counts))
  squares = sum(value * value * count for value, count in enumerate(counts))
  return total / (255 * n), math.sqrt((n * squares - total * total) / (255 * n) ** 2)
