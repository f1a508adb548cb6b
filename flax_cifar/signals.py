"""Ctrl-C, SIGTERM and SIGUSR1 (a scheduler's warning) end a run after the step, with a checkpoint.

Python sees a signal between two calls of compiled code, so "the step" is such a call.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

Stop = Callable[[], bool]
Handlers = Mapping[int, Any]


class Stopped(Exception):
  """Work was left unfinished because its `stop` became true."""


class Interrupted(Exception):
  """The run was stopped by `signum` and its state saved at `step`."""

  def __init__(self, signum: int, step: int):
    super().__init__(f"stopped and saved at step {step:,}; the same command goes on from there")
    self.signum = signum


def never() -> bool:
  """The `stop` of work that goes on to its end."""
  return False


def install_handlers(
  handler: Callable[[int, FrameType | None], None], signums: Iterable[int]
) -> Handlers:
  """Lets `handler` handle each of `signums`; returns the handlers before it.

  In a thread other than the main one it does nothing: Python handles signals in that one alone.
  """
  if threading.current_thread() is not threading.main_thread():
    return {}
  return {signum: signal.signal(signum, handler) for signum in signums}


def restore_handlers(previous: Handlers) -> None:
  """Undoes `install_handlers`, given what it returned."""
  for signum, handler in previous.items():
    signal.signal(signum, handler)


def is_interactive() -> bool:
  """Whether this is a session of Python, IPython or Jupyter."""
  return hasattr(sys, "ps1") or "ipykernel" in sys.modules


class InterruptGuard:
  """Within it, the first of SIGNALS only sets `signum`; the next one ends the process at once.

  It does so in the kernel, because Python would wait for the compiled code to return, or for a
  checkpoint to be written. Both ways the shell sees the status 128 + signum. In an interactive
  session, whose variables would be lost, the next one is a KeyboardInterrupt.
  """

  def __init__(self) -> None:
    self.signum: int | None = None
    self._previous: Handlers = {}

  def __enter__(self) -> "InterruptGuard":
    self._previous = install_handlers(self._handle, SIGNALS)
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    restore_handlers(self._previous)

  def is_caught(self) -> bool:
    """Whether a signal has come."""
    return self.signum is not None

  def _handle(self, signum: int, frame: FrameType | None) -> None:
    self.signum = signum
    for other in SIGNALS:
      signal.signal(other, self._previous[other] if is_interactive() else signal.SIG_DFL)
    name = signal.Signals(signum).name
    text = f"{name}: saving after this step; once more ends at once\n"
    with contextlib.suppress(OSError):  # the reader of stderr may have got the Ctrl-C too
      os.write(sys.stderr.fileno(), text.encode())  # print could be in the middle of something
