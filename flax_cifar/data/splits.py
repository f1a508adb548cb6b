"""Which images train, which choose, which test: the protocol of a run."""

import dataclasses

import numpy as np

from flax_cifar.data.dataset import Split
from flax_cifar.data.source import channel_stats, load_dataset, split_validation
from flax_cifar.errors import choose, require

PROTOCOLS = {
  "honest": "validation images come from train; the test split is read once, at the end",
  "published": "trains on all of train and validates on the test split, as the source did",
  "trial": "validation images come from train; the test split is not looked at",
}


@dataclasses.dataclass(frozen=True)
class Splits:
  """What a run trains on, chooses by and is judged by; mean and std per channel in [0, 1]."""

  train: Split
  validation: Split  # may be empty
  test: Split
  judge: str  # the split that the finished network is scored on: "test", or "validation" in a trial
  class_names: tuple[str, ...]
  mean: tuple[float, ...]
  std: tuple[float, ...]

  @property
  def image_shape(self) -> tuple[int, int, int]:
    """(H, W, C)."""
    height, width, channels = self.train.images.shape[1:]
    return height, width, channels

  def get_judge(self) -> Split:
    """The split that the finished network is scored on."""
    return self.validation if self.judge == "validation" else self.test


def load_splits(
  *, protocol: str, name: str, dir: str, image_size: int, validation_size: int, limit: int
) -> Splits:
  """Loads a data set (see `load_dataset`) and splits it as `protocol` says.

  Args:
    protocol: a key of PROTOCOLS.
    name: of the data set.
    dir: where CIFAR-10 is.
    image_size: pixels.
    validation_size: images held out of train, unless the protocol is "published".
    limit: images to keep of each split, chosen at random but always alike; 0 keeps all.

  Raises:
    UserError: an unknown choice, a size out of range, missing or damaged data.
  """
  choose("protocol", protocol, PROTOCOLS)
  require(limit >= 0, "data.limit", limit, "0 (all) or a number of images")
  is_trial = protocol == "trial"
  require(validation_size >= 0, "data.validation_size", validation_size, "0 or more")
  sufficient = validation_size > 0 or not is_trial
  require(sufficient, "data.validation_size", validation_size, "positive where protocol='trial'")
  dataset = load_dataset(name=name, dir=dir, image_size=image_size)
  mean, std = channel_stats(dataset.train.images)
  if protocol == "published":
    train, validation = dataset.train, dataset.test
  else:
    train, validation = split_validation(dataset.train, validation_size=validation_size)
  return Splits(
    train=_limit(train, limit),
    validation=_limit(validation, limit),
    test=_limit(dataset.test, limit),
    judge="validation" if is_trial else "test",
    class_names=dataset.class_names,
    mean=mean,
    std=std,
  )


def _limit(split: Split, limit: int) -> Split:
  """Not the first ones, which may all be of one class; they keep their order."""
  if not 0 < limit < len(split):
    return split
  kept = np.sort(np.random.default_rng(0).permutation(len(split))[:limit])
  return Split(split.images[kept], split.labels[kept])
