"""Downloads and prepares a data set, once, however many processes ask for it at a time."""

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from flax_cifar import files
from flax_cifar.data.sources import published


@contextlib.contextmanager
def lock(source: published.Source, root: Path) -> Iterator[None]:
  """Waits for other processes that download or prepare the data, and holds the lock meanwhile.

  The kernel releases the lock of a process that dies. The function goes on without a lock where
  none can be taken, because `root` is read-only or on a cluster's file system. Where no data come
  of it, nothing is left behind in `root`, which may be a misspelled path.
  """
  place = root / source.place
  created = [folder for folder in (place, *place.parents) if not folder.exists()]
  lock_file = root / f"{source.name}.lock"
  with contextlib.ExitStack() as stack:
    with contextlib.suppress(OSError):
      while not _take(lock_file, source, stack):
        pass
    stack.callback(_remove_empty, lock_file, created)  # while the lock is held
    yield


def _take(lock_file: Path, source: published.Source, stack: contextlib.ExitStack) -> bool:
  """Locks the file, and says whether it is still there: its last holder may have removed it."""
  root = lock_file.parent
  root.mkdir(parents=True, exist_ok=True)
  file = stack.enter_context(lock_file.open("a"))
  if not files.lock(file, wait=False):
    report(f"Waiting for another process to download or prepare {source.title} in {root}.")
    files.lock(file, wait=True)
  return lock_file.exists() and os.path.samestat(os.fstat(file.fileno()), lock_file.stat())


def _remove_empty(lock_file: Path, created: Sequence[Path]) -> None:
  """Removes the folders that stayed empty, deepest first, and the lock file if it is alone."""
  root = lock_file.parent
  below = [folder for folder in created if root in folder.parents]
  for folder in below:
    with contextlib.suppress(OSError):  # it was not made, or holds something
      folder.rmdir()
  with contextlib.suppress(OSError):
    if list(root.iterdir()) == [lock_file]:
      lock_file.unlink()
    for folder in created[len(below) :]:
      folder.rmdir()


def read_published(source: published.Source, root: Path) -> published.Splits:
  """Reads the files of `source` that lie below `root`, and downloads what is missing.

  Raises:
    UserError: a file is damaged, or cannot be downloaded or written.
  """
  if path := source.find_other_form(root):
    return source.read(path)
  # Imported here, because it is needed once: requests takes a third of a second.
  from flax_cifar.data.sources import download

  return source.read(*download.download_missing(source, root))


def prepare(source: published.Source, splits: published.Splits, root: Path) -> Path:
  """Writes `splits` below `root`, as TFDS would; returns the folder.

  Raises:
    OSError: the folder exists already, or `root` cannot be written to.
  """
  from flax_cifar.data.sources import tfds_writer

  report(f"Preparing {source.title} in {root / source.name}, once; half a minute or more.")
  return tfds_writer.prepare(source, splits, data_dir=root)


def report(message: str) -> None:
  """Prints `message` where it does not mix with results."""
  print(message, file=sys.stderr, flush=True)
