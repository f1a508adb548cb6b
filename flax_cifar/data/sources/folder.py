"""Data sets that are folders of images, one folder per class."""

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from flax_cifar import errors
from flax_cifar.data import dataset

# The formats that Pillow decodes by itself. Of the others, EPS starts Ghostscript and WMF needs a
# handler of the system. A file may have any of them, whatever its name says.
FORMATS = (
  *("AVIF", "BLP", "BMP", "CUR", "DCX", "DDS", "DIB", "FITS", "FLI", "FTEX", "GIF", "ICNS", "ICO"),
  *("IM", "JPEG", "JPEG2000", "MPO", "MSP", "PCX", "PNG", "PPM", "PSD", "QOI", "SGI", "SPIDER"),
  *("SUN", "TIFF", "WEBP", "XBM", "XPM"),
)
UNSIGNED_FORMATS = ("TGA",)  # it has no signature: only the suffix tells
# Folders of splits, in any case. A folder of such a name that holds no folders is a class.
SPLIT_NAMES = {
  "train": ("train", "training"),
  "validation": dataset.VALIDATION_NAMES,
  "test": ("test", "testing"),
}
ORIENTATION = 0x112  # tag of EXIF
TURNS = {
  2: Image.Transpose.FLIP_LEFT_RIGHT,
  3: Image.Transpose.ROTATE_180,
  4: Image.Transpose.FLIP_TOP_BOTTOM,
  5: Image.Transpose.TRANSPOSE,
  6: Image.Transpose.ROTATE_270,
  7: Image.Transpose.TRANSVERSE,
  8: Image.Transpose.ROTATE_90,
}
DEEP_MODES = ("I;16", "I;16L", "I;16B", "I", "F")  # gray of more than 8 bits
TOPS = (1, 255, 4095, 65535)  # white of floats, and of 8, 12 and 16 bits

MAX_NAMED = 20  # images in a message

Files = dict[str, list[Path]]  # the files of each class


class DeepImage(NamedTuple):
  """A gray image of more than 8 bits, resized: float32 (H, W), and its largest value before."""

  values: np.ndarray
  largest: float


def load_folder(path: Path, image_size: int) -> dataset.Dataset:
  """Loads PATH/SPLIT/CLASS/..., or PATH/CLASS/... of which a sixth of each class is for testing.

  Splits are train, test and perhaps val (see SPLIT_NAMES). Folders within a class belong to it.
  Files whose name starts with a dot are passed over; a warning names others that are no images.

  Args:
    path: the folder.
    image_size: height and width that the images are resized to, in pixels; the aspect ratio is not
      kept.

  Raises:
    UserError: a split is missing, or the splits differ in their classes; there are fewer than two
      classes, a class without images, or one with too few to hold one out; or images cannot be
      read, of which the message has the paths.
  """
  if not path.is_dir():
    raise errors.UserError(f"folder:{path} is not a directory.")
  folders = _find_split_folders(path)
  if folders:
    parts = {part: _list_classes(found) for part, found in folders.items()}
    _check_classes(path, parts)
  else:
    parts = dict(zip(("train", "test"), _hold_out_sixth(_list_classes(path)), strict=True))
  _warn_of_left_out(path, parts)
  class_names = tuple(sorted(parts["train"]))
  splits = _read_splits(path, parts, class_names, image_size)
  return dataset.Dataset(**splits, class_names=class_names, test_is_held_out=not folders)


def list_images(path: Path) -> list[Path]:
  """The file `path`, or the images in the folder `path` and in those below it, sorted.

  Raises:
    UserError: there is nothing at `path`, or no image in it.
  """
  if not path.is_dir():
    if not path.exists():
      raise errors.UserError(f"{str(path)!r} does not exist; name an image or a folder of images.")
    return [path]
  found = sorted(filter(_is_image, _walk(path)))
  if not found:
    raise errors.UserError(f"{str(path)!r} has no images (png, jpg, ...); name another folder.")
  return found


def read_images(paths: Sequence[Path], image_size: int) -> np.ndarray:
  """Reads images of any size and format as uint8 (N, image_size, image_size, 3).

  A warning tells which value of gray images of more than 8 bits became white, because a network may
  have been trained with another one.

  Raises:
    UserError: some cannot be read; the message has their paths and the reasons.
  """
  images = _read_images(Path(), paths, image_size)
  if deep := [image for image in images if isinstance(image, DeepImage)]:
    errors.warn(
      f"{len(deep)} images have more than 8 bits; {_find_top(deep):g} is taken as their white. "
      "Save them with 8 bits if it was another value in the training images."
    )
  return np.stack(_convert_deep(images))


# ---- Files


def _find_split_folders(path: Path) -> dict[str, Path]:
  """Returns the folder of each split; {} where `path` holds the classes themselves."""
  found: dict[str, Path] = {}
  for part, names in SPLIT_NAMES.items():
    folders = [p for p in _list_folders(path) if p.name.lower() in names and _list_folders(p)]
    if len(folders) > 1:
      raise errors.UserError(
        f"folder:{path} has {' and '.join(p.name + '/' for p in folders)} for one split; keep one."
      )
    if folders:
      found[part] = folders[0]
  if found and not {"train", "test"} <= found.keys():
    if all(map(_has_images, found.values())):  # a class of that name, with folders of its own
      return {}
    shown = " and ".join(f"{folder.name}/" for folder in found.values())
    raise errors.UserError(
      f"folder:{path} has {shown} but not both train/ and test/; add the other one, or put the "
      "class directories directly into it."
    )
  return found


def _check_classes(path: Path, parts: Mapping[str, Files]) -> None:
  for part in parts.keys() - {"train"}:
    if different := set(parts["train"]) ^ set(parts[part]):
      raise errors.UserError(
        f"folder:{path}: train and {part} differ in the classes {sorted(different)}; give both the "
        "same class directories."
      )


def _list_classes(path: Path) -> Files:
  folders = _list_folders(path)
  if len(folders) < 2:
    raise errors.UserError(
      f"folder: {path} has the class directories {[p.name for p in folders]}; at least two, "
      "each with images, are needed: CLASS/IMAGE, or train/CLASS/IMAGE and test/CLASS/IMAGE."
    )
  files = {folder.name: sorted(filter(_is_image, _walk(folder))) for folder in folders}
  empty = [name for name, members in files.items() if not members]
  if empty:
    raise errors.UserError(
      f"folder: {path} has no images (png, jpg, ...) for the classes {empty}; add some or remove "
      "these directories."
    )
  return files


def _list_folders(path: Path) -> list[Path]:
  return sorted(p for p in path.iterdir() if p.is_dir() and not _is_hidden(p.name))


def _is_hidden(name: str) -> bool:
  """Whether a file or folder is not the user's: those of macOS, Jupyter and version control."""
  return name.startswith(".") or name == "__MACOSX"


def _has_images(path: Path) -> bool:
  return any(_is_image(p) for p in path.iterdir() if p.is_file() and not _is_hidden(p.name))


def _is_image(path: Path) -> bool:
  return path.suffix.lower() in _suffixes()


@cache
def _suffixes() -> dict[str, str]:
  """The suffixes of all formats that are read, with the format of each."""
  formats = (*FORMATS, *UNSIGNED_FORMATS)
  registered = Image.registered_extensions()  # loads all of Pillow's formats
  return {suffix: format for suffix, format in registered.items() if format in formats}


def _walk(path: Path) -> Iterator[Path]:
  """Yields the files below `path`, through links too, each folder once.

  Raises:
    OSError: a folder cannot be read.
  """

  def fail(error: OSError) -> None:
    raise error

  seen = set()
  for folder, names, files in os.walk(path, onerror=fail, followlinks=True):
    names[:] = [name for name in names if not _is_hidden(name)]
    real = os.path.realpath(folder)
    if real in seen:  # a link that leads back
      names.clear()
      continue
    seen.add(real)
    yield from (Path(folder, name) for name in files if not _is_hidden(name))


def _warn_of_left_out(path: Path, parts: Mapping[str, Files]) -> None:
  used = {file for files in parts.values() for members in files.values() for file in members}
  left_out = sorted(str(file.relative_to(path)) for file in _walk(path) if file not in used)
  if left_out:
    errors.warn(
      f"folder:{path}: left out {len(left_out)} files that are no images or lie outside the class "
      f"directories: {errors.list_some(left_out)}"
    )


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


# ---- Images


def _read_splits(
  root: Path, parts: Mapping[str, Files], class_names: tuple[str, ...], image_size: int
) -> dict[str, dataset.Split]:
  """Reads uint8 images (N, image_size, image_size, 3) and labels int32 (N,) of each split."""
  paths = {part: [p for name in class_names for p in files[name]] for part, files in parts.items()}
  read = _read_images(root, [p for found in paths.values() for p in found], image_size)
  images = iter(_convert_deep(read))
  splits = {}
  for part, files in parts.items():
    labels = [label for label, name in enumerate(class_names) for _ in files[name]]
    stacked = np.stack([next(images) for _ in labels])
    splits[part] = dataset.Split(stacked, np.array(labels, np.int32))
  return splits


def _read_images(
  root: Path, paths: Sequence[Path], image_size: int
) -> list[np.ndarray | DeepImage]:
  """Reads images uint8 (image_size, image_size, 3) or deep, or names all that cannot be read."""
  with ThreadPoolExecutor() as pool:  # Pillow decodes and resizes outside the GIL
    results = list(pool.map(partial(_try_to_read, image_size=image_size), paths))
  failures = [
    f"{path.relative_to(root) if path.is_relative_to(root) else path} ({result})"
    for path, result in zip(paths, results, strict=True)
    if isinstance(result, str)
  ]
  if failures:
    where = f"folder:{root}: " if root != Path() else ""
    raise errors.UserError(
      f"{where}{len(failures)} of {len(paths)} images cannot be read; replace or remove "
      f"{errors.list_some(failures, MAX_NAMED)}."
    )
  return [result for result in results if not isinstance(result, str)]


def _try_to_read(path: Path, *, image_size: int) -> np.ndarray | DeepImage | str:
  """Reads an image, or returns the reason why it cannot be read."""
  try:
    return _read_image(path, image_size)
  except UnidentifiedImageError:
    return "it is in none of the formats that are read"
  except Exception as error:  # Pillow's decoders raise a dozen types for damaged bytes
    return errors.shorten(error)


def _read_image(path: Path, image_size: int) -> np.ndarray | DeepImage:
  """Reads an image as uint8 (image_size, image_size, 3), or as a DeepImage."""
  if not path.is_file():
    raise ValueError("it is not a file")  # opening a pipe would wait forever
  by_suffix = _suffixes().get(path.suffix.lower())
  formats = [format for format in (*FORMATS, by_suffix) if format in Image.OPEN]
  with Image.open(path, formats=formats) as file:
    file.load()
    is_deep = file.mode in DEEP_MODES
    image = _to_gray_floats(file) if is_deep else _to_rgb(file)
    turn = TURNS.get(_get_orientation(file))
  # LANCZOS widens its kernel when it shrinks, so nothing aliases, and it interpolates smoothly when
  # it enlarges, where BOX would repeat pixels.
  resized = image.resize((image_size, image_size), Image.Resampling.LANCZOS)
  pixels = np.asarray(resized.transpose(turn) if turn is not None else resized)
  return DeepImage(pixels, float(np.asarray(image).max())) if is_deep else pixels


def _get_orientation(image: Image.Image) -> int:
  """The EXIF orientation; 1, upright, where the metadata cannot be read."""
  try:
    orientation = image.getexif().get(ORIENTATION, 1)
  except Exception:  # odd metadata raise a dozen types
    return 1
  return orientation if isinstance(orientation, int) else 1


def _to_rgb(image: Image.Image) -> Image.Image:
  """Converts an image of 8 bits to RGB; transparent pixels become white."""
  if image.has_transparency_data:
    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
  return image.convert("RGB")


def _to_gray_floats(image: Image.Image) -> Image.Image:
  values = np.asarray(image).astype(np.float32)
  if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= TOPS[-1]):
    raise ValueError(
      f"its values lie in {values.min():g}..{values.max():g}; save it with 8 or 16 bits"
    )
  return Image.fromarray(values)


def _convert_deep(images: list[np.ndarray | DeepImage]) -> list[np.ndarray]:
  """Scales deep images to uint8 (H, W, 3) by the bits that all of them use."""
  top = _find_top([image for image in images if isinstance(image, DeepImage)])
  return [
    _to_uint8(image.values, top) if isinstance(image, DeepImage) else image for image in images
  ]


def _find_top(images: Sequence[DeepImage]) -> float:
  """The white of deep images: a file of 16 bits often holds 8 or 12, and floats end at 1."""
  largest = max((image.largest for image in images), default=0.0)
  return next(top for top in TOPS if largest <= top)


def _to_uint8(values: np.ndarray, top: float) -> np.ndarray:
  gray = np.rint(np.clip(values, 0, top) * (255 / top)).astype(np.uint8)
  return np.repeat(gray[..., None], 3, axis=-1)
