"""The time of an epoch: its part within compiled code, and the operations there.

Command     python -m benchmarks.speed.epoch_profile [--network dilated] [--steps N] [--json FILE]

Runs the loop of flax_cifar.train over noise on the device, with the augmentation of
configs/s9.py:published, under JAX's profiler, after as many steps to compile and to get memory.
"""

import argparse
import collections
import glob
import gzip
import json
import re
import tempfile
import time
from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks import common
from benchmarks.speed import epoch, step_worker

Event = Mapping[str, Any]


def main() -> None:
  from flax_cifar import environment

  environment.apply_settings()
  options = parse_options()
  run, _ = epoch.create_epoch(options.network, options.batch, num_images=5000)
  run(range(options.steps))  # as many, because a GPU makes them in one program
  events, seconds = profile(lambda: run(range(options.steps, 2 * options.steps)))
  operations = [event for event in events if "hlo_op" in event.get("args", {})]
  compiled = union_seconds(operations)
  print(f"{options.steps} steps of {options.network} took {seconds:.2f} s with the profiler on")
  print(f"in compiled code {compiled:.2f} s; outside {100 * (1 - compiled / seconds):.2f} %\n")
  rows = list_operations(operations, options.steps)
  common.print_table(rows[:14])
  if options.json:
    summary = {"operation": "in compiled code", "ms a step": 1000 * compiled / options.steps}
    total = {"operation": "whole epoch", "ms a step": 1000 * seconds / options.steps}
    common.write_json(options.json, [*rows, summary, total])


def parse_options() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--network", default="dilated", choices=list(step_worker.NORMS))
  parser.add_argument("--batch", type=common.positive, default=128)
  parser.add_argument("--steps", type=common.positive, default=12)
  parser.add_argument("--json", default="", help="file for the record")
  return parser.parse_args()


def profile(run: Any) -> tuple[list[Event], float]:
  """The trace's events and the seconds that `run` took."""
  import jax

  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder, create_perfetto_trace=True):
      started = time.perf_counter()
      run()
      seconds = time.perf_counter() - started
    (path,) = glob.glob(f"{folder}/**/perfetto_trace.json.gz", recursive=True)
    with gzip.open(path) as file:
      trace = json.load(file)
  events = trace["traceEvents"] if isinstance(trace, dict) else trace
  return [event for event in events if event.get("ph") == "X"], seconds


def union_seconds(events: Iterable[Event]) -> float:
  """The time in which at least one of `events` ran."""
  total, end = 0.0, 0.0
  for start, stop in sorted((e["ts"], e["ts"] + e["dur"]) for e in events):
    total += max(0.0, stop - max(start, end))
    end = max(end, stop)
  return total / 1e6


def list_operations(events: Iterable[Event], steps: int) -> list[common.Row]:
  """Milliseconds a step of each kind of operation, the longest first."""
  seconds: collections.Counter[str] = collections.Counter()
  for event in events:
    seconds[re.sub(r"[.\d]+$", "", event["args"]["hlo_op"])] += event["dur"] / 1e6
  total = seconds.total()
  return [
    {"operation": name, "ms a step": 1000 * value / steps, "%": 100 * value / total}
    for name, value in seconds.most_common()
  ]


if __name__ == "__main__":
  main()
