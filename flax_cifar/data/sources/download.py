"""Downloads the files of a data set from their mirrors, resumes the downloads and checks them."""

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import requests
from rich.console import Console
from rich.progress import DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from flax_cifar import errors
from flax_cifar.data.sources import published

CHUNK_BYTES = 1 << 18
CONNECT_SECONDS, READ_SECONDS = 5, 30


def download_missing(source: published.Source, root: Path) -> list[Path]:
  """Downloads the files of `source` that are not yet below `root`, and checks all of them.

  Returns:
    The paths of the files, in their order.

  Raises:
    UserError: a file that is there has another checksum, or see `download_file`.
  """
  folder = root / source.place
  missing = source.find_missing(root)
  for file in source.files:
    if file not in missing and not file.is_at(folder / file.name):
      reason = f"its {file.algorithm} is another"
      raise published.explain_damage(folder / file.name, source.title, file, reason)
  for file in missing:
    download_file(source, file, root)
  return [folder / file.name for file in source.files]


def download_file(source: published.Source, file: published.File, root: Path) -> Path:
  """Downloads `file` to the place of `source` below `root` from the first mirror that has it.

  The URL in the file's environment variable, if any, comes first. An interrupted download is
  resumed.

  Returns:
    The path of the file, whose checksum is right.

  Raises:
    UserError: `root` is not writable or has too little space, or every mirror failed. The message
      then gives the reason of each mirror and three remedies.
  """
  folder = root / source.place
  _check_room(source, root)
  part = folder / f"{file.name}.part"
  own_mirror = os.environ.get(file.own_url)
  reasons = []
  for url in (*([own_mirror] if own_mirror else []), *file.urls):
    try:
      if not _is_complete(file, part):
        _fetch(url, source.title, file, part)
        if not _is_complete(file, part):
          part.unlink(missing_ok=True)  # the next mirror must not continue it
          raise _MirrorError("wrong checksum or size")
      return part.replace(folder / file.name)
    except (
      requests.RequestException,
      _MirrorError,
      ValueError,
    ) as error:  # ValueError: some of urllib3
      reasons.append(f"{_find_host(url)}: {_brief(error)}")
    except OSError as error:
      raise errors.UserError(
        f"{part} cannot be written ({error}); make room or choose another data.dir."
      ) from error
  raise _no_data(source, root, reasons)


def _check_room(source: published.Source, root: Path) -> None:
  folder = root / source.place
  remedy = "choose another data.dir (--data_dir of a tool, or TFDS_DATA_DIR)."
  try:
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
  except OSError as error:
    raise errors.UserError(
      f"The data directory {folder} cannot be made ({error}); {remedy}"
    ) from error
  if not os.access(folder, os.W_OK):
    raise errors.UserError(f"The data directory {folder} cannot be written to; {remedy}")
  missing = source.find_missing(root)
  parts = [folder / f"{file.name}.part" for file in missing]
  present = sum(file.size for file in source.files if file not in missing)
  present += sum(part.stat().st_size for part in parts if part.exists())
  needed = source.disk_bytes - present
  if free < needed:
    raise errors.UserError(
      f"{folder} has {free / 1e6:.0f} MB free but {source.title} needs {needed / 1e6:.0f} MB; "
      f"make room or {remedy}"
    )


def _is_complete(file: published.File, part: Path) -> bool:
  """Whether `part` is the whole file; deletes it if it is large enough but wrong."""
  if not part.exists() or part.stat().st_size < file.size:
    return False
  if file.is_at(part):
    return True
  part.unlink()
  return False


def _fetch(url: str, title: str, file: published.File, part: Path) -> None:
  """Downloads the rest of `part` from `url`, or all of it if the server cannot resume."""
  have = part.stat().st_size if part.exists() else 0
  # Without "identity", requests would unpack the archive of a server that declares it as gzip.
  headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
  timeout = (CONNECT_SECONDS, READ_SECONDS)
  with requests.get(url, headers=headers, stream=True, timeout=timeout) as response:
    response.raise_for_status()
    if response.status_code != requests.codes.partial_content:
      have = 0
    rest = str(file.size - have)
    declared = response.headers.get("Content-Length", rest)
    if declared != rest:
      raise _MirrorError(f"offers {declared} bytes instead of {rest}")
    with part.open("ab" if have else "wb") as stream, _show_progress() as progress:
      task = progress.add_task(title, total=file.size, completed=have)
      for chunk in response.iter_content(CHUNK_BYTES):
        have += len(chunk)
        if have > file.size:
          break  # not the file, as the checksum will show
        stream.write(chunk)
        progress.advance(task, len(chunk))


def _show_progress() -> Progress:
  columns = (*Progress.get_default_columns()[:2], DownloadColumn(), TransferSpeedColumn())
  console = Console(stderr=True, force_terminal=sys.stderr.isatty())  # whatever FORCE_COLOR says
  return Progress(*columns, TimeRemainingColumn(), console=console)


class _MirrorError(Exception):
  """A mirror that answered, but not with the file."""


def _find_host(url: str) -> str:
  """The host of a URL, which may lack a scheme, without the user and the password.

  >>> _find_host("ftp://me:se/cret@host/file"), _find_host("me:secret@host/file"), _find_host("odd")
  ('host', 'host', 'odd')
  """
  return (url.partition("://")[2] or url).rpartition("@")[2].partition("/")[0]


def _brief(error: Exception) -> str:
  """Describes `error` in a few words; the errors of requests have texts of several lines."""
  if isinstance(error, requests.HTTPError) and error.response is not None:
    return f"HTTP {error.response.status_code}"
  if isinstance(error, requests.Timeout):
    return "no answer in time"
  if isinstance(error, (requests.ConnectionError, requests.exceptions.ChunkedEncodingError)):
    return "no connection, or it broke"
  if isinstance(error, ValueError):  # its text may hold a password
    return "invalid URL"
  return str(error)[:100]


def _no_data(source: published.Source, root: Path, reasons: Sequence[str]) -> errors.UserError:
  missing = ", ".join(
    f"{file.name} ({file.algorithm} {file.checksum})" for file in source.find_missing(root)
  )
  return errors.UserError(
    f"{source.title} is not in {root} and could not be downloaded ({'; '.join(reasons)}). Three "
    f"ways out: (1) put {missing} in {root / source.place}; (2) point data.dir, --data_dir of a "
    "tool or TFDS_DATA_DIR to a directory where TensorFlow Datasets prepared "
    f"{source.name}/{source.version}; (3) train on the embedded data with "
    "data.name=shapes."
  )
