"""Files that are written whole or not at all, and locks that end with their process."""

import contextlib
import fcntl
import hashlib
import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import IO, Any


@contextlib.contextmanager
def replace(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields a path to write to; what is there at the end takes the place of `path`.

  If the block raises, `path` stays as it was.
  """
  part = path.with_name(f".{path.name}.{os.getpid()}.part")  # other processes may write it too
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
  """Writes `content` as indented JSON, see `encode_json`, whole or not at all."""
  write_text(path, encode_json(content, indent=2) + "\n")


def encode_json(content: Any, *, indent: int | None = None) -> str:
  """`content` as JSON, which has no numbers that are not finite: they become null.

  >>> encode_json({"loss": float("nan"), "accuracy": [0.5, 0.25]})
  '{"loss": null, "accuracy": [0.5, 0.25]}'
  """
  return json.dumps(_finite_or_none(content), indent=indent, allow_nan=False)


def _finite_or_none(content: Any) -> Any:
  if isinstance(content, Mapping):
    return {key: _finite_or_none(value) for key, value in content.items()}
  if isinstance(content, list | tuple):
    return [_finite_or_none(value) for value in content]
  return None if isinstance(content, float) and not math.isfinite(content) else content


def digest(path: pathlib.Path) -> str:
  """The SHA-256 of the file at `path`, in hexadecimal digits."""
  with path.open("rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


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
