"""kill -9 at any moment."""

import collections
import dataclasses
import pathlib
import signal
import sys
from collections.abc import Sequence

from tests.stress.faults import bench as bench_lib
from tests.stress.faults import compare, worker

PAUSE = 0.012  # mean of the sleeps in a save: stretches it to about a second


@dataclasses.dataclass
class Round:
  """A run from start to end, with all its processes and kills."""

  workdir: pathlib.Path
  phases: list[str] = dataclasses.field(default_factory=list)  # of each kill
  steps: int = 0  # begun by all its processes
  kept: set[int] = dataclasses.field(default_factory=set)  # checkpoints that must exist
  problems: compare.Problems = dataclasses.field(default_factory=list)

  def add(self, child: bench_lib.Child) -> None:
    """Adds a process that has ended; its start before the last checkpoint is a problem."""
    if self.kept and child.start is not None and child.start < max(self.kept):
      self.problems.append(f"started at step {child.start}, though {max(self.kept)} was saved")
    self.steps += child.steps
    self.kept = (self.kept | set(child.saved)) - set(child.deleted)


def inject_kills(bench: bench_lib.Bench) -> list[bench_lib.Row]:
  """Kills runs at random moments; whenever a run has finished, a new one starts."""
  rounds, kills = [Round(bench.new_workdir())], 0
  while kills < bench.options.kills:
    current = rounds[-1]
    child = bench.launch(current.workdir, pause=PAUSE)
    kill_at_random(child, bench)
    problems = child.expect(0, -signal.SIGKILL)
    current.add(child)
    if child.process.returncode == -signal.SIGKILL:
      kills += 1
      current.phases.append(child.phase)
    else:
      current.problems += problems or bench.compare(current.workdir)
      rounds.append(Round(bench.new_workdir()))
    show_progress(f"{kills} of {bench.options.kills} kills, round {len(rounds)}")
  if rounds[-1].phases:
    child, problems = bench.finish(rounds[-1].workdir)
    rounds[-1].add(child)
    rounds[-1].problems += problems
  return describe_kills([run for run in rounds if run.phases], bench)


def kill_at_random(child: bench_lib.Child, bench: bench_lib.Bench) -> None:
  """Kills after a random time from the start of the process or of training, or within a save."""
  draw = bench.random
  moment = draw.choices(("process", "training", "save"), (1, 1, 2))[0]
  if moment == "process":
    child.wait_until(lambda: False, draw.uniform(0, 1.5 * bench.seconds_to_start))
  elif moment == "training":
    child.wait_for_steps()
    child.wait_until(lambda: False, draw.uniform(0, 4))
  else:
    phase, number = draw.choice(worker.SAVE_PHASES), draw.randint(1, 3)
    for _ in range(number):
      child.wait_until(lambda: child.phase not in worker.SAVE_PHASES)
      child.wait_until(lambda: child.phase == phase)
    child.wait_until(lambda: False, draw.uniform(0, 2 * PAUSE))
  child.signal(signal.SIGKILL)


def describe_kills(rounds: Sequence[Round], bench: bench_lib.Bench) -> list[bench_lib.Row]:
  """A row per phase. The kills of a round survive or are lost together."""
  results: dict[str, list[compare.Problems]] = collections.defaultdict(list)
  for run in rounds:
    bench.report(run.problems)
    for phase in run.phases:
      results[phase].append(run.problems)
  order = (worker.STARTING, worker.BETWEEN, *worker.SAVE_PHASES)
  rows = [bench_lib.describe(f"kill -9, {name_moment(phase)}", results[phase]) for phase in order]
  begun, useful = sum(run.steps for run in rounds), bench_lib.STEPS * len(rounds)
  rows[0]["notes"] = f"{len(rounds)} runs of {bench_lib.STEPS} steps; " + describe_goodput(
    useful, begun
  )
  return rows


def name_moment(phase: str) -> str:
  return f"in a save: {phase}" if phase in worker.SAVE_PHASES else phase


def describe_goodput(useful: int, begun: int) -> str:
  repeated = max(0, begun - useful)
  return f"{repeated} steps repeated, goodput {useful / (useful + repeated):.1%}"


def show_progress(text: str) -> None:
  print(text, file=sys.stderr, flush=True)
