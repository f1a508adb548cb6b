"""The watchdog: its limit, and the exit of a process that is stuck."""

import re
import subprocess
import sys
import threading
import time

from flax_cifar.parallel import watchdog

STUCK = """
import time
from flax_cifar.parallel import watchdog
watchdog.POLL_SECONDS = 0.05
with watchdog.watch(0.5):
  for _ in range(20):  # a second, with reports
    time.sleep(0.05)
    watchdog.report_progress()
  print("goes on", flush=True)
  time.sleep(60)
"""


def test_the_limit_is_a_multiple_of_the_median_or_the_least(monkeypatch):
  watched = watchdog.Watchdog(30)
  assert watched.get_limit() == 30
  for seconds in (1.0, 2.0, 100.0):  # the first call compiles
    watched._waited = seconds
    watched.report_progress()
  assert watched.get_limit() == 2 * watchdog.FACTOR
  assert watched._waited == 0


def test_old_intervals_are_forgotten():
  watched = watchdog.Watchdog(1)
  for seconds in [9.0] * 500 + [0.0] * watchdog.HISTORY:
    watched._waited = seconds
    watched.report_progress()
  assert watched.get_limit() == 1


def test_a_stuck_process_leaves_with_the_stacks_of_its_threads():
  ended = subprocess.run([sys.executable, "-c", STUCK], capture_output=True, text=True)
  assert ended.returncode == 75
  assert ended.stdout == "goes on\n"
  assert 'File "<string>", line 10 in <module>' in ended.stderr
  assert re.search(r"error: no call has finished for \d s, so a process .* stuck", ended.stderr)


def test_nothing_watches_after_the_work():
  before = threading.active_count()
  with watchdog.watch(10):
    watchdog.report_progress()
  watchdog.report_progress()
  assert threading.active_count() == before


def test_time_in_which_this_process_works_alone_does_not_count(monkeypatch):
  monkeypatch.setattr(watchdog, "POLL_SECONDS", 0.01)
  monkeypatch.setattr(watchdog.Watchdog, "_leave", lambda self: left.append(self._waited))
  left: list[float] = []
  with watchdog.watch(0.05):
    with watchdog.paused():
      time.sleep(0.3)
    assert left == []
    time.sleep(0.3)
  assert left
