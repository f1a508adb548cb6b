"""Finds a run whose processes all live while one of them is stuck; JAX waits for it forever."""

import contextlib
import faulthandler
import os
import statistics
import threading
import time
from collections.abc import Iterator

STDERR = 2  # its file descriptor: print could wait for a thread that is stuck
POLL_SECONDS = 1.0
FACTOR = 50  # times the median between two calls
HISTORY = 100  # the latest calls, of which the median is taken
STUCK = (
  "error: no call has finished for {seconds:.0f} s, so a process of the run is stuck; above are "
  "the stacks of this one. Start all of them again, and they go on from the last checkpoint; or "
  "raise --stall_timeout if a call takes that long"
)


class Watchdog:
  """Ends this process with status 75 when too much time has passed since the last report.

  It sleeps in short turns and counts those, so the time in which the process itself was stopped
  (Ctrl-Z, a suspended laptop) does not count.

  Args:
    seconds: allowed at least; FACTOR times the median between two reports, if that is longer.
  """

  def __init__(self, seconds: float):
    self._seconds = seconds
    self._intervals: list[float] = []
    self._waited = 0.0
    self.is_paused = False

  def report_progress(self) -> None:
    """Tells that a call has finished."""
    self._intervals = [*self._intervals[1 - HISTORY :], self._waited]
    self._waited = 0.0

  def get_limit(self) -> float:
    """The seconds that may pass without a report."""
    return max(self._seconds, FACTOR * statistics.median(self._intervals or [0.0]))

  def run(self, ended: threading.Event) -> None:
    """Watches until `ended` is set, or leaves."""
    while not ended.wait(POLL_SECONDS):
      self._waited += 0.0 if self.is_paused else POLL_SECONDS
      if self._waited > self.get_limit():
        self._leave()

  def _leave(self) -> None:
    faulthandler.dump_traceback(STDERR, all_threads=True)
    os.write(STDERR, (STUCK.format(seconds=self._waited) + "\n").encode())
    time.sleep(2 * POLL_SECONDS)  # in which the other processes write theirs
    os._exit(os.EX_TEMPFAIL)


_watchdogs: list[Watchdog] = []


def report_progress() -> None:
  """Tells the watchdog of this process, if it has one, that a call has finished."""
  for watchdog in _watchdogs:
    watchdog.report_progress()


@contextlib.contextmanager
def paused() -> Iterator[None]:
  """Does not count the time within it, where this process works alone: a download may be long."""
  for watchdog in _watchdogs:
    watchdog.is_paused = True
  try:
    yield
  finally:
    for watchdog in _watchdogs:
      watchdog.is_paused = False


@contextlib.contextmanager
def watch(seconds: float) -> Iterator[None]:
  """Watches the work within it; see `Watchdog`."""
  watchdog, ended = Watchdog(seconds), threading.Event()
  thread = threading.Thread(target=watchdog.run, args=(ended,), daemon=True)
  _watchdogs.append(watchdog)
  thread.start()
  try:
    yield
  finally:
    ended.set()
    thread.join()
    _watchdogs.remove(watchdog)
