"""From a data set's name to uint8 arrays and class names."""

import dataclasses
import math
import os
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from flax_cifar.data.augment_arguments import MAX_PIXELS
from flax_cifar.data.dataset import MAX_CLASSES, Dataset, Split, check_split
from flax_cifar.errors import UserError, choose, describe_briefly, get_path, require

SHAPES_TRAIN = 10_000
SHAPES_TEST = 2_000
SHAPES_SEED = 0
SHAPES_SIZE = 128  # pixels; to draw larger ones would take more than 10 GB of memory

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp"})
# Keys of npz archives in use: ours, Keras', and the plain swap of the two words.
NPZ_KEYS = (
  ("train_images", "train_labels", "test_images", "test_labels"),
  ("x_train", "y_train", "x_test", "y_test"),
  ("train_x", "train_y", "test_x", "test_y"),
)


def load_dataset(*, name: str, dir: str, image_size: int) -> Dataset:
  """Loads `cifar10`, `shapes`, `npz:PATH` or `folder:PATH`.

  Args:
    name: one of the four forms; `~` in PATH is the home directory. Of images in a folder, what
      is transparent shows white.
    dir: where CIFAR-10 lies or is downloaded to; "" means TFDS_DATA_DIR, else
      ~/tensorflow_datasets. The other three do not use it.
    image_size: height and width in pixels. `shapes` and `folder:PATH` make images of this
      size; the other two must already have it.

  Returns:
    Dataset with uint8 (N, image_size, image_size, 3) images and int32 (N,) labels.

  Raises:
    UserError: unknown name, missing or damaged data, or images of another size.
  """
  expected = f"from 1 to {MAX_PIXELS} pixels"
  require(1 <= image_size <= MAX_PIXELS, "config.data.image_size", image_size, expected)
  kind, _, path = name.partition(":")
  loader = choose(
    "config.data.name", f"{kind}:PATH" if path and kind in _WITH_PATH else name, _LOADERS
  )
  found = get_path("config.data.name", path)
  try:
    train, test, class_names = loader(path=found, dir=dir, image_size=image_size)
  except OSError as error:  # a folder or file that may not be read
    raise UserError(f"{name} cannot be read ({error}); check its path and permissions.") from error
  return _checked(Dataset(name, train, test, tuple(class_names)), image_size)


def split_validation(train: Split, *, validation_size: int) -> tuple[Split, Split]:
  """Holds out the last `validation_size` examples of a fixed permutation of `train`.

  The permutation depends on the number of examples alone, so every run and every seed holds
  out the same ones.

  Returns:
    (train, validation) of len(train) - validation_size and validation_size examples.

  Raises:
    UserError: `validation_size` is negative or leaves nothing to train on.
  """
  require(
    0 <= validation_size < len(train),
    "config.data.validation_size",
    validation_size,
    f"from 0 to {len(train) - 1} (there are {len(train)} training images)",
  )
  order = np.random.default_rng(0).permutation(len(train))
  kept, held = np.split(order, [len(train) - validation_size])
  return (
    Split(train.images[kept], train.labels[kept]),
    Split(train.images[held], train.labels[held]),
  )


def channel_stats(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
  """Mean and population standard deviation of each channel.

  Both are computed from integer histograms, so they carry one rounding whatever the number
  of images.

  Args:
    images: uint8 (N, H, W, C), N >= 1.

  Returns:
    (mean, std), C floats each, in units where 255 is 1.
  """
  stats = [_histogram_stats(_histogram(images[..., c])) for c in range(images.shape[-1])]
  mean, std = zip(*stats, strict=True)
  return mean, std


def _histogram(values: np.ndarray) -> np.ndarray:
  # bincount first widens its input to int64; blocks that fit the cache halve the time.
  block = 100
  counts = np.zeros(256, np.int64)
  for start in range(0, len(values), block):
    counts += np.bincount(values[start : start + block].ravel(), minlength=256)
  return counts


def _histogram_stats(histogram: np.ndarray) -> tuple[float, float]:
  # Python integers: the difference of two large products below must not overflow or round.
  counts = histogram.tolist()
  n = sum(counts)
  total = sum(value * count for value, count in enumerate(counts))
  squares = sum(value * value * count for value, count in enumerate(counts))
  return total / (255 * n), math.sqrt((n * squares - total * total) / (255 * n) ** 2)


def _checked(dataset: Dataset, image_size: int) -> Dataset:
  """Checks both splits and brings the labels to int32."""
  names = dataset.class_names
  for part, split in (("train", dataset.train), ("test", dataset.test)):
    check_split(split, num_classes=len(names), where=f"{dataset.name} {part}")
    _check_size(split, image_size, where=f"{dataset.name} {part}")
  if len(names) < 2:
    raise UserError(f"{dataset.name}: there is one class only, {names}; at least two are needed.")
  odd = [name for name in names if not name.isprintable()]
  if odd:  # the pictures at a run's end could not show them
    raise UserError(f"{dataset.name}: the class names {odd[:3]} are not printable; rename them.")
  if len(names) > MAX_CLASSES:
    raise UserError(
      f"{dataset.name}: there are {len(names):,} classes; at most {MAX_CLASSES:,} fit."
    )
  train, test = (
    Split(split.images, split.labels.astype(np.int32)) for split in (dataset.train, dataset.test)
  )
  return dataclasses.replace(dataset, train=train, test=test)


def _check_size(split: Split, image_size: int, *, where: str) -> None:
  height, width = split.images.shape[1:3]
  if (height, width) == (image_size, image_size):
    return
  remedy = (
    f"set --config.data.image_size={height}."
    if height == width
    else "make them square, or use folder:PATH, which resizes."
  )
  raise UserError(
    f"{where}: images have {height}x{width} pixels but config.data.image_size={image_size}; "
    + remedy
  )


_Loaded = tuple[Split, Split, tuple[str, ...]]


def _load_cifar10(*, path: Path, dir: str, image_size: int) -> _Loaded:
  del path
  # Lazily: tensorflow_datasets takes most of a second to import.
  from flax_cifar.data.cifar10 import IMAGE_SHAPE, load_cifar10

  require(image_size == IMAGE_SHAPE[0], "config.data.image_size", image_size, "32 for cifar10")
  return load_cifar10(dir=dir)


def _load_shapes(*, path: Path, dir: str, image_size: int) -> _Loaded:
  del path, dir
  expected = f"at most {SHAPES_SIZE} for shapes"
  require(image_size <= SHAPES_SIZE, "config.data.image_size", image_size, expected)
  # Lazily: only this data set needs drawing code.
  from flax_cifar.data.shapes import make_shapes

  train_images, train_labels, test_images, test_labels, class_names = make_shapes(
    num_train=SHAPES_TRAIN, num_test=SHAPES_TEST, image_size=image_size, seed=SHAPES_SEED
  )
  return Split(train_images, train_labels), Split(test_images, test_labels), tuple(class_names)


def _load_npz(*, path: Path, dir: str, image_size: int) -> _Loaded:
  del dir, image_size
  (train_x, train_y, test_x, test_y), names = _read_npz(path)
  train, test = Split(train_x, _flat(train_y)), Split(test_x, _flat(test_y))
  return train, test, names or _number_classes(path, (train.labels, test.labels))


def _read_npz(path: Path) -> tuple[list[np.ndarray], tuple[str, ...]]:
  """The four arrays of one of NPZ_KEYS, and the class names, if any."""
  if not path.is_file():
    raise UserError(f"npz:{path} does not exist; give the path of a numpy .npz archive.")
  try:
    _check_declared_size(path)
    # Pickled objects could run code, so they stay refused.
    with np.load(path, allow_pickle=False) as archive:
      arrays = [_read_array(archive, key) for key in _choose_keys(path, archive.files)]
      if "class_names" not in archive.files:
        return arrays, ()
      return arrays, tuple(_read_array(archive, "class_names").astype(str).ravel().tolist())
  except UserError:
    raise
  except Exception as error:  # zipfile, zlib and numpy raise a dozen types for damaged bytes
    raise UserError(
      f"npz:{path} cannot be read ({describe_briefly(error)}); write it again with numpy.savez, "
      "plain number arrays only."
    ) from error


def _check_declared_size(path: Path) -> None:
  """Compressed zeros take a thousandth of what they unpack to."""
  with zipfile.ZipFile(path) as archive:
    size = sum(member.file_size for member in archive.infolist())
  memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  if size > memory:
    raise UserError(
      f"npz:{path} unpacks to {size / 1e9:,.0f} GB, more than the {memory / 1e9:,.0f} GB of "
      "memory here; give fewer or smaller images."
    )


def _choose_keys(path: Path, names: Sequence[str]) -> tuple[str, ...]:
  keys = next((keys for keys in NPZ_KEYS if all(key in names for key in keys)), None)
  if keys is None:
    raise UserError(
      f"npz:{path} holds {sorted(names)}; it must hold "
      + ", or ".join(" ".join(keys) for keys in NPZ_KEYS)
      + ", and may hold class_names."
    )
  return keys


def _read_array(archive: Mapping[str, Any], key: str) -> np.ndarray:
  array = archive[key]
  if not isinstance(array, np.ndarray):  # numpy gives the bytes of a member that is no array
    raise ValueError(f"{key} is not an array")
  return array


def _flat(labels: np.ndarray) -> np.ndarray:
  """Turns the (N, 1) labels that Keras hands out into (N,)."""
  return labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels


def _number_classes(path: Path, labels: Iterable[np.ndarray]) -> tuple[str, ...]:
  # Other dtypes are refused by check_split, with a message.
  highest = max((int(y.max()) for y in labels if y.size and y.dtype.kind in "iu"), default=0)
  if not 0 <= highest < MAX_CLASSES:
    raise UserError(
      f"npz:{path}: the labels go up to {highest}; number the classes from 0. There may be at most "
      f"{MAX_CLASSES:,}."
    )
  return tuple(str(index) for index in range(highest + 1))


def _load_folder(*, path: Path, dir: str, image_size: int) -> _Loaded:
  del dir
  if not path.is_dir():
    raise UserError(f"folder:{path} is not a directory.")
  train_files, test_files = _folder_files(path)
  class_names = tuple(sorted(train_files))
  train = _read_images(train_files, class_names, image_size)
  return train, _read_images(test_files, class_names, image_size), class_names


_Files = dict[str, list[Path]]


def _folder_files(path: Path) -> tuple[_Files, _Files]:
  """Lists train and test files by class."""
  present = [part for part in ("train", "test") if (path / part).is_dir()]
  if not present:
    return _hold_out_sixth(_class_files(path))
  if len(present) == 1:
    raise UserError(
      f"folder:{path} has {present[0]}/ but not both train/ and test/; add the other one, or "
      "put the class directories directly into it."
    )
  train, test = _class_files(path / "train"), _class_files(path / "test")
  if set(train) != set(test):
    raise UserError(
      f"folder:{path}: train/ and test/ differ in the classes {sorted(set(train) ^ set(test))}; "
      "give both the same class directories."
    )
  return train, test


def _class_files(path: Path) -> _Files:
  folders = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
  if len(folders) < 2:
    raise UserError(
      f"folder: {path} has the class directories {[p.name for p in folders]}; at least two, "
      "each with images, are needed."
    )
  files = {
    folder.name: sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
    for folder in folders
  }
  empty = [name for name, members in files.items() if not members]
  if empty:
    raise UserError(
      f"folder: {path} has no images ({' '.join(sorted(IMAGE_SUFFIXES))}) for the classes "
      f"{empty}; add some or remove these directories."
    )
  return files


def _hold_out_sixth(files: _Files) -> tuple[_Files, _Files]:
  train: _Files = {}
  test: _Files = {}
  for name, members in files.items():
    if len(members) < 2:
      raise UserError(
        f"folder: class {name!r} has {len(members)} image; two are needed, one of them to test."
      )
    # A generator per class: adding images to one class leaves the others' split alone.
    order = np.random.default_rng(0).permutation(len(members))
    held = set(order[: max(1, round(len(members) / 6))].tolist())
    train[name] = [path for i, path in enumerate(members) if i not in held]
    test[name] = [path for i, path in enumerate(members) if i in held]
  return train, test


def _read_images(files: _Files, class_names: tuple[str, ...], image_size: int) -> Split:
  paths = [path for name in class_names for path in files[name]]
  labels = [label for label, name in enumerate(class_names) for _ in files[name]]
  with ThreadPoolExecutor() as pool:  # Pillow decodes and resizes outside the GIL
    images = list(pool.map(partial(_read_image, image_size=image_size), paths))
  return Split(np.stack(images), np.array(labels, np.int32))


def _read_image(path: Path, *, image_size: int) -> np.ndarray:
  """Reads an image as uint8 (image_size, image_size, 3); the aspect ratio is not kept."""
  try:
    if not path.is_file():
      raise ValueError("it is no file")  # to open a pipe would wait for ever
    with Image.open(path) as file:
      image = _to_rgb(ImageOps.exif_transpose(file))
  except Exception as error:  # Pillow's decoders raise a dozen types for damaged bytes
    reason = describe_briefly(error)
    raise UserError(
      f"folder: the image {path} cannot be read ({reason}); replace or remove it."
    ) from error
  # LANCZOS widens its kernel when it shrinks, so nothing aliases, and interpolates smoothly
  # when it enlarges; BOX would repeat pixels there.
  return np.asarray(image.resize((image_size, image_size), Image.Resampling.LANCZOS))


def _to_rgb(image: Image.Image) -> Image.Image:
  """Any mode as RGB; what is transparent shows white."""
  if image.mode.startswith("I"):
    # Pillow clips 16-bit grey at 255; the high byte is the picture.
    image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
  if image.has_transparency_data:
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
  return image.convert("RGB")


_LOADERS: dict[str, Callable[..., _Loaded]] = {
  "cifar10": _load_cifar10,
  "shapes": _load_shapes,
  "npz:PATH": _load_npz,
  "folder:PATH": _load_folder,
}
_WITH_PATH = ("npz", "folder")
