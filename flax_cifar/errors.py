"""The one error a user should see: what was wrong, with the value, and what to do."""

import difflib
from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")


class UserError(ValueError):
  """A problem the user can fix. `main.py` prints it as one line and exits with status 2."""


def choose(what: str, name: str, choices: Mapping[str, T]) -> T:
  """Looks `name` up in `choices`.

  Raises:
    UserError: unknown name; the message quotes it and lists the choices.
  """
  if name in choices:
    return choices[name]
  close = difflib.get_close_matches(str(name), choices, n=1)
  hint = f" Did you mean {close[0]!r}?" if close else ""
  raise UserError(f"{what}={name!r} is unknown; choose one of {', '.join(choices)}.{hint}")


def list_differences(there: Mapping[str, object], here: Mapping[str, object]) -> list[str]:
  """A line for each key whose values differ or that one side lacks, sorted."""
  lines = []
  for key in sorted(there.keys() | here.keys()):
    theirs, ours = there.get(key, "absent"), here.get(key, "absent")
    if theirs != ours:
      lines.append(f"{key} is {theirs!r} there and {ours!r} here")
  return lines


def require(condition: bool, what: str, value: object, expected: str) -> None:
  """Raises a UserError that quotes `value` unless `condition` holds."""
  if not condition:
    raise UserError(f"{what}={value!r} is not valid; it must be {expected}.")
