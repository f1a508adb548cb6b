"""The first signal is recorded, the second ends the process."""

import concurrent.futures
import gc
import os
import signal
import subprocess
import sys

import pytest

from flax_cifar import signals


@pytest.mark.parametrize("signum", signals.SIGNALS)
def test_the_first_signal_is_recorded_and_announced(signum, capfd):
  before = [signal.getsignal(each) for each in signals.SIGNALS]
  with signals.InterruptGuard() as guard:
    assert guard.signum is None
    assert not guard.is_caught()
    signal.raise_signal(signum)
    assert guard.signum == signum
    assert guard.is_caught()
  assert [signal.getsignal(each) for each in signals.SIGNALS] == before
  assert f"{signum.name}: saving after this step" in capfd.readouterr().err


def test_a_screen_that_nobody_reads_changes_nothing(monkeypatch):
  """The reader may end first: in `2>&1 | tee log` the same Ctrl-C ends `tee`."""
  reading, writing = os.pipe()
  os.close(reading)
  with open(writing, "w") as broken, signals.InterruptGuard() as guard:
    monkeypatch.setattr(sys, "stderr", broken)
    signal.raise_signal(signal.SIGINT)
    assert guard.signum == signal.SIGINT


def test_in_another_thread_signals_are_left_alone():
  """Python handles signals in the main thread alone."""
  before = signal.getsignal(signal.SIGTERM)

  def guard():
    with signals.InterruptGuard() as guard:
      return guard.is_caught(), signal.getsignal(signal.SIGTERM)

  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    assert pool.submit(guard).result() == (False, before)


@pytest.mark.parametrize("second", signals.SIGNALS)
def test_the_second_signal_ends_the_process_at_once(second):
  """Not even a `finally` clause runs."""
  code = f"""
import signal, time
from flax_cifar.signals import InterruptGuard
with InterruptGuard():
  signal.raise_signal(signal.SIGTERM)
  try:
    print("alive", flush=True)
    signal.raise_signal({int(second)})
  finally:
    print("too late", flush=True)
"""
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
  assert done.returncode == -second  # a shell reports 128 + N
  assert done.stdout == "alive\n"


@pytest.fixture
def no_garbage():
  """Collects none: an exception that a signal raises in a callback of the collector is lost."""
  gc.disable()
  yield
  gc.enable()


@pytest.mark.usefixtures("no_garbage")
def test_in_an_interactive_session_the_second_signal_is_a_keyboard_interrupt(monkeypatch):
  monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
  before = signal.getsignal(signal.SIGINT)
  with signals.InterruptGuard() as guard:
    signal.raise_signal(signal.SIGINT)
    assert guard.is_caught()
    with pytest.raises(KeyboardInterrupt):
      signal.raise_signal(signal.SIGINT)
  assert signal.getsignal(signal.SIGINT) == before
