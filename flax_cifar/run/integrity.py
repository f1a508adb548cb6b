"""Digests of a checkpoint's files, so that damage is found before anything is restored.

Orbax looks at the name of a checkpoint's folder only and restores a flipped byte without a word.
"""

import json
import pathlib
import shutil

from flax_cifar import errors, files

DIGESTS = "digests.json"
REPLACED = ".replaced"  # ends the name of a checkpoint while another one is written in its place


def write_digests(path: pathlib.Path) -> None:
  """Writes the SHA-256 of each file in the subfolders of the checkpoint at `path`.

  The folder's own files are left out: Orbax still adds to them, and restores without them.
  """
  found = (file for item in path.iterdir() if item.is_dir() for file in item.rglob("*"))
  digests = {
    file.relative_to(path).as_posix(): files.digest(file) for file in found if file.is_file()
  }
  files.write_json(path / DIGESTS, digests)


def find_damage(path: pathlib.Path) -> str | None:
  """A few words on the damage of the checkpoint at `path`; None if it is as it was saved."""
  try:
    digests = dict(json.loads((path / DIGESTS).read_text(encoding="utf-8")))
  except FileNotFoundError:
    return "it was not written to its end"
  except (OSError, ValueError, TypeError) as error:
    return f"{DIGESTS} cannot be read: {error}"
  for name, digest in digests.items():
    try:
      if files.digest(path / name) != digest:
        return f"{name} has changed"
    except OSError as error:
      return f"{name} cannot be read: {error.strerror}"
  return None


def quarantine(folder: pathlib.Path, damaged: pathlib.Path) -> list[str]:
  """Moves damaged and unfinished checkpoints out of `folder` to `damaged`, and warns of each.

  Args:
    folder: has a checkpoint per step, in a folder whose name is the step.
    damaged: where they go; created when there is one to move.

  Returns:
    The warnings.
  """
  lines = []
  for path in sorted(folder.glob("*"), key=lambda path: path.name):
    reason = find_damage(path) if path.name.isdecimal() and path.is_dir() else None
    if reason:
      target = _find_free_name(damaged, path.name)
      damaged.mkdir(exist_ok=True)
      shutil.move(path, target)  # `damaged` may be on another disk, if the folder is a link
      lines.append(f"checkpoint {str(path)!r} is damaged ({reason}); it is now {str(target)!r}")
      errors.warn(lines[-1])
  return lines


def retire(path: pathlib.Path) -> None:
  """Makes room for a replacement of `path`; `finish_replacements` decides which one stays."""
  path.rename(path.with_name(path.name + REPLACED))


def finish_replacements(folder: pathlib.Path) -> None:
  """Keeps each replacement that is whole; otherwise puts the retired checkpoint back."""
  for old in folder.glob(f"*{REPLACED}"):
    new = old.with_name(old.name.removesuffix(REPLACED))
    if find_damage(new) is None:
      shutil.rmtree(old)
    else:
      shutil.rmtree(new, ignore_errors=True)
      old.rename(new)


def _find_free_name(folder: pathlib.Path, name: str) -> pathlib.Path:
  path, number = folder / name, 1
  while path.exists():
    number += 1
    path = folder / f"{name}-{number}"
  return path
