"""Data sets that are folders of images, one folder per class."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from flax_cifar import errors
from flax_cifar.data import dataset

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp"})

Files = dict[str, list[Path]]  # the files of each class


def list_files(path: Path) -> tuple[Files, Files]:
  """Lists the training and test files by class.

  Without folders train/ and test/, one sixth of each class is held out for testing.

  Raises:
    UserError: train/ or test/ is missing, or they differ in their classes; there are fewer than two
      classes, a class without images, or one with too few to hold one out.
  """
  present = [part for part in ("train", "test") if (path / part).is_dir()]
  if not present:
    return _hold_out_sixth(_class_files(path))
  if len(present) == 1:
    raise errors.UserError(
      f"folder:{path} has {present[0]}/ but not both train/ and test/; add the other one, or "
      "put the class directories directly into it."
    )
  train, test = _class_files(path / "train"), _class_files(path / "test")
  if set(train) != set(test):
    raise errors.UserError(
      f"folder:{path}: train/ and test/ differ in the classes {sorted(set(train) ^ set(test))}; "
      "give both the same class directories."
    )
  return train, test


def read_images(files: Files, class_names: tuple[str, ...], image_size: int) -> dataset.Split:
  """Reads all files as uint8 (N, image_size, image_size, 3) and labels int32 (N,).

  The labels number `class_names`.

  Raises:
    UserError: an image cannot be read; the message has its path.
  """
  paths = [path for name in class_names for path in files[name]]
  labels = [label for label, name in enumerate(class_names) for _ in files[name]]
  with ThreadPoolExecutor() as pool:  # Pillow decodes and resizes outside the GIL
    images = list(pool.map(partial(_read_image, image_size=image_size), paths))
  return dataset.Split(np.stack(images), np.array(labels, np.int32))


def _class_files(path: Path) -> Files:
  folders = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
  if len(folders) < 2:
    raise errors.UserError(
      f"folder: {path} has the class directories {[p.name for p in folders]}; at least two, "
      "each with images, are needed."
    )
  files = {
    folder.name: sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
    for folder in folders
  }
  empty = [name for name, members in files.items() if not members]
  if empty:
    raise errors.UserError(
      f"folder: {path} has no images ({' '.join(sorted(IMAGE_SUFFIXES))}) for the classes "
      f"{empty}; add some or remove these directories."
    )
  return files


def _hold_out_sixth(files: Files) -> tuple[Files, Files]:
  """Holds out one sixth of the files of each class, but at least one, for testing."""
  train: Files = {}
  test: Files = {}
  for name, members in files.items():
    if len(members) < 2:
      raise errors.UserError(
        f"folder: class {name!r} has {len(members)} image; two are needed, one of them for testing."
      )
    # One generator per class, so that adding images to one class does not change the others.
    order = np.random.default_rng(0).permutation(len(members))
    held = set(order[: max(1, round(len(members) / 6))].tolist())
    train[name] = [path for i, path in enumerate(members) if i not in held]
    test[name] = [path for i, path in enumerate(members) if i in held]
  return train, test


def _read_image(path: Path, *, image_size: int) -> np.ndarray:
  """Reads an image as uint8 (image_size, image_size, 3); the aspect ratio is not kept."""
  try:
    if not path.is_file():
      raise ValueError("it is not a file")  # opening a pipe would wait forever
    with Image.open(path) as file:
      image = _to_rgb(ImageOps.exif_transpose(file))
  except Exception as error:  # Pillow's decoders raise a dozen types for damaged bytes
    reason = errors.shorten(error)
    raise errors.UserError(
      f"folder: the image {path} cannot be read ({reason}); replace or remove it."
    ) from error
  # LANCZOS widens its kernel when it shrinks, so nothing aliases, and it interpolates smoothly when
  # it enlarges, where BOX would repeat pixels.
  return np.asarray(image.resize((image_size, image_size), Image.Resampling.LANCZOS))


def _to_rgb(image: Image.Image) -> Image.Image:
  """Converts an image of any mode to RGB; transparent pixels become white."""
  if image.mode.startswith("I"):
    # Pillow would clip 16-bit gray at 255; the high byte holds the visible image.
    image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
  if image.has_transparency_data:
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
  return image.convert("RGB")
