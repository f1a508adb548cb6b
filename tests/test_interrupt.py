"""The first signal is remembered, the second acts."""

import os
import signal

import pytest

from flax_cifar.interrupt import InterruptGuard


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_is_remembered(signum):
  before = signal.getsignal(signum)
  with InterruptGuard() as guard:
    assert guard.signum is None
    os.kill(os.getpid(), signum)
    assert guard.signum == signum
  assert signal.getsignal(signum) is before


def test_second_signal_acts_as_usual():
  def press_twice():
    with InterruptGuard():
      os.kill(os.getpid(), signal.SIGINT)
      os.kill(os.getpid(), signal.SIGINT)

  with pytest.raises(KeyboardInterrupt):
    press_twice()
