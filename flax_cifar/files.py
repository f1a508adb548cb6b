"""Files that are written whole or not at all, and locks that end with their process."""

import contextlib
import fcntl
import json
import os
import pathlib
from collections.abc import Iterator
from typing import IO, Any


@contextlib.contextmanager
def replace(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields a path to write to; what is there at the end takes the place of `path`.

  If the block raises, `path` stays as it was.
  """
  part = path.with_suffix(".part")
  try:
    yield part
    os.replace(part, path)
  except BaseException:
    with contextlib.suppress(OSError):
      part.unlink()
    raise


def write_text(path: pathlib.Path, text: str) -> None:
  """Writes `text` as UTF-8, whole or not at all."""
  with replace(path) as part:
    part.write_text(text, encoding="utf-8")


def write_bytes(path: pathlib.Path, content: bytes) -> None:
  """Writes `content` whole or not at all."""
  with replace(path) as part:
    part.write_bytes(content)


def write_json(path: pathlib.Path, content: Any) -> None:
  """Writes `content` as indented JSON, whole or not at all."""
  write_text(path, json.dumps(content, indent=2) + "\n")


def lock(file: IO[Any], *, wait: bool) -> bool:
  """Locks an open file for this process; the kernel ends the lock when the file is closed.

  Args:
    file: open for writing.
    wait: whether to wait while another process holds the lock.

  Returns:
    Whether this process has the lock now.

  Raises:
    OSError: the file system has no locks.
  """
  try:
    fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
  except BlockingIOError:
    return False
  return True
