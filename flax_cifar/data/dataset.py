"""The in-memory form of every data set, and the checks that it must pass."""

import dataclasses

import numpy as np

from flax_cifar import errors

MAX_CLASSES = 10_000  # a label far too high must not create that many names and logits


@dataclasses.dataclass(frozen=True)
class Split:
  """Images and labels that belong together."""

  images: np.ndarray  # uint8 (N, H, W, 3), RGB
  labels: np.ndarray  # int32 (N,)

  def __len__(self) -> int:
    return len(self.images)


@dataclasses.dataclass(frozen=True)
class Dataset:
  """A training and a test split; label `i` means `class_names[i]`."""

  name: str
  train: Split
  test: Split
  class_names: tuple[str, ...]


def check_split(split: Split, *, num_classes: int, where: str) -> None:
  """Checks images uint8 (N, H, W, 3) and integer labels (N,) in [0, num_classes), N >= 1.

  Args:
    split: as it was loaded.
    num_classes: number of class names.
    where: the data set and split, for the message.

  Raises:
    UserError: a check fails; the message names the array, its shape or value, and the remedy.
  """
  images, labels = split.images, split.labels
  if images.dtype != np.uint8:
    raise errors.UserError(
      f"{where}: images have dtype {images.dtype}; save them as uint8 in 0..255 "
      "(for floats in [0, 1]: np.rint(images * 255).astype(np.uint8))."
    )
  if images.ndim != 4 or images.shape[-1] != 3:
    raise errors.UserError(
      f"{where}: images have shape {images.shape}; (N, height, width, 3) is needed. Turn "
      "channels-first into channels-last with images.transpose(0, 2, 3, 1), and repeat the "
      "channel of gray images with np.repeat(images[..., None], 3, axis=-1)."
    )
  _check_labels(labels, num_images=len(images), num_classes=num_classes, where=where)


def _check_labels(labels: np.ndarray, *, num_images: int, num_classes: int, where: str) -> None:
  if labels.dtype.kind not in "iu":
    raise errors.UserError(f"{where}: labels have dtype {labels.dtype}; save them as integers.")
  if labels.shape != (num_images,):
    raise errors.UserError(
      f"{where}: labels have shape {labels.shape} for {num_images} images; one integer per "
      f"image is needed, shape ({num_images},)."
    )
  if not num_images:
    raise errors.UserError(f"{where}: there are no images; at least one is needed.")
  low, high = int(labels.min()), int(labels.max())
  if low < 0 or high >= num_classes:
    raise errors.UserError(
      f"{where}: labels lie in {low}..{high} but there are {num_classes} classes; number them "
      f"from 0 to {num_classes - 1}."
    )
