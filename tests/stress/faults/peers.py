"""Two processes of one run: one of them is killed, stopped, stuck, or gets a signal."""

import pathlib
import random
import signal
import statistics
import time
from collections.abc import Callable

from tests import tiny
from tests.parallel import launch
from tests.stress.faults import bench as bench_lib

STALL_SECONDS = 20  # of the watchdog
EPOCHS = 40

Fault = Callable[[launch.Launch, int], None]


def inject_peer_faults(bench: bench_lib.Bench) -> list[bench_lib.Row]:
  """Each fault a few times, at random steps of either process; then all start again and finish."""
  cases: dict[str, tuple[Fault | None, set[int]]] = {
    "kill -9 of one process": (_send(signal.SIGKILL), {75}),
    "SIGSTOP of one process": (_send(signal.SIGSTOP), {75}),
    "one process stuck": (None, {75}),
    "SIGTERM to one process": (_send(signal.SIGTERM), {128 + signal.SIGTERM}),
  }
  return [_inject(name, *case, bench) for name, case in cases.items()]


def _send(signum: int) -> Fault:
  return lambda started, number: started.processes[number].send_signal(signum)


def _inject(
  name: str, fault: Fault | None, statuses: set[int], bench: bench_lib.Bench
) -> bench_lib.Row:
  count, lost, seconds = bench.options.peers, 0, []
  for _ in range(count):
    workdir = bench.new_workdir()
    try:
      seconds.append(_break_and_resume(workdir, fault, statuses, bench.random))
    except (AssertionError, OSError) as problem:
      lost += 1
      print(f"{name}: {problem}", flush=True)
  spread = f"{min(seconds):.1f} to {max(seconds):.1f} s" if seconds else "none"
  notes = f"to exit: median {statistics.median(seconds or [0]):.1f} s ({spread})"
  return {
    "scenario": name,
    "injected": count,
    "survived": count - lost,
    "lost": lost,
    "notes": notes,
  }


def _break_and_resume(
  workdir: pathlib.Path, fault: Fault | None, statuses: set[int], draw: random.Random
) -> float:
  """The seconds from the fault to the exit of the other process.

  Raises:
    AssertionError: it did not leave as it should, or the run did not finish afterwards.
  """
  workdir.parent.mkdir(parents=True, exist_ok=True)
  data = tiny.write_data(workdir.with_suffix(".npz"))
  plan = {"workdir": str(workdir), "data": data, "changes": {"total_epochs": EPOCHS}}
  number, step = draw.randrange(2), draw.randrange(12, 60)
  changed = plan | {"pause": 0.02} | ({} if fault else {"hang": [number, step]})
  flags = [f"--stall_timeout={STALL_SECONDS}"]
  with launch.Launch([changed], processes=2, devices=1, flags=flags) as started:
    launch.wait_for_step(workdir, step, number)
    broken = time.monotonic()
    if fault:
      fault(started, number)
    status, _, errors = started.wait_for(1 - number)
    seconds = time.monotonic() - broken
  assert status in statuses, f"status {status}: {errors[-300:]}"
  with launch.Launch([plan], processes=2, devices=1) as again:
    ended = again.wait()
  assert [status for status, *_ in ended] == [0, 0], ended[0][2][-300:]
  assert "resumed at step" in ended[0][1], "started from the beginning"
  return seconds
