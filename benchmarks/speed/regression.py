"""Whether the speed of a step has changed since another commit, by turns in one run.

Command     python -m benchmarks.speed.regression [--base COMMIT] [--networks dilated ...]
                [--modes ours "ours bf16" ...] [--task train | predict] [--repeats N] [--least 0.9]

It compares the working tree with COMMIT (by default the commit before) and prints the ratio of
speeds, the median over the turns. The exit status is 1 if one of them is below --least.
"""

import argparse
import contextlib
import pathlib
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks import common
from benchmarks.speed import step_worker, train_step

ROOT = pathlib.Path(__file__).parents[2]


def main() -> None:
  options = parse_options()
  with checked_out(options.base) as folder:
    rows = [
      measure(network, mode, folder, options)
      for network in options.networks
      for mode in options.modes
    ]
  common.print_table(rows)
  slower = [row for row in rows if row["ratio"] < options.least]
  if slower:
    sys.exit(f"error: {len(slower)} of {len(rows)} are slower than {options.least} of the base")


def parse_options() -> argparse.Namespace:
  parser = common.create_parser(__doc__)
  parser.add_argument("--base", default="HEAD~1", help="commit to compare with")
  parser.add_argument("--task", default="train", choices=step_worker.TASKS, help="what is timed")
  common.add_names(parser, "--networks", list(step_worker.NORMS), ["pyramid", "tiny50k"])
  common.add_names(parser, "--modes", list(step_worker.MODES), ["ours"])
  parser.add_argument("--batch", type=common.positive, default=128, help="images per batch")
  parser.add_argument("--repeats", type=common.positive, default=7, help="turns of each side")
  parser.add_argument("--seconds", type=float, default=1.0, help="least length of a turn")
  parser.add_argument("--least", type=float, default=0.9, help="ratio that is no regression")
  return parser.parse_args()


@contextlib.contextmanager
def checked_out(commit: str) -> Iterator[pathlib.Path]:
  """A folder with the files of `commit`, while the block runs."""
  with tempfile.TemporaryDirectory() as temporary:
    folder = pathlib.Path(temporary, "base")
    git("worktree", "add", "--detach", str(folder), commit)
    try:
      yield folder
    finally:
      git("worktree", "remove", "--force", str(folder))


def git(*arguments: str) -> None:
  done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
  if done.returncode:
    sys.exit(f"error: git {' '.join(arguments)}: {done.stderr.strip()}")


def measure(
  network: str, mode: str, folder: pathlib.Path, options: argparse.Namespace
) -> common.Row:
  """A row of images per second at the base and now."""
  arguments: tuple[Any, ...] = (sys.executable, mode, network, options.batch, options.task)
  workers = {
    "base": train_step.Worker(*arguments, folder=folder),
    "now": train_step.Worker(*arguments, folder=ROOT),
  }
  seconds = train_step.take_turns(workers, options.repeats, options.seconds)
  for worker in workers.values():
    worker.close()
  return {"network": network, "mode": mode, **compare(seconds, options.batch)}


def compare(seconds: Mapping[str, Sequence[float]], batch: int) -> dict[str, float]:
  """Images per second of both sides, and the median over the turns of their ratio."""
  ratios = [base / now for base, now in zip(seconds["base"], seconds["now"], strict=True)]
  speeds = {f"{side} images/s": batch / statistics.median(own) for side, own in seconds.items()}
  return {**speeds, "ratio": statistics.median(ratios)}


if __name__ == "__main__":
  main()
