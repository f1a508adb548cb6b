"""main.py in a process whose saves can be hit at any point; tests.stress.faults starts it.

Command     python -m tests.stress.faults.worker [flags of main.py]

In this process alone, it wraps the calls by which a save changes the disk. Each such call first
reports the phase of the save on a pipe, and sleeps before and after, so that a kill can strike
between any two calls. It also reports each step that begins. Environment:

  FAULTS_PIPE   file descriptor of the pipe, see `Trace`
  FAULTS_SEED   seed of the sleeps
  FAULTS_PAUSE  mean sleep in seconds; 0 means no sleep
  FAULTS_LIMIT  maximum bytes of a file, as on a full disk; 0 means no limit
"""

import contextlib
import functools
import os
import pathlib
import random
import re
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
DIGESTS = re.compile(r"digests\.json|\.digests\.json\.\d+\.part")
CALLS = (  # the functions that pathlib, shutil and Orbax call
  *((os, name) for name in ("mkdir", "rename", "replace", "unlink", "remove", "fsync")),
  *((shutil, "rmtree"), (pathlib.Path, "write_text")),
)
# The phases of a run. All but the first two are within a save.
STARTING, BETWEEN = "starting", "between saves"
WRITING, WRITING_DIGESTS = "writing", "writing the digests"
BEFORE_RENAME, AFTER_RENAME, DELETING = (
  "before the rename",
  "after the rename",
  "deleting an old one",
)
SAVE_PHASES = (WRITING, WRITING_DIGESTS, BEFORE_RENAME, AFTER_RENAME, DELETING)

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

  `from` is the step at which training starts or resumes, `step` counts the steps begun. The lines
  stay in the pipe when the writer is killed.
  """

  def __init__(self, pipe: int, seed: int, pause: float):
    self._pipe = pipe
    self._random = random.Random(seed)
    self._pause = pause
    self._deleting = threading.local()

  def report(self, line: str) -> None:
    with contextlib.suppress(OSError):  # nobody reads any more
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
  """Wraps `call` so that it reports its phase and sleeps if it concerns a checkpoint."""

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
  """Calls `call` and reports the phases during and after it."""
  during, after, then = phases
  trace.report(f"phase {during}")
  if name == "rmtree":
    trace.report(f"deleted {paths[0].name}")
  trace.pause()
  trace.deletes = name == "rmtree"
  try:
    result = call()
  finally:
    trace.deletes = False
  if after == AFTER_RENAME:
    trace.report(f"saved {paths[1].name}")
  trace.report(f"phase {after}")
  trace.pause()
  if then:
    trace.report(f"phase {then}")
  return result


def name_phases(name: str, path: pathlib.PurePath) -> Phases | None:
  """The phases of the function `name`, called on `path`; None if it is no part of a save."""
  if "checkpoints" not in path.parts:
    return None
  top = path.parent.name == "checkpoints"  # the folder of a checkpoint, not one in it
  if name == "mkdir" and top and TEMPORARY in path.name:
    return WRITING, WRITING, None
  if DIGESTS.fullmatch(path.name):
    after = BEFORE_RENAME if name in ("rename", "replace") else WRITING_DIGESTS
    return WRITING_DIGESTS, after, None
  if name in ("rename", "replace") and top and TEMPORARY in path.name:
    return BEFORE_RENAME, AFTER_RENAME, BETWEEN
  if name == "rmtree" and top and path.name.isdecimal():
    return DELETING, DELETING, BETWEEN
  return None


def report_steps(trace: Trace) -> None:
  """Makes the feeds report each step that begins."""
  from flax_cifar.data import device_feed, host_feed

  for feed in (device_feed.DeviceFeed, host_feed.HostFeed):
    feed.chunks = report_chunks(feed.chunks, trace)


def report_chunks(
  chunks: Callable[..., Iterator[Any]], trace: Trace
) -> Callable[..., Iterator[Any]]:
  @functools.wraps(chunks)
  def reported(self: Any, steps: range) -> Iterator[Any]:
    begun = steps.start
    trace.report(f"from {begun}")
    for length, inputs in chunks(self, steps):
      begun += length
      trace.report(f"step {begun}")
      yield length, inputs

  return reported


if __name__ == "__main__":
  main()
