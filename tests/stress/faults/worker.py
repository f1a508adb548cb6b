"""main.py in a process whose saves can be hit at any point; tests.stress.faults starts it.

Command     python -m tests.stress.faults.worker [flags of main.py]

Wraps, in this process alone, what a save does to the disk: each such call first says on a pipe
where the save is, and sleeps before and after, so that a kill falls between any two of them. Also
said is each step that begins. Environment:

  FAULTS_PIPE   file descriptor that the lines go to, see `Trace`
  FAULTS_SEED   of the sleeps
  FAULTS_PAUSE  their mean in seconds; 0 sleeps not at all
  FAULTS_LIMIT  bytes that a file may have, as on a full disk; 0 is no limit
"""

import contextlib
import functools
import os
import pathlib
import random
import resource
import runpy
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from flax_cifar import environment

TEMPORARY = ".orbax-checkpoint-tmp"
SEAL = "digests"  # digests.json, and digests.part before it
CALLS = (  # what pathlib, shutil and Orbax come down to
  *((os, name) for name in ("mkdir", "rename", "replace", "unlink", "remove", "fsync")),
  *((shutil, "rmtree"), (pathlib.Path, "write_text")),
)
# Where a run is. All but the first two are within a save.
STARTING, BETWEEN = "starting", "between saves"
WRITING, SEALING = "writing", "sealing"
BEFORE_RENAME, AFTER_RENAME, DELETING = (
  "before the rename",
  "after the rename",
  "deleting an old one",
)
SAVE_PHASES = (WRITING, SEALING, BEFORE_RENAME, AFTER_RENAME, DELETING)

Phases = tuple[str, str, str | None]  # during a call, for a while after it, and from then on


def main() -> None:
  environment.apply_settings()  # may restart this process, so first
  limit = int(os.environ["FAULTS_LIMIT"])
  if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
  pause = float(os.environ["FAULTS_PAUSE"])
  trace = Trace(int(os.environ["FAULTS_PIPE"]), int(os.environ["FAULTS_SEED"]), pause)
  for module, name in CALLS:
    setattr(module, name, wrap(getattr(module, name), name, trace))
  report_steps(trace)
  root = pathlib.Path(__file__).parents[3]
  sys.argv[0] = "main.py"
  runpy.run_path(str(root / "main.py"), run_name="__main__")


class Trace:
  """Writes lines to the pipe: `phase NAME`, `saved STEP`, `deleted STEP`, `from STEP`, `step STEP`.

  `from` is where training starts or goes on, `step` counts the steps begun. A pipe keeps what was
  written when its writer is killed.
  """

  def __init__(self, pipe: int, seed: int, pause: float):
    self._pipe = pipe
    self._random = random.Random(seed)
    self._pause = pause
    self._deleting = threading.local()

  def say(self, line: str) -> None:
    with contextlib.suppress(OSError):  # nobody listens any more
      os.write(self._pipe, f"{line}\n".encode())

  def pause(self) -> None:
    if self._pause:
      time.sleep(self._random.expovariate(1 / self._pause))

  @property
  def deletes(self) -> bool:
    """Whether this thread is within rmtree, which unlinks by names relative to a descriptor."""
    return getattr(self._deleting, "now", False)

  @deletes.setter
  def deletes(self, value: bool) -> None:
    self._deleting.now = value


def wrap(call: Callable[..., Any], name: str, trace: Trace) -> Callable[..., Any]:
  """`call`, which says where it is and sleeps if it concerns a checkpoint."""

  @functools.wraps(call)
  def wrapped(*args: Any, **kwargs: Any) -> Any:
    paths = [as_path(value) for value in args[:2] or [None]]
    phases = name_phases(name, paths[0]) if not trace.deletes else None
    if phases:
      return run_in_phases(phases, functools.partial(call, *args, **kwargs), paths, name, trace)
    if trace.deletes or name in ("replace", "fsync"):
      trace.pause()
    return call(*args, **kwargs)

  return wrapped


def as_path(value: Any) -> pathlib.PurePath:
  is_path = isinstance(value, str | os.PathLike)
  return pathlib.PurePath(os.fspath(value)) if is_path else pathlib.PurePath()


def run_in_phases(
  phases: Phases,
  call: Callable[[], Any],
  paths: list[pathlib.PurePath],
  name: str,
  trace: Trace,
) -> Any:
  """Calls `call` and says which phases that leads through."""
  during, after, then = phases
  trace.say(f"phase {during}")
  if name == "rmtree":
    trace.say(f"deleted {paths[0].name}")
  trace.pause()
  trace.deletes = name == "rmtree"
  try:
    result = call()
  finally:
    trace.deletes = False
  if after == AFTER_RENAME:
    trace.say(f"saved {paths[1].name}")
  trace.say(f"phase {after}")
  trace.pause()
  if then:
    trace.say(f"phase {then}")
  return result


def name_phases(name: str, path: pathlib.PurePath) -> Phases | None:
  """The phases of the function `name`, called on `path`; None if no save does it."""
  if "checkpoints" not in path.parts:
    return None
  top = path.parent.name == "checkpoints"  # the folder of a checkpoint, none in it
  if name == "mkdir" and top and TEMPORARY in path.name:
    return WRITING, WRITING, None
  if path.stem == SEAL:
    return SEALING, BEFORE_RENAME if name in ("rename", "replace") else SEALING, None
  if name in ("rename", "replace") and top and TEMPORARY in path.name:
    return BEFORE_RENAME, AFTER_RENAME, BETWEEN
  if name == "rmtree" and top and path.name.isdecimal():
    return DELETING, DELETING, BETWEEN
  return None


def report_steps(trace: Trace) -> None:
  """Makes the feeds say each step that begins."""
  from flax_cifar.data import device_feed, host_feed

  for feed in (device_feed.DeviceFeed, host_feed.HostFeed):
    feed.chunks = report_calls(feed.chunks, trace)


def report_calls(calls: Callable[..., Iterator[Any]], trace: Trace) -> Callable[..., Iterator[Any]]:
  @functools.wraps(calls)
  def reported(self: Any, steps: range) -> Iterator[Any]:
    begun = steps.start
    trace.say(f"from {begun}")
    for length, inputs in calls(self, steps):
      begun += length
      trace.say(f"step {begun}")
      yield length, inputs

  return reported


if __name__ == "__main__":
  main()
