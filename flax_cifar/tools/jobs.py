"""Runs processes one after another, or side by side on cores of their own; a signal stops all."""

import contextlib
import dataclasses
import itertools
import os
import pathlib
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from types import FrameType, TracebackType

from flax_cifar import signals

OTHERS = (signal.SIGHUP, signal.SIGQUIT)  # save nothing, but end the run
POLL_SECONDS = 0.05

Cores = frozenset[int]


@dataclasses.dataclass(frozen=True)
class Job:
  """A process to run; what it prints goes to the file `log`, without one to the screen."""

  name: str
  command: Sequence[str]
  log: pathlib.Path | None = None


REFUSED = 2  # the status of a run that ends with advice: that of a mistake, or of one that diverged


class JobFailed(Exception):
  """A job ended with `status` instead of 0."""

  def __init__(self, job: Job, status: int):
    where = f" ({job.log} says why)" if job.log else ""
    goes_on = "the same command goes on from there"
    hint = "correct that and start again" if status == REFUSED else goes_on
    super().__init__(f"run {job.name} ended with status {status}{where}; {hint}")
    self.status = status


def split_cores(count: int) -> list[Cores]:
  """The cores that this process may use in `count` shares; empty ones on macOS, which pins none."""
  if not hasattr(os, "sched_getaffinity"):
    return [frozenset()] * count
  cores = sorted(os.sched_getaffinity(0))
  ends = [len(cores) * number // count for number in range(count + 1)]
  return [frozenset(cores[start:end]) for start, end in itertools.pairwise(ends)]


def run_jobs(jobs: Sequence[Job], shares: Sequence[Cores]) -> list[JobFailed]:
  """Runs the jobs in their order, as many at once as there are shares of the cores.

  Returns:
    The jobs that ended with REFUSED, which says nothing of the others.

  Raises:
    JobFailed: the first that crashed or was stopped; none is started after it, and those that run
      beside it are waited for.
  """
  with _Pool(shares) as pool:
    for number, job in enumerate(jobs, 1):
      pool.wait_for_share()
      if pool.failure:
        break
      print(f"run {number}/{len(jobs)}: {job.name}" + f", in {job.log}" * bool(job.log), flush=True)
      pool.start(job)
  if pool.failure:
    raise pool.failure
  return pool.refused


class _Pool:
  """Processes, each with a share of the cores; leaving the pool waits for them.

  Each process has a group of its own. A signal of a terminal or a scheduler to this process's group
  thus reaches it once, from here, and the pool waits for it: a second signal would end it unsaved.
  A job that ends before a signal reaches it gets the signal as its status, so no other job starts.
  """

  def __init__(self, shares: Sequence[Cores]):
    self.failure: JobFailed | None = None
    self.refused: list[JobFailed] = []
    self._free = list(shares)
    self._running: dict[subprocess.Popen[bytes], tuple[Job, Cores]] = {}
    self._signals: list[int] = []
    self._previous: signals.Handlers = {}

  def __enter__(self) -> "_Pool":
    # A signal that nohup ignores stays ignored. SIGNALS are handled even where a script's `sweep &`
    # has them ignored, as in a run.
    others = [s for s in OTHERS if signal.getsignal(s) != signal.SIG_IGN]
    self._previous = signals.install_handlers(self._forward, (*signals.SIGNALS, *others))
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    while self._running:
      self._collect()
    signals.restore_handlers(self._previous)

  def start(self, job: Job) -> None:
    """Starts the job on a share that is free."""
    cores = self._free.pop(0)
    with contextlib.ExitStack() as stack:
      stack.enter_context(_pinned(cores))
      log = stack.enter_context(job.log.open("ab")) if job.log else None
      process = subprocess.Popen(
        job.command, process_group=0, stdout=log, stderr=subprocess.STDOUT if log else None
      )
    self._running[process] = job, cores
    for signum in tuple(self._signals):  # they came first, and the job has nothing to save yet
      process.send_signal(signum)

  def wait_for_share(self) -> None:
    """Returns when `start` can be called."""
    while not self._free:
      self._collect()

  def _collect(self) -> None:
    """Sleeps for a moment, then collects the processes that have ended."""
    time.sleep(POLL_SECONDS)
    for process in [one for one in self._running if one.poll() is not None]:
      job, cores = self._running.pop(process)
      self._free.append(cores)
      status = self._get_status(process.returncode)
      if status == REFUSED:
        self.refused.append(JobFailed(job, status))
        print(f"run {job.name} ended with status {status}; the others go on", flush=True)
      elif status and not self.failure:
        self.failure = JobFailed(job, status)
        for other, _ in self._running.values():
          print(f"run {job.name} ended with status {status}; waiting for {other.name}", flush=True)

  def _get_status(self, code: int) -> int:
    """The status, as a shell shows it, of a process that ended with `code`."""
    if code == 0 and self._signals:
      return 128 + self._signals[0]
    return code if code >= 0 else 128 - code

  def _forward(self, signum: int, frame: FrameType | None) -> None:
    self._signals.append(signum)
    for process in self._running:
      process.send_signal(signum)


@contextlib.contextmanager
def _pinned(cores: Cores) -> Iterator[None]:
  """Processes started within it run on `cores` alone; anywhere if there are none."""
  if not cores:
    yield
    return
  before = os.sched_getaffinity(0)
  os.sched_setaffinity(0, cores)
  try:
    yield
  finally:
    os.sched_setaffinity(0, before)
