"""The in-memory form of every data set, and the checks that it must pass."""

import dataclasses

import numpy as np

from flax_cifar import errors

MAX_CLASSES = 10_000  # a label far too high must not create that many names and logits
# Names of a validation split, in files and folders; the first one that is there counts.
VALIDATION_NAMES = ("validation", "val", "valid")


@dataclasses.dataclass(frozen=True)
class Split:
  """Images and labels that belong together.

  After `load.load_dataset` they have the types below. A source may give gray images and labels of
  other integer types.
  """

  images: np.ndarray  # uint8 (N, H, W, 3), RGB
  labels: np.ndarray  # int32 (N,)

  def __repr__(self) -> str:
    return f"Split({len(self.labels):,} images {self.images.shape[1:]})"

  def __len__(self) -> int:
    return len(self.images)


@dataclasses.dataclass(frozen=True)
class Dataset:
  """The splits of a data set; label `i` means `class_names[i]`.

  Attributes:
    train: the training images.
    test: the test images.
    class_names: the name of each label.
    validation: the data set's own validation images; None where it has none.
    test_is_held_out: whether the data set has no test images of its own, so that some training
      images were held out in their place.
  """

  train: Split
  test: Split
  class_names: tuple[str, ...]
  validation: Split | None = None
  test_is_held_out: bool = False


def number_classes(where: str, highest: int) -> tuple[str, ...]:
  """Names the classes "0", "1", ... up to the label `highest` of the data set `where`.

  Raises:
    UserError: the label is negative, or MAX_CLASSES or more.
  """
  if not 0 <= highest < MAX_CLASSES:
    raise errors.UserError(
      f"{where}: the labels go up to {highest}; number the classes from 0. There may be at most "
      f"{MAX_CLASSES:,}."
    )
  return tuple(map(str, range(highest + 1)))


def gray_to_rgb(images: np.ndarray) -> np.ndarray:
  """Turns gray images (N, H, W) or (N, H, W, 1) into (N, H, W, 3); returns others as they are."""
  if images.ndim == 3:
    images = images[..., None]
  return np.repeat(images, 3, axis=-1) if images.ndim == 4 and images.shape[-1] == 1 else images


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
      "(floats in [0, 1]: np.rint(images * 255).astype(np.uint8); in [0, 255]: without the factor)."
    )
  if images.ndim != 4 or images.shape[-1] != 3:
    raise errors.UserError(
      f"{where}: images have shape {images.shape}; (N, height, width, 3) or, for gray ones, "
      f"(N, height, width) is needed. {_get_remedy(images.shape)}"
    )
  _check_labels(labels, num_images=len(images), num_classes=num_classes, where=where)


def _get_remedy(shape: tuple[int, ...]) -> str:
  if len(shape) == 4 and shape[1] in (1, 3, 4):
    return "Turn channels-first into channels-last: images = images.transpose(0, 2, 3, 1)."
  if len(shape) == 4 and shape[-1] == 4:
    return "Leave out the alpha channel: images = images[..., :3]."
  if len(shape) == 2:
    return "Give each row the shape of its image: images.reshape(-1, height, width, 3)."
  return "Save one image per row of the first axis."


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


def find_unseen(split: Split, class_names: tuple[str, ...]) -> list[str]:
  """The names of the classes that no image of `split` shows."""
  counts = np.bincount(split.labels, minlength=len(class_names))
  return [name for name, count in zip(class_names, counts, strict=True) if not count]
