"""Leftovers in the folder of a run, a second process in it, and its removal."""

import functools
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Sequence

from tests.stress.faults import bench as bench_lib
from tests.stress.faults import compare


def inject_leftovers(bench: bench_lib.Bench) -> list[bench_lib.Row]:
  """Adds leftovers to the folder of a run that has stopped."""
  base = bench.stop_late("stopped")
  rows = []
  for scenario, prepare in LEFTOVERS.items():
    results = []
    for change in prepare:
      workdir = bench.new_workdir(base)
      change(workdir)
      results.append(functools.partial(bench.finish, workdir))
    rows.append(bench_lib.describe(scenario, bench.map(lambda finish: finish()[1], results)))
  return rows


def copy_newest(workdir: pathlib.Path, name: str, without: str) -> None:
  """Copies the newest checkpoint to `name`, without the files that match `without`."""
  folder = workdir / "checkpoints"
  newest = folder / str(compare.list_steps(workdir)[-1])
  shutil.copytree(newest, folder / name, ignore=shutil.ignore_patterns(without))


def cut_metrics(workdir: pathlib.Path) -> None:
  path = workdir / "metrics.jsonl"
  os.truncate(path, path.stat().st_size - 20)


def move_checkpoints(workdir: pathlib.Path) -> None:
  """Moves the checkpoints elsewhere, and leaves a link in their place."""
  folder, elsewhere = workdir / "checkpoints", workdir.with_name(f"{workdir.name}-elsewhere")
  folder.rename(elsewhere)
  folder.symlink_to(elsewhere)


LEFTOVERS: dict[str, Sequence[Callable[[pathlib.Path], None]]] = {
  "an unfinished folder of a later step": (
    lambda workdir: (workdir / "checkpoints" / "9999").mkdir(),
    functools.partial(copy_newest, name="9998", without=bench_lib.DIGESTS),
    functools.partial(copy_newest, name="9997", without="d"),
  ),
  "a temporary folder left over": (
    functools.partial(copy_newest, name="39.orbax-checkpoint-tmp", without="d"),
    functools.partial(copy_newest, name="9999.orbax-checkpoint-tmp", without="*"),
    functools.partial(copy_newest, name="9999.orbax-checkpoint-tmp-17", without=bench_lib.DIGESTS),
  ),
  "metrics.jsonl cut or deleted": (
    cut_metrics,
    lambda workdir: (workdir / "metrics.jsonl").unlink(),
  ),
  "the folder of the run copied": (lambda workdir: None,),
  "checkpoints moved and linked": (move_checkpoints,),
}


def inject_removal(bench: bench_lib.Bench) -> list[bench_lib.Row]:
  """Removes the folder of a run in training, which may end, or create it again and continue."""
  workdir = bench.new_workdir()
  child = bench.launch(workdir)
  child.wait_until(lambda: bool(child.saved))
  away = workdir.rename(workdir.with_name(f"{workdir.name}-away"))
  shutil.rmtree(away)
  if child.wait_for_end() == 0:
    problems, notes = bench.compare(workdir), "created again"
  else:
    problems, notes = bench_lib.expect_refusal(child), "refused to go on"
    shutil.rmtree(workdir, ignore_errors=True)
    problems += bench.finish(workdir)[1]
  return [bench_lib.describe("the run's folder removed", [bench.report(problems)], notes)]


def inject_twins(bench: bench_lib.Bench) -> list[bench_lib.Row]:
  """Two processes start in one folder, at the same time or a little later."""
  results = [start_twins(bench, bench.random.choice((0, 0.5, 2, 5))) for _ in range(3)]
  return [bench_lib.describe("two processes in one folder", results, "the second is refused")]


def start_twins(bench: bench_lib.Bench, delay: float) -> compare.Problems:
  """Exactly one process must train; the other must refuse and name it."""
  workdir = bench.new_workdir()
  children = [bench.launch(workdir)]
  time.sleep(delay)
  children.append(bench.launch(workdir))
  statuses = [child.wait_for_end() for child in children]
  if sorted(statuses) != [0, 2]:
    return bench.report([f"two at once ended with {statuses}: {children[1].errors}"])
  winner, loser = (children[statuses.index(status)] for status in (0, 2))
  problems = bench_lib.expect_refusal(loser)
  if not problems and str(winner.process.pid) not in loser.errors[0]:
    problems = [f"the refusal does not name process {winner.process.pid}: {loser.errors[0]}"]
  return bench.report(problems + bench.compare(workdir))
