"""Ctrl-C and SIGTERM end a run after the current step, with a checkpoint."""

import signal
from types import FrameType, TracebackType


class Interrupted(Exception):
  """The run was stopped by `signum` and its state saved at `step`."""

  def __init__(self, signum: int, step: int):
    super().__init__(f"stopped and saved at step {step:,}; the same command goes on from there")
    self.signum = signum


class InterruptGuard:
  """Within it, the first SIGINT or SIGTERM only sets `signum`; a second one acts as usual."""

  def __init__(self) -> None:
    self.signum: int | None = None
    self._previous: dict[int, signal._HANDLER] = {}

  def __enter__(self) -> "InterruptGuard":
    for signum in (signal.SIGINT, signal.SIGTERM):
      self._previous[signum] = signal.signal(signum, self._handle)
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    self._restore()

  def _handle(self, signum: int, frame: FrameType | None) -> None:
    self.signum = signum
    self._restore()

  def _restore(self) -> None:
    for signum, handler in self._previous.items():
      signal.signal(signum, handler)
