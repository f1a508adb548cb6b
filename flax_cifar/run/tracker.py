"""Weights & Biases or trackio, which share `init`, `log` and `finish`; users install them."""

import importlib
import importlib.util
import pathlib
import secrets
from collections.abc import Mapping
from typing import Any

from flax_cifar import errors, files

NONE = "none"
TRACKERS = (NONE, "wandb", "trackio")
PROJECT = "flax_cifar"
IDENTITY = "tracker.txt"  # in the folder of a run, what names it to the library


class Tracker:
  """A run of the library `name`, which gets what metrics.jsonl gets.

  What goes wrong there, such as a network that is down, is a warning: it is no reason to lose a
  run. The first failure ends it. `config` is that of the run, flat. A run that resumes in `workdir`
  goes on as the same run of the library.
  """

  def __init__(self, name: str, config: Mapping[str, Any], workdir: pathlib.Path):
    self._name = name
    self._open = True
    identity = _get_identity(workdir / IDENTITY)
    title = f"{config['name']}-{identity}"  # by which trackio knows a run; wandb has an id for it
    known_by = {"id": identity} if name == "wandb" else {}
    self._call("init", project=PROJECT, name=title, config=dict(config), resume="allow", **known_by)

  def log(self, numbers: Mapping[str, Any], *, step: int) -> None:
    """Sends numbers that belong to a step."""
    self._call("log", dict(numbers), step=step)

  def finish(self) -> None:
    """Ends the run."""
    self._call("finish")
    self._open = False

  def _call(self, function: str, *args: Any, **kwargs: Any) -> None:
    if not self._open:
      return
    try:
      getattr(importlib.import_module(self._name), function)(*args, **kwargs)
    except Exception as error:  # of the library, its import included, the network or the disk
      self._open = False
      errors.warn(
        f"{self._name} gets nothing from now on: its {function} failed ({errors.shorten(error)})"
      )


def _get_identity(path: pathlib.Path) -> str:
  """The content of a file, which gets eight random digits where there is none yet."""
  if not path.exists():
    files.write_text(path, secrets.token_hex(4))
  return path.read_text(encoding="utf-8", errors="replace").strip()


def check_tracker(name: str) -> None:
  """Raises a UserError unless `name` is in TRACKERS and can be imported."""
  errors.choose("log.tracker", name, dict.fromkeys(TRACKERS))
  there = name == NONE or importlib.util.find_spec(name)
  errors.require(bool(there), "log.tracker", name, f"{NONE}, unless you pip install {name}")
