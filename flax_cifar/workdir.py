"""The folder of a run: which run it holds, and whether this config may go on in it."""

import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import re
import shutil
import socket
import sys
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

from flax_cifar.errors import UserError, list_differences

# A resumed run may change these: what it computes stays the same.
FREE_KEYS = (
  *("log", "checkpoint", "data.dir"),
  *("augment.workers", "steps_per_call", "num_devices", "eval_batch_size"),
)
# A longer run also goes on where the shorter one ended.
RESUME_KEYS = (*FREE_KEYS, "total_epochs")
LOCK = "lock"
FIRST_FILES = (LOCK, "config.part")  # all there is where a run was killed as it began
MIN_FREE_BYTES = 100 * 2**20  # checkpoints of the largest network stay under a tenth of this


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """{"optimizer.name": "sgd", ...}; tuples become lists, as JSON has them."""
  flat: dict[str, Any] = {}
  for key, value in config.items():
    if isinstance(value, Mapping):
      flat |= flatten(value, f"{prefix}{key}.")
    else:
      flat[prefix + key] = list(value) if isinstance(value, tuple) else value
  return flat


def without(flat: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
  """A flat config without `keys` and what lies below them."""
  return {k: v for k, v in flat.items() if not any(k == f or k.startswith(f + ".") for f in keys)}


def default_workdir(config: Mapping[str, Any]) -> pathlib.Path:
  """runs/NAME-HASH: the same config finds its own run again, another one never gets in its way.

  What has no place in a folder's name becomes "_", so that no name leads out of runs/.
  """
  text = json.dumps(without(flatten(config), FREE_KEYS), sort_keys=True)
  digest = hashlib.sha256(text.encode()).hexdigest()[:8]
  name = re.sub(r"[^\w.,=+-]+", "_", config["name"], flags=re.ASCII)[:100] or "run"
  return pathlib.Path("runs") / f"{name}-{digest}"


def check_workdir(workdir: pathlib.Path, config: Mapping[str, Any]) -> None:
  """Checks that `workdir` is new or holds a run of `config`; writes nothing.

  Raises:
    UserError: it holds a run of another config, something that is no run, or another process
      trains there; it cannot be written to, or the disk is full.
  """
  _check_config(workdir, config)
  folder = next(p for p in (workdir, *workdir.absolute().parents) if p.is_dir())
  if not os.access(folder, os.W_OK):
    raise UserError(f"{str(folder)!r} is not writable; choose another --workdir.")
  free = shutil.disk_usage(folder).free
  if free < MIN_FREE_BYTES:
    raise UserError(
      f"only {free / 2**20:.0f} MiB are free on the disk of {str(folder)!r}; free "
      f"{MIN_FREE_BYTES // 2**20} MiB or choose a --workdir on another disk."
    )
  if (workdir / LOCK).exists():
    with explain_failed_writes(workdir):  # it may belong to another user
      _lock(workdir).close()


def read_result(workdir: pathlib.Path) -> dict[str, Any] | None:
  """What result.json holds; None before the run's end."""
  return _read_json(workdir / "result.json")


@contextlib.contextmanager
def open_workdir(workdir: pathlib.Path, config: Mapping[str, Any]) -> Iterator[None]:
  """Makes `workdir`, writes the config of a new run there and keeps other processes out.

  That of an earlier run stays: who goes on with it writes its own once it is known to fit.
  The kernel ends the lock with the process, however that ends, so none is left behind.

  Raises:
    UserError: another process trains there, or has done so with another config since the check.
  """
  workdir.mkdir(parents=True, exist_ok=True)
  with _lock(workdir) as file:
    _check_config(workdir, config)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    if not (workdir / "config.json").exists():
      write_json(workdir / "config.json", config)
    yield


def _lock(workdir: pathlib.Path) -> TextIO:
  """The open lock file; closing it ends the lock."""
  file = (workdir / LOCK).open("a+")
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError as error:
    file.seek(0)
    owner = file.read() or "another process"
    file.close()
    raise UserError(
      f"workdir {str(workdir)!r} is in use by {owner}; wait for it, stop it, or choose another "
      "--workdir."
    ) from error
  except OSError as error:  # some file systems of clusters
    print(
      f"warning: {str(workdir)!r} cannot be locked ({error.strerror}); see to it that no other "
      "process trains there",
      file=sys.stderr,
    )
  return file


@contextlib.contextmanager
def explain_failed_writes(workdir: pathlib.Path) -> Iterator[None]:
  """Turns an OSError into a UserError that says what to do."""
  try:
    yield
  except OSError as error:
    raise UserError(
      f"workdir {str(workdir)!r} cannot be written to ({error}); what is saved there stays. Make "
      "room, or the folder writable, and the same command goes on from the last checkpoint."
    ) from error


def _read_json(path: pathlib.Path) -> dict[str, Any] | None:
  try:
    return dict(json.loads(path.read_text()))
  except (FileNotFoundError, NotADirectoryError):
    return None
  except (OSError, ValueError, TypeError) as error:
    raise UserError(
      f"{str(path)!r} is damaged ({error}); restore it or choose another --workdir."
    ) from error


def _check_config(workdir: pathlib.Path, config: Mapping[str, Any]) -> None:
  saved = _read_json(workdir / "config.json")
  if saved is None:
    files = [workdir] if workdir.is_file() else list(workdir.glob("*"))
    if any(file.name not in FIRST_FILES for file in files):
      raise UserError(
        f"workdir {str(workdir)!r} holds files that are no run of ours; choose another --workdir."
      )
    return
  changes = list_differences(
    without(flatten(saved), RESUME_KEYS), without(flatten(config), RESUME_KEYS)
  )
  if changes:
    raise UserError(
      f"workdir {str(workdir)!r} holds a run of another config: {'; '.join(changes[:5])}. "
      "Choose another --workdir, or delete this one to start anew."
    )


def write_json(path: pathlib.Path, content: Any) -> None:
  """Writes `content` whole or not at all."""
  write_whole(path, json.dumps(content, indent=2) + "\n")


def write_whole(path: pathlib.Path, text: str) -> None:
  """Writes `text` or leaves what was there."""
  part = path.with_suffix(".part")
  part.write_text(text)
  os.replace(part, path)
