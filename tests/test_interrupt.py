"""The first signal is remembered, the second acts.

They are raised in this thread: sent to a process with many threads, two may arrive as one.
"""

import signal

import pytest

from flax_cifar.interrupt import InterruptGuard


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_is_remembered(signum):
  before = signal.getsignal(signum)
  with InterruptGuard() as guard:
    assert guard.signum is None
    signal.raise_signal(signum)
    assert guard.signum == signum
  assert signal.getsignal(signum) is before


def test_second_signal_acts_as_usual():
  def press_twice():
    with InterruptGuard():
      signal.raise_signal(signal.SIGINT)
      signal.raise_signal(signal.SIGINT)

  with pytest.raises(KeyboardInterrupt):
    press_twice()
