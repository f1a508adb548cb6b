"""The one error a user should see: what was wrong, with the value, and what to do."""

import contextlib
import difflib
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

# Limits of numbers that more than one module checks.
SEEDS = 2**32  # JAX takes a seed modulo this
MAX_STEPS = 2**31 - 1  # of a run, which counts them in int32
MAX_NUMBER = 1e38  # float32 ends soon after

T = TypeVar("T")


class UserError(ValueError):
  """A problem the user can fix. `main.py` prints it as one line and exits with status 2."""


class Misfit(ValueError):
  """A network that does not fit its input; `run.config.explain_misfit` makes it a UserError.

  Attributes:
    names: the last words of the config keys that can be the reason, such as "image_size".
  """

  def __init__(self, message: str, *, names: tuple[str, ...]):
    super().__init__(message)
    self.names = names


class Lost(Exception):
  """The run's other processes are gone; a restart may help, so the exit status is 75."""


def choose(what: str, name: str, choices: Mapping[str, T]) -> T:
  """Looks `name` up in `choices`.

  Raises:
    UserError: unknown name; the message quotes it and lists the choices.
  """
  if isinstance(name, str) and name in choices:  # a list has no hash
    return choices[name]
  close = difflib.get_close_matches(str(name), choices, n=1)
  hint = f" Did you mean {close[0]!r}?" if close else ""
  raise UserError(f"{what}={name!r} is unknown; choose one of {', '.join(choices)}.{hint}")


def list_differences(
  there: Mapping[str, object],
  here: Mapping[str, object],
  *,
  places: tuple[str, str] = ("there", "here"),
) -> list[str]:
  """A line for each key whose values differ or that one side lacks, sorted.

  >>> list_differences({"seed": 0}, {"seed": 1}, places=("in A", "in B"))
  ['seed is 0 in A and 1 in B']
  """
  lines = []
  for key in sorted(there.keys() | here.keys()):
    theirs, ours = there.get(key, "absent"), here.get(key, "absent")
    if theirs != ours:
      lines.append(f"{key} is {theirs!r} {places[0]} and {ours!r} {places[1]}")
  return lines


def list_some(items: Sequence[object], most: int = 5) -> str:
  """The first `most` items, and how many more there are.

  >>> list_some(["a", "b", "c"], most=2)
  'a, b and 1 more'
  """
  more = f" and {len(items) - most} more" if len(items) > most else ""
  return ", ".join(map(str, items[:most])) + more


def shorten(error: object) -> str:
  """One short line for an error of another library; its text may be empty or span several lines.

  Of paths in double quotes the name of the file stays: TensorStore writes the same long one twice.

  >>> shorten(ValueError('NOT_FOUND: opening\\n  "/a/long/folder/file.json"'))
  'NOT_FOUND: opening file.json'
  """
  text = re.sub(r'"[^"]*?([^"/]*)/?"', r"\1", " ".join(str(error).split()))
  return text[:300] or type(error).__name__


def get_path(what: str, text: str | os.PathLike[str]) -> Path:
  """`text` as a path with `~` resolved; it need not exist.

  Raises:
    UserError: the path is empty or invalid, or this user may not look it up.
  """
  require(bool(os.fspath(text)), what, text, "a path")
  try:
    path = Path(text).expanduser()
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
      path.stat()
  except (OSError, RuntimeError, ValueError) as error:  # too long, no such home, a null byte
    raise UserError(f"{what}={str(text)!r} is no usable path ({error}); choose another.") from error
  return path


def warn(message: str) -> None:
  """Prints one line on standard error: something the user should know, while the run goes on."""
  print(f"warning: {message}", file=sys.stderr, flush=True)


def require(condition: bool, what: str, value: object, expected: str) -> None:
  """Raises a UserError that quotes `value` unless `condition` holds."""
  if not condition:
    raise UserError(f"{what}={value!r} is not valid; it must be {expected}.")


def check_epsilon(key: str, epsilon: float) -> None:
  """Raises a UserError unless float32 can divide by `epsilon` and by its square root."""
  require(1e-30 <= epsilon <= 1e30, key, epsilon, "from 1e-30 to 1e30")
