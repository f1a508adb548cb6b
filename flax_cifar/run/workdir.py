"""The folder of a run: which run it holds, and whether this config may go on in it."""

import contextlib
import errno
import hashlib
import json
import os
import pathlib
import re
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TextIO

from ml_collections import ConfigDict

from flax_cifar import errors, files
from flax_cifar.models import layer_table
from flax_cifar.parallel import agreement
from flax_cifar.run import config as config_lib
from flax_cifar.run import tables

CONFIG, DATA, LOCK = "config.json", "data.json", "lock"
# The only files of a run that was killed right after its start; older ones had no process number.
FIRST_FILES = re.compile(rf"{LOCK}|\.{re.escape(CONFIG)}(\.\d+)?\.part|config\.part")
# Of a disk or folder that cannot be written to.
WRITE_ERRORS = (
  *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG),
  *(errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG, errno.ESTALE),
)
MIN_FREE_BYTES = 100 * 2**20  # over ten times the checkpoints of the largest network


def default_workdir(config: Mapping[str, Any]) -> pathlib.Path:
  """runs/NAME-HASH: the same config finds its own run again, another one has another folder.

  Characters that do not belong in a folder's name become "_", so that no name leads out of runs/.

  >>> default_workdir({"name": "a/b", "seed": 0})
  PosixPath('runs/a_b-3a159bf2')
  """
  text = json.dumps(config_lib.get_identity(config), sort_keys=True)
  digest = hashlib.sha256(text.encode()).hexdigest()[:8]
  name = re.sub(r"[^\w.,=+-]+", "_", config["name"], flags=re.ASCII)[:100] or "run"
  return pathlib.Path("runs") / f"{name}-{digest}"


def choose(config: ConfigDict, given: str | os.PathLike[str] | None, what: str) -> pathlib.Path:
  """The folder that the user has `given`, as `what`; else see `find_workdir`.

  A run whose type is "auto" goes on in the folder where it began in bfloat16 on another processor.
  One that began in float32 elsewhere cannot be told from one that float32 was asked for.

  Raises:
    UserError: the path is invalid, or a value of the config is.
  """
  if given:
    return errors.get_path(what, given)
  settled = config_lib.settle(config).to_dict()
  here = find_workdir(settled)
  if config.compute_dtype != "auto" or settled["compute_dtype"] != "float32" or here.exists():
    return here
  elsewhere = find_workdir(settled | {"compute_dtype": "bfloat16"})
  return elsewhere if elsewhere.exists() else here


def find_workdir(config: Mapping[str, Any]) -> pathlib.Path:
  """The default folder of `config`, or that of a shorter run of it, which then goes on."""
  own = default_workdir(config)
  if own.exists():
    return own
  shorter = []
  for path in own.parent.glob(f"*/{CONFIG}"):
    with contextlib.suppress(errors.UserError):  # damaged, but of no concern here
      saved = _read_json(path) or {}
      epochs = saved.get("total_epochs")
      is_shorter = isinstance(epochs, int) and epochs <= config["total_epochs"]
      if is_shorter and not list_changes(saved, config):
        shorter.append((epochs, path.parent))
  return max(shorter, default=(0, own))[1]


def settle(config: ConfigDict, workdir: pathlib.Path) -> ConfigDict:
  """Like `config.settle`, but "auto" is what it was when the run in `workdir` began."""
  settled = config_lib.settle(config)
  if config.compute_dtype == "auto":
    saved = _read_json(workdir / CONFIG) or {}
    settled.compute_dtype = saved.get("compute_dtype", settled.compute_dtype)
  return settled


def check_config(workdir: pathlib.Path, config: Mapping[str, Any]) -> None:
  """Raises a UserError unless `workdir` is new or holds a run of `config`, of any length."""
  saved = _read_json(workdir / CONFIG)
  if saved is None:
    is_folder = workdir.is_dir() or not workdir.exists()
    found = list(workdir.glob("*")) if is_folder else [workdir]
    if not all(FIRST_FILES.fullmatch(file.name) for file in found):
      raise errors.UserError(
        f"workdir {str(workdir)!r} holds files that are no run of ours; choose another --workdir."
      )
    return
  if changes := list_changes(saved, config):
    raise errors.UserError(
      f"workdir {str(workdir)!r} holds a run of another config: {'; '.join(changes[:5])}. "
      "Choose another --workdir, or delete this one to start again."
    )


def list_changes(saved: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
  """A line for each key in which a resumed run may not differ, but does."""
  old, new = (config_lib.flatten(config_lib.complete(one)) for one in (saved, config))
  free = config_lib.list_resume_keys(old)
  return errors.list_differences(config_lib.without(old, free), config_lib.without(new, free))


def check_data(workdir: pathlib.Path, fingerprint: Mapping[str, Any]) -> None:
  """Raises a UserError if the run in `workdir` was started on other data.

  Args:
    workdir: of the run.
    fingerprint: of the data now, see `splits.Splits.fingerprint`.
  """
  saved = _read_json(workdir / DATA)
  changes = [] if saved is None else errors.list_differences(saved, fingerprint)
  if changes:
    raise errors.UserError(
      f"workdir {str(workdir)!r} holds a run on other data: {errors.list_some(changes, 3)}. "
      "Restore the data or choose another --workdir. If the images are the same, read by another "
      f"version of a library, delete {DATA} there to go on."
    )


def check_writable(workdir: pathlib.Path) -> None:
  """Checks that a run can go on in `workdir`; writes nothing.

  Raises:
    UserError: another process trains there, it cannot be written to, or the disk is full.
  """
  folder = next(p for p in (workdir, *workdir.absolute().parents) if p.is_dir())
  if not os.access(folder, os.W_OK):
    raise errors.UserError(f"{str(folder)!r} is not writable; choose another --workdir.")
  free = shutil.disk_usage(folder).free
  if free < MIN_FREE_BYTES:
    raise errors.UserError(
      f"only {free / 2**20:.0f} MiB are free on the disk of {str(folder)!r}; free "
      f"{MIN_FREE_BYTES // 2**20} MiB or choose a --workdir on another disk."
    )
  if (workdir / LOCK).exists():
    with explain_failed_writes(workdir):  # it may belong to another user
      _lock(workdir, warns=False).close()


def read_result(workdir: pathlib.Path) -> dict[str, Any] | None:
  """The content of result.json; None before the end of the run.

  Raises:
    UserError: it is damaged, or cannot be read.
  """
  path = workdir / "result.json"
  result = _read_json(path)
  if result is not None and not isinstance(result.get("epochs"), int):
    raise errors.UserError(
      f"{str(path)!r} is damaged (it has no number of epochs); restore it or choose another "
      "--workdir."
    )
  return result


@contextlib.contextmanager
def open_workdir(workdir: pathlib.Path, config: Mapping[str, Any]) -> Iterator[None]:
  """Creates `workdir`, writes the config of a new run there and keeps other runs out.

  The config of an earlier run stays until this one is known to fit its checkpoint.

  Raises:
    UserError: another run is there, or has been there with another config since the check; or not
      every process sees the same folder.
  """
  with contextlib.ExitStack() as stack:
    agreement.by_first(stack.enter_context)(_create_and_lock(workdir, config))
    agreement.check_same_file(workdir / LOCK)
    yield


@contextlib.contextmanager
def _create_and_lock(workdir: pathlib.Path, config: Mapping[str, Any]) -> Iterator[None]:
  workdir.mkdir(parents=True, exist_ok=True)
  with _lock(workdir, warns=True) as file:
    check_config(workdir, config)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    if not (workdir / CONFIG).exists():
      files.write_json(workdir / CONFIG, config)
    yield


@agreement.by_first
def write_start(
  workdir: pathlib.Path,
  config: Mapping[str, Any],
  fingerprint: Mapping[str, Any],
  layers: Sequence[layer_table.Row],
) -> None:
  """Writes config.json, data.json and summary.txt of the run that goes on in `workdir`."""
  files.write_json(workdir / CONFIG, config)
  files.write_json(workdir / DATA, fingerprint)
  files.write_text(workdir / "summary.txt", tables.format_layer_table(layers))


def read_start(workdir: pathlib.Path) -> tuple[dict[str, Any], dict[str, Any]]:
  """The config, with every key, and the fingerprint of the data of the run in `workdir`.

  Raises:
    UserError: it holds no run, or one that has not begun to train.
  """
  config, fingerprint = _read_json(workdir / CONFIG), _read_json(workdir / DATA)
  if config is None or fingerprint is None:
    raise errors.UserError(
      f"{str(workdir)!r} holds no run that has begun to train: it lacks {CONFIG} or {DATA}; name "
      "another folder."
    )
  return config_lib.complete(config), fingerprint


def _lock(workdir: pathlib.Path, *, warns: bool) -> TextIO:
  """The open lock file; closing it ends the lock. `warns` where the file system has no locks."""
  file = (workdir / LOCK).open("a+", encoding="utf-8")
  try:
    if files.lock(file, wait=False):
      return file
  except OSError as error:  # some file systems of clusters have no locks
    if warns:
      errors.warn(
        f"{str(workdir)!r} cannot be locked ({error.strerror}); make sure that no other process "
        "trains there"
      )
    return file
  with file:
    file.seek(0)
    owner = file.read() or "another process"
  raise errors.UserError(
    f"workdir {str(workdir)!r} is in use by {owner}; wait for it, stop it, or choose another "
    "--workdir."
  )


@contextlib.contextmanager
def explain_failed_writes(workdir: pathlib.Path) -> Iterator[None]:
  """Turns an OSError into a UserError that says what to do."""
  try:
    yield
  except OSError as error:
    if error.errno and error.errno not in WRITE_ERRORS:
      raise errors.UserError(
        f"the system refused what the run needs ({error}); what is saved in {str(workdir)!r} "
        "stays, and the same command goes on from the last checkpoint."
      ) from error
    raise errors.UserError(
      f"workdir {str(workdir)!r} cannot be written to ({error}); what is saved there stays. Make "
      "room, or the folder writable, and the same command goes on from the last checkpoint."
    ) from error


def _read_json(path: pathlib.Path) -> dict[str, Any] | None:
  try:
    return dict(json.loads(path.read_text(encoding="utf-8")))
  except (FileNotFoundError, NotADirectoryError):
    return None
  except PermissionError as error:
    raise errors.UserError(f"{str(path)!r} cannot be read; make it readable.") from error
  except (OSError, ValueError, TypeError) as error:
    raise errors.UserError(
      f"{str(path)!r} is damaged ({error}); restore it or choose another --workdir."
    ) from error
