"""Loads a data set by name: uint8 images, labels and class names."""

import collections
import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np

from flax_cifar import errors
from flax_cifar.data import dataset as dataset_lib
from flax_cifar.data.augment import arguments
from flax_cifar.data.sources import catalog, cifar10, folder, npz, prepared, shapes


def load_dataset(*, name: str, dir: str, image_size: int) -> dataset_lib.Dataset:
  """Loads `cifar10`, `shapes`, `tfds:NAME`, `npz:PATH` or `folder:PATH`.

  Args:
    name: one of the five forms; `~` in PATH is the home directory. Transparent pixels of images
      in a folder become white.
    dir: where CIFAR-10 and the data sets of TFDS are prepared, or are downloaded to; "" means
      TFDS_DATA_DIR, else ~/tensorflow_datasets. The other three do not use it.
    image_size: height and width in pixels. `shapes` and `folder:PATH` make images of this
      size; the other three must already have it.

  Returns:
    Dataset with uint8 (N, image_size, image_size, 3) images and int32 (N,) labels.

  Raises:
    UserError: unknown name, missing or damaged data, or images of another size.
  """
  arguments.check_image_size(image_size)
  kind, _, path = name.partition(":")
  forms = (f"{kind}:PATH", f"{kind}:NAME")
  form = next((form for form in forms if path and form in LOADERS), name)
  loader = errors.choose("data.name", form, LOADERS)
  found = errors.get_path("data.name", path or ".")
  try:
    dataset = loader(path=found, dir=dir, image_size=image_size)
  except OSError as error:  # no permission to read a folder or file
    raise errors.UserError(
      f"{name} cannot be read ({error}); check its path and permissions."
    ) from error
  _check_class_names(name, dataset.class_names)

  def check(part: str, split: dataset_lib.Split) -> dataset_lib.Split:
    return _check_split(split, dataset.class_names, image_size, where=f"{name} {part}")

  return dataclasses.replace(
    dataset,
    train=check("train", dataset.train),
    validation=None if dataset.validation is None else check("validation", dataset.validation),
    test=check("test", dataset.test),
  )


def _check_split(
  split: dataset_lib.Split, class_names: tuple[str, ...], image_size: int, *, where: str
) -> dataset_lib.Split:
  """Returns `split` with three channels and int32 labels, after its checks."""
  split = dataclasses.replace(split, images=dataset_lib.gray_to_rgb(split.images))
  dataset_lib.check_split(split, num_classes=len(class_names), where=where)
  _check_size(split, image_size, where=where)
  return dataclasses.replace(split, labels=split.labels.astype(np.int32))


def _check_class_names(where: str, names: tuple[str, ...]) -> None:
  if len(names) < 2:
    raise errors.UserError(f"{where}: there is one class only, {names}; at least two are needed.")
  odd = [name for name in names if not name.isprintable()]
  if odd:  # the plots at the end of a run could not show them
    raise errors.UserError(f"{where}: the class names {odd[:3]} are not printable; rename them.")
  if not all(names):
    raise errors.UserError(f"{where}: class {names.index('')} has an empty name; rename it.")
  if len(names) > dataset_lib.MAX_CLASSES:
    raise errors.UserError(
      f"{where}: there are {len(names):,} classes; at most {dataset_lib.MAX_CLASSES:,} fit."
    )
  if repeated := [name for name, count in collections.Counter(names).items() if count > 1]:
    errors.warn(
      f"{where}: several classes are called {errors.list_some(repeated)}; tables and plots will "
      "not tell them apart"
    )


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


def _load_cifar10(*, path: Path, dir: str, image_size: int) -> dataset_lib.Dataset:
  del path
  _require_size("cifar10", image_size)
  return dataset_lib.Dataset(*cifar10.load_cifar10(dir=dir))


def _require_size(name: str, image_size: int) -> None:
  """Refuses the size of a data set of the catalog before it is downloaded."""
  size = catalog.CATALOG[name].image_size
  errors.require(image_size == size, "data.image_size", image_size, f"{size} for {name}")


def _load_shapes(*, path: Path, dir: str, image_size: int) -> dataset_lib.Dataset:
  del path, dir
  expected = f"at most {shapes.MAX_SIZE} for shapes"
  errors.require(image_size <= shapes.MAX_SIZE, "data.image_size", image_size, expected)
  train_images, train_labels, test_images, test_labels, class_names = shapes.make_shapes(
    num_train=shapes.NUM_TRAIN, num_test=shapes.NUM_TEST, image_size=image_size, seed=shapes.SEED
  )
  return dataset_lib.Dataset(
    dataset_lib.Split(train_images, train_labels),
    dataset_lib.Split(test_images, test_labels),
    tuple(class_names),
  )


def _load_prepared(*, path: Path, dir: str, image_size: int) -> dataset_lib.Dataset:
  name = path.as_posix()
  if name in catalog.CATALOG:
    _require_size(name, image_size)
  return prepared.load_prepared(name, dir=dir)


def _load_npz(*, path: Path, dir: str, image_size: int) -> dataset_lib.Dataset:
  del dir, image_size
  return npz.load_npz(path)


def _load_folder(*, path: Path, dir: str, image_size: int) -> dataset_lib.Dataset:
  del dir
  return folder.load_folder(path, image_size)


LOADERS: dict[str, Callable[..., dataset_lib.Dataset]] = {
  "cifar10": _load_cifar10,
  "shapes": _load_shapes,
  "tfds:NAME": _load_prepared,
  "npz:PATH": _load_npz,
  "folder:PATH": _load_folder,
}
