"""Prepared data decoded, in the user's cache: 60,000 PNGs would take seconds of every start.

The prepared files are often where a user may not write, so the arrays are not kept beside them.
"""

import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np

from flax_cifar import environment, errors, files
from flax_cifar.data import dataset

VERSION = 1  # of the files, and of the order of the examples
DESCRIPTION = "content.json"
ARRAYS = ("train_images.npy", "train_labels.npy", "test_images.npy", "test_labels.npy")
Splits = tuple[dataset.Split, dataset.Split]


def load_or_decode(folder: pathlib.Path, decode: Callable[[], Splits], *, form: str) -> Splits:
  """The training and test split that `decode` makes of the files in `folder`.

  They are kept in the cache, and read from there as long as no file in `folder` has another name,
  size or time; a digest finds damage. Arrays from the cache are memory-mapped and read-only.

  Args:
    folder: of the files.
    decode: reads them.
    form: keeps apart what several functions make of the same files.

  Raises:
    UserError: see `decode`.
  """
  cache = environment.find_cache("data")
  if not cache:
    return decode()
  name = hashlib.sha256(os.fsencode(folder.resolve()) + form.encode()).hexdigest()[:16]
  place = pathlib.Path(cache, name)
  source = _describe(folder)
  return _read(place, source) or _keep(place, source, decode())


def _describe(folder: pathlib.Path) -> list[Any]:
  """Returns a list that changes when a file of `folder` changes."""
  paths = sorted(path for path in folder.iterdir() if path.is_file())
  stats = [(path.name, path.stat()) for path in paths]
  return [VERSION, *([name, stat.st_size, stat.st_mtime_ns] for name, stat in stats)]


def _read(place: pathlib.Path, source: list[Any]) -> Splits | None:
  """The splits at `place`; None unless they are whole and of `source`."""
  try:
    content = json.loads((place / DESCRIPTION).read_text(encoding="utf-8"))
    if content["source"] != source:
      return None
    arrays = [_map(place / name) for name in ARRAYS]
    if [_digest(array) for array in arrays] != content["sha256"]:
      return None
  except (OSError, ValueError, KeyError, TypeError):  # missing, cut or of another program
    return None
  return dataset.Split(*arrays[:2]), dataset.Split(*arrays[2:])


def _keep(place: pathlib.Path, source: list[Any], splits: Splits) -> Splits:
  """Writes the splits to `place`, the description last; returns them."""
  arrays = [array for split in splits for array in (split.images, split.labels)]
  try:
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place) as own:  # another process may keep them too
      for name, array in zip(ARRAYS, arrays, strict=True):
        np.save(pathlib.Path(own, name), array)
        os.replace(pathlib.Path(own, name), place / name)
    content = {"source": source, "sha256": [_digest(array) for array in arrays]}
    files.write_json(place / DESCRIPTION, content)
  except OSError as error:
    errors.warn(f"the data are not kept decoded in {str(place)!r} ({error}); starts take longer")
  return splits


def _map(path: pathlib.Path) -> np.ndarray:
  return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))


def _digest(array: np.ndarray) -> str:
  return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()
