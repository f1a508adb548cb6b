"""Any data set that TensorFlow Datasets has prepared with the features `image` and `label`."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from flax_cifar import errors
from flax_cifar.data import dataset
from flax_cifar.data.sources import catalog, decoded, preparation

# NAME or NAME/CONFIG, and no path that leads elsewhere.
NAME = re.compile(r"[a-z][a-z0-9_]*(/[\w.+-]*[\w+-][\w.+-]*)?", flags=re.ASCII)
VERSION = re.compile(r"\d+\.\d+\.\d+")


def load_prepared(name: str, *, dir: str) -> dataset.Dataset:
  """Loads `<dir>/NAME/VERSION`, or `<dir>/NAME/CONFIG/VERSION` for the name NAME/CONFIG.

  The newest version counts. Where there is none, a data set of the catalog is downloaded and
  prepared, as TFDS would. Gray images become RGB. The splits `train` and `test` are needed;
  `validation` is used where there is one. The classes are called by `label.labels.txt`, or "0",
  "1", ... up to the highest label.

  Args:
    name: of the data set, such as `mnist`.
    dir: root of TFDS data sets; "" means TFDS_DATA_DIR, else ~/tensorflow_datasets.

  Returns:
    Dataset with uint8 (N, H, W, 3) images of one size.

  Raises:
    UserError: it is not prepared and cannot be, or it is damaged, in another format than
      array_record and tfrecord, lacks a split or a feature, or its images differ in size.
  """
  root = find_root(dir)
  if not NAME.fullmatch(name):
    raise errors.UserError(
      f"data.name='tfds:{name}' is no name of a data set; write tfds:NAME or tfds:NAME/CONFIG, as "
      "tfds:mnist."
    )
  folder = find_newest(root / name) or _prepare(name, root)
  return _load_decoded(name, folder) if name in catalog.CATALOG else read_folder(name, folder)


def _load_decoded(name: str, folder: Path) -> dataset.Dataset:
  """`read_folder` for a data set of the catalog, whose two splits are kept decoded in the cache."""

  def decode() -> decoded.Splits:
    found = read_folder(name, folder)
    return found.train, found.test

  train, test = decoded.load_or_decode(folder, decode, form="as prepared")
  highest = max(int(split.labels.max()) for split in (train, test))
  return dataset.Dataset(train, test, read_names(folder, highest))


def _prepare(name: str, root: Path) -> Path:
  """Downloads and prepares a data set of the catalog; returns its folder."""
  if name not in catalog.CATALOG:
    raise errors.UserError(
      f"data.name='tfds:{name}' is not prepared in {str(root)!r}; {catalog.advise(name, root)}."
    )
  source = catalog.CATALOG[name]
  with preparation.lock(source, root):
    if folder := find_newest(root / name):  # by the process that held the lock before
      return folder
    splits = preparation.read_published(source, root)
    try:
      return preparation.prepare(source, splits, root)
    except OSError as error:
      raise errors.UserError(
        f"data.name='tfds:{name}' cannot be prepared in {str(root)!r} ({error}); make room or "
        "choose another data.dir (--data_dir of a tool, or TFDS_DATA_DIR)."
      ) from error


def find_root(dir: str) -> Path:
  """The root of TFDS data sets: `dir`, or for "" TFDS_DATA_DIR, else ~/tensorflow_datasets."""
  asked = dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
  return errors.get_path("data.dir (or TFDS_DATA_DIR)", asked)


def find_newest(place: Path, version: re.Pattern[str] = VERSION) -> Path | None:
  """Returns the newest complete `version` in the folder of a data set, or None."""
  infos = place.glob("*/dataset_info.json")
  folders = [info.parent for info in infos if version.fullmatch(info.parent.name)]
  return max(folders, key=lambda folder: [int(n) for n in folder.name.split(".")], default=None)


def read_folder(name: str, folder: Path) -> dataset.Dataset:
  """Reads the prepared `folder` of the data set `name`, or NAME/CONFIG; see `load_prepared`."""
  # Imported here: tensorflow_datasets takes most of a second to import.
  from flax_cifar.data.sources import tfds_files

  file = folder / "dataset_info.json"
  try:
    info = tfds_files.read_info(name.partition("/")[0], folder)
    shards = {split: tfds_files.list_shards(folder, info.splits[split]) for split in info.splits}
  except Exception as error:  # TFDS raises many types for damaged JSON
    raise tfds_files.explain_damage(name, folder, file, error) from error
  if missing := {"train", "test"} - shards.keys():
    lacking = " and ".join(sorted(missing))
    if name in catalog.CATALOG:  # whose data sets have both
      raise tfds_files.explain_damage(name, folder, file, f"it lacks the splits {lacking}")
    found = ", ".join(sorted(shards))
    raise errors.UserError(
      f"{folder} has the splits {found} and lacks {lacking}; both train and test are needed."
    )
  read, decode = tfds_files.get_reader(folder, info), tfds_files.decode_record
  splits = {
    split: _join(folder, split, tfds_files.read_shards(name, folder, shards[split], read, decode))
    for split in ("train", "test", "validation")
    if split in shards
  }
  highest = max(int(split.labels.max()) for split in splits.values())
  return dataset.Dataset(
    splits["train"], splits["test"], read_names(folder, highest), splits.get("validation")
  )


def _join(folder: Path, split: str, examples: Sequence[tuple[np.ndarray, int]]) -> dataset.Split:
  sizes = sorted({image.shape[:2] for image, _ in examples})
  if len(sizes) != 1:
    shown = ", ".join(f"{height}x{width}" for height, width in sizes[:3]) or "none"
    raise errors.UserError(
      f"{folder} {split}: images of one size are needed, and there are {len(sizes)} sizes "
      f"({shown}); use folder:PATH, which resizes."
    )
  images, labels = zip(*examples, strict=True)
  return dataset.Split(np.stack(images), np.array(labels, np.int64))


def read_names(folder: Path, highest: int) -> tuple[str, ...]:
  """The class names of a prepared folder; numbers where it has none.

  Raises:
    UserError: the file of the names is damaged, or lacks names of labels; or there is no file, and
      the labels are more than `dataset.number_classes` takes.
  """
  file = folder / "label.labels.txt"
  if not file.exists():
    return dataset.number_classes(str(folder), highest)
  try:
    names = tuple(file.read_text(encoding="utf-8").splitlines())
  except (OSError, ValueError) as error:
    raise errors.UserError(
      f"{file} cannot be read ({errors.shorten(error)}); delete {folder} and prepare it again."
    ) from error
  if len(names) <= highest:
    raise errors.UserError(
      f"{file} has {len(names)} names, and there are labels up to {highest}; delete {folder} and "
      "prepare it again."
    )
  return names
