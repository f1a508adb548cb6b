"""Signals that stop a run, and a second signal while it saves."""

import pathlib
import re
import signal
import statistics
import time
from collections.abc import Sequence

from tests.stress.faults import bench as bench_lib
from tests.stress.faults import compare, worker

SECOND_SIGNAL_SECONDS = 2.0  # the process must end within this time
LONG_PAUSE = 0.05


def inject_signals(bench: bench_lib.Bench) -> list[bench_lib.Row]:
  names = ("SIGINT", "SIGTERM", "SIGUSR1")
  return [inject_signal(bench, signal.Signals[name]) for name in names]


def inject_signal(bench: bench_lib.Bench, signum: signal.Signals) -> bench_lib.Row:
  """Signals at random moments of training; when a run has finished, a new one starts."""
  results: list[compare.Problems] = []
  seconds: list[float] = []
  workdir = bench.new_workdir()
  while len(seconds) < bench.options.signals:
    child = bench.launch(workdir)
    child.wait_for_steps()
    child.wait_until(lambda: False, bench.random.uniform(0, 1.5))
    if child.process.poll() is None:
      sent = time.monotonic()
      child.signal(signum)
      problems = child.expect(128 + signum, 0)
      if child.process.returncode != 0:  # 0: it was already done
        seconds.append(time.monotonic() - sent)
        results.append(bench.report(problems or check_saved(child, workdir)))
    if (workdir / "result.json").exists():
      results[-1:] = [results[-1] + bench.report(bench.compare(workdir))] if results else []
      workdir = bench.new_workdir()
  results[-1] = results[-1] + bench.finish(workdir)[1]
  return bench_lib.describe(
    f"{signum.name} in training", results, f"to exit: {describe_seconds(seconds)}"
  )


def check_saved(child: bench_lib.Child, workdir: pathlib.Path) -> compare.Problems:
  """The step that a stopped run printed must be its last checkpoint, with digests."""
  match = re.search(r"saved at step ([\d,]+)", "\n".join(child.errors))
  if not match:
    return [f"printed no step: {child.errors}"]
  step = int(match[1].replace(",", ""))
  if compare.list_steps(workdir)[-1:] != [step]:
    return [f"printed step {step}, left checkpoints {compare.list_steps(workdir)}"]
  complete = (workdir / "checkpoints" / str(step) / bench_lib.DIGESTS).exists()
  return [] if complete else [f"the checkpoint of step {step} has no digests"]


def describe_seconds(seconds: Sequence[float]) -> str:
  if not seconds:
    return "never"
  return f"median {statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f} s)"


def inject_second_signals(bench: bench_lib.Bench) -> list[bench_lib.Row]:
  """A second signal within the save that the first one requested ends the process at once."""
  seconds: list[float] = []
  results = []
  for _ in range(bench.options.signals):
    workdir = bench.new_workdir()
    child = bench.launch(workdir, pause=LONG_PAUSE)
    child.wait_for_steps(bench_lib.EVERY_STEPS + 2)
    child.signal(signal.SIGTERM)
    # The process prints that it got the first one; two pending signals would count as one.
    child.wait_until(lambda child=child: bool(child.errors) and child.phase in worker.SAVE_PHASES)
    sent = time.monotonic()
    child.signal(signal.SIGTERM)
    problems = child.expect(-signal.SIGTERM, 128 + signal.SIGTERM)
    seconds.append(time.monotonic() - sent)
    if seconds[-1] > SECOND_SIGNAL_SECONDS:
      problems.append(f"the second signal took {seconds[-1]:.1f} s")
    results.append(bench.report(problems) + bench.finish(workdir)[1])
  notes = f"to exit: {describe_seconds(seconds)}"
  return [bench_lib.describe("a second SIGTERM in the save", results, notes)]
