"""Loads a data set by name: uint8 images, labels and class names."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np

from flax_cifar import errors
from flax_cifar.data import dataset as dataset_lib
from flax_cifar.data.augment import arguments
from flax_cifar.data.sources import folder, npz, shapes

Loaded = tuple[dataset_lib.Split, dataset_lib.Split, tuple[str, ...]]  # train, test, class names


def load_dataset(*, name: str, dir: str, image_size: int) -> dataset_lib.Dataset:
  """Loads `cifar10`, `shapes`, `npz:PATH` or `folder:PATH`.

  Args:
    name: one of the four forms; `~` in PATH is the home directory. Transparent pixels of images
      in a folder become white.
    dir: where CIFAR-10 is, or is downloaded to; "" means TFDS_DATA_DIR, else
      ~/tensorflow_datasets. The other three do not use it.
    image_size: height and width in pixels. `shapes` and `folder:PATH` make images of this
      size; the other two must already have it.

  Returns:
    Dataset with uint8 (N, image_size, image_size, 3) images and int32 (N,) labels.

  Raises:
    UserError: unknown name, missing or damaged data, or images of another size.
  """
  expected = f"from 1 to {arguments.MAX_PIXELS} pixels"
  errors.require(1 <= image_size <= arguments.MAX_PIXELS, "data.image_size", image_size, expected)
  kind, _, path = name.partition(":")
  loader = errors.choose(
    "data.name", f"{kind}:PATH" if path and f"{kind}:PATH" in LOADERS else name, LOADERS
  )
  found = errors.get_path("data.name", path)
  try:
    train, test, class_names = loader(path=found, dir=dir, image_size=image_size)
  except OSError as error:  # no permission to read a folder or file
    raise errors.UserError(
      f"{name} cannot be read ({error}); check its path and permissions."
    ) from error
  return _checked(dataset_lib.Dataset(name, train, test, tuple(class_names)), image_size)


def _checked(dataset: dataset_lib.Dataset, image_size: int) -> dataset_lib.Dataset:
  """Checks both splits and the class names, and converts the labels to int32."""
  names = dataset.class_names
  for part, split in (("train", dataset.train), ("test", dataset.test)):
    dataset_lib.check_split(split, num_classes=len(names), where=f"{dataset.name} {part}")
    _check_size(split, image_size, where=f"{dataset.name} {part}")
  if len(names) < 2:
    raise errors.UserError(
      f"{dataset.name}: there is one class only, {names}; at least two are needed."
    )
  odd = [name for name in names if not name.isprintable()]
  if odd:  # the plots at the end of a run could not show them
    raise errors.UserError(
      f"{dataset.name}: the class names {odd[:3]} are not printable; rename them."
    )
  if len(names) > dataset_lib.MAX_CLASSES:
    raise errors.UserError(
      f"{dataset.name}: there are {len(names):,} classes; at most {dataset_lib.MAX_CLASSES:,} fit."
    )
  train, test = (
    dataset_lib.Split(split.images, split.labels.astype(np.int32))
    for split in (dataset.train, dataset.test)
  )
  return dataclasses.replace(dataset, train=train, test=test)


def _check_size(split: dataset_lib.Split, image_size: int, *, where: str) -> None:
  height, width = split.images.shape[1:3]
  if (height, width) == (image_size, image_size):
    return
  remedy = (
    f"set --config.data.image_size={height}."
    if height == width
    else "make them square, or use folder:PATH, which resizes."
  )
  raise errors.UserError(
    f"{where}: images have {height}x{width} pixels but data.image_size={image_size}; " + remedy
  )


def _load_cifar10(*, path: Path, dir: str, image_size: int) -> Loaded:
  del path
  # Imported here, because tensorflow_datasets takes most of a second to import.
  from flax_cifar.data.sources import cifar10, cifar10_archive

  errors.require(
    image_size == cifar10_archive.IMAGE_SHAPE[0],
    "data.image_size",
    image_size,
    "32 for cifar10",
  )
  return cifar10.load_cifar10(dir=dir)


def _load_shapes(*, path: Path, dir: str, image_size: int) -> Loaded:
  del path, dir
  expected = f"at most {shapes.MAX_SIZE} for shapes"
  errors.require(image_size <= shapes.MAX_SIZE, "data.image_size", image_size, expected)
  train_images, train_labels, test_images, test_labels, class_names = shapes.make_shapes(
    num_train=shapes.NUM_TRAIN, num_test=shapes.NUM_TEST, image_size=image_size, seed=shapes.SEED
  )
  return (
    dataset_lib.Split(train_images, train_labels),
    dataset_lib.Split(test_images, test_labels),
    tuple(class_names),
  )


def _load_npz(*, path: Path, dir: str, image_size: int) -> Loaded:
  del dir, image_size
  (train_x, train_y, test_x, test_y), names = npz.read_npz(path)
  train, test = (
    dataset_lib.Split(train_x, npz.flatten_labels(train_y)),
    dataset_lib.Split(test_x, npz.flatten_labels(test_y)),
  )
  return train, test, names or npz.number_classes(path, (train.labels, test.labels))


def _load_folder(*, path: Path, dir: str, image_size: int) -> Loaded:
  del dir
  if not path.is_dir():
    raise errors.UserError(f"folder:{path} is not a directory.")
  train_files, test_files = folder.list_files(path)
  class_names = tuple(sorted(train_files))
  train = folder.read_images(train_files, class_names, image_size)
  return train, folder.read_images(test_files, class_names, image_size), class_names


LOADERS: dict[str, Callable[..., Loaded]] = {
  "cifar10": _load_cifar10,
  "shapes": _load_shapes,
  "npz:PATH": _load_npz,
  "folder:PATH": _load_folder,
}
