"""A data set as its authors publish it: its files, their checksums, and how they are read."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

from flax_cifar import errors
from flax_cifar.data import dataset

Splits = tuple[dataset.Split, dataset.Split]  # training and test


@dataclasses.dataclass(frozen=True)
class File:
  """A file that is downloaded.

  Attributes:
    name: its name, here and there.
    size: in bytes.
    algorithm: of the checksum, a name of hashlib.
    checksum: in hexadecimal digits.
    urls: where it is, in the order of trying.
    own_url: environment variable with a URL that is tried first; "" for none.
  """

  name: str
  size: int
  algorithm: str
  checksum: str
  urls: tuple[str, ...]
  own_url: str

  def is_at(self, path: Path) -> bool:
    """Whether the file at `path` has the checksum."""
    make = functools.partial(hashlib.new, self.algorithm, usedforsecurity=False)
    with path.open("rb") as file:
      return hashlib.file_digest(file, make).hexdigest() == self.checksum


@dataclasses.dataclass(frozen=True)
class Source:
  """A data set that can be downloaded and prepared.

  Attributes:
    name: the name that TFDS has for it.
    title: its name in messages.
    version: that TFDS prepares.
    image_size: height and width of its images, in pixels.
    place: the folder of its files, below the root of TFDS data sets.
    files: what is downloaded.
    other_forms: archives and folders that are read in place of `files`, without a checksum.
    disk_bytes: needed for the files, and for the prepared data set twice while it is renamed.
    names: the class names that TFDS takes from the files, by feature.
    id_digits: digits of the numbers in the feature `id`; 0 where TFDS has no such feature.
    read: returns the training and test split of the paths of all files, in the order of `files`,
      or of the path of one of `other_forms`; it may raise anything for damaged ones.
  """

  name: str
  title: str
  version: str
  image_size: int
  place: str
  files: tuple[File, ...]
  other_forms: tuple[str, ...]
  disk_bytes: int
  names: Mapping[str, tuple[str, ...]]
  id_digits: int
  read: Callable[..., Splits]

  def find_missing(self, root: Path) -> list[File]:
    """Returns those of `files` that are not below `root`."""
    return [file for file in self.files if not (root / self.place / file.name).is_file()]

  def find_other_form(self, root: Path) -> Path | None:
    """Returns one of `other_forms` in `root` or in the folders of TFDS below it."""
    folders = (root, root / "downloads", root / "downloads" / "manual")
    paths = (folder / name for folder in folders for name in self.other_forms)
    # Not a pipe of that name: reading it would wait forever.
    return next((path for path in paths if path.is_file() or path.is_dir()), None)


def explain_damage(path: Path, title: str, file: File, reason: object) -> errors.UserError:
  """The error for a damaged `path`, in whose place a good copy of `file` would do."""
  return errors.UserError(
    f"{path} is damaged or not {title} ({errors.shorten(reason)}); delete it and run again to "
    f"download it, or put a good copy there ({file.algorithm} of {file.name}: {file.checksum})."
  )
