"""A process on all cores, compared with a process for each core, by turns in one run.

Command     python -m benchmarks.speed.cores [--networks dilated ...] [--modes ours "ours bf16" ...]
                [--repeats N]

"together" is the sum of the processes that are pinned to a core each and train at the same time;
"ratio" is what one process on all cores makes of it, the median over the turns. Linux only.
"""

import argparse
import os
import statistics
import sys
from collections.abc import Sequence
from concurrent import futures

from benchmarks import common
from benchmarks.speed import step_worker, train_step


def main() -> None:
  options = parse_options()
  rows = [measure(network, mode, options) for network in options.networks for mode in options.modes]
  common.print_table(rows)
  if options.json:
    common.write_record(options.json, rows)


def parse_options() -> argparse.Namespace:
  parser = common.create_parser(__doc__)
  networks = ("dilated", "ghost", "tiny50k")
  common.add_names(parser, "--networks", list(step_worker.NORMS), networks)
  common.add_names(parser, "--modes", list(step_worker.MODES), ["ours"])
  parser.add_argument("--batch", type=common.positive, default=128, help="images per batch")
  parser.add_argument("--repeats", type=common.positive, default=7, help="turns of each side")
  parser.add_argument("--seconds", type=common.duration, default=2.0, help="least length of a turn")
  common.add_json(parser)
  return parser.parse_args()


def measure(network: str, mode: str, options: argparse.Namespace) -> common.Row:
  """A row of images per second of one process, and of one for each core together."""
  cores = sorted(os.sched_getaffinity(0))
  alone = start_worker(network, mode, options.batch, cores)
  pinned = [start_worker(network, mode, options.batch, [core]) for core in cores]
  one, together = [], []
  for _ in range(options.repeats):
    one += measure_speed([alone], options)
    together.append(sum(measure_speed(pinned, options)))
  for worker in [alone, *pinned]:
    worker.close()
  return {
    "network": network,
    "mode": mode,
    "one process": statistics.median(one),
    "slowest": min(one),
    "fastest": max(one),
    "together": statistics.median(together),
    "ratio": statistics.median(mine / both for mine, both in zip(one, together, strict=True)),
  }


def start_worker(network: str, mode: str, batch: int, cores: Sequence[int]) -> train_step.Worker:
  """A worker that inherits the cores of this process, which gets its own back."""
  own = os.sched_getaffinity(0)
  os.sched_setaffinity(0, cores)
  try:
    return train_step.Worker(sys.executable, mode, network, batch)
  finally:
    os.sched_setaffinity(0, own)


def measure_speed(workers: Sequence[train_step.Worker], options: argparse.Namespace) -> list[float]:
  """Images per second of each of the workers, which compute at the same time."""
  with futures.ThreadPoolExecutor(len(workers)) as pool:
    steps = [max(1, round(options.seconds / s)) for s in pool.map(lambda w: w.measure(1), workers)]
    seconds = pool.map(lambda worker, count: worker.measure(count), workers, steps)
  return [options.batch / second for second in seconds]


if __name__ == "__main__":
  main()
