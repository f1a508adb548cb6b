"""Seconds until a run computes: imports, and the first training step with and without the cache.

Command     python -m benchmarks.speed.start_up [--networks dilated pyramid] [--repeats N]
                [--json FILE]

Each figure is of a whole process, from its start: the imports alone, or until the first step of
batch 128 is done. "cold" starts with an empty compilation cache, "cached" finds what "cold" left.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time

from benchmarks import common
from benchmarks.speed import step_worker, train_step


def main() -> None:
  options = parse_options()
  rows: list[common.Row] = [
    describe("-", "imports", [time_imports() for _ in range(options.repeats)])
  ]
  for network in options.networks:
    cold, cached = [], []
    for _ in range(options.repeats):
      with tempfile.TemporaryDirectory() as cache:
        cold.append(time_first_step(network, cache))
        cached.append(time_first_step(network, cache))
    rows += [describe(network, "first step, cold", cold)]
    rows += [describe(network, "first step, cached", cached)]
  common.print_table(rows)
  if options.json:
    common.write_record(options.json, rows)


def parse_options() -> argparse.Namespace:
  parser = common.create_parser(__doc__)
  common.add_names(parser, "--networks", list(step_worker.NORMS), ["dilated", "pyramid"])
  parser.add_argument("--repeats", type=common.positive, default=3, help="processes of each kind")
  common.add_json(parser)
  return parser.parse_args()


def time_imports() -> float:
  started = time.perf_counter()
  subprocess.run([sys.executable, "-c", "import flax_cifar.train"], check=True)
  return time.perf_counter() - started


def time_first_step(network: str, cache: str) -> float:
  environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": cache}
  started = time.perf_counter()
  worker = train_step.Worker(sys.executable, "ours", network, 128, environment=environment)
  seconds = time.perf_counter() - started
  worker.close()
  return seconds


def describe(network: str, what: str, seconds: list[float]) -> common.Row:
  return {
    "network": network,
    "until": what,
    "seconds": statistics.median(seconds),
    "fastest": min(seconds),
    "slowest": max(seconds),
  }


if __name__ == "__main__":
  main()
