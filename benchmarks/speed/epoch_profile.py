"""The time of an epoch: its part within compiled code, and the operations there.

Command     python -m benchmarks.speed.epoch_profile [--config configs/s9.py:long] [--batch N]
                [--dtype float32] [--steps N] [--json FILE]

Runs the loop of flax_cifar.train over noise on the device, as the config says, under JAX's
profiler, after as many steps to compile and to get memory.
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
from benchmarks.speed import epoch

Event = Mapping[str, Any]


def main() -> None:
  from flax_cifar import environment

  environment.apply_settings()
  options = parse_options()
  config = epoch.change(options.config, 1, options)
  run, _ = epoch.create_epoch(config, num_images=config.batch_size * 2 * options.steps)
  run(range(options.steps))  # as many, because a GPU makes them in one program
  events, seconds = profile(lambda: run(range(options.steps, 2 * options.steps)))
  operations = [event for event in events if "hlo_op" in event.get("args", {})]
  compiled = union_seconds(operations)
  print(f"{options.steps} steps of {config.name} took {seconds:.2f} s with the profiler on")
  print(f"in compiled code {compiled:.2f} s; outside {100 * (1 - compiled / seconds):.2f} %\n")
  rows = list_operations(operations, options.steps)
  common.print_table(rows[:14])
  if options.json:
    summary = {"operation": "in compiled code", "ms a step": 1000 * compiled / options.steps}
    total = {"operation": "whole epoch", "ms a step": 1000 * seconds / options.steps}
    common.write_json(options.json, [*rows, summary, total])


def parse_options() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  default = common.config_file("configs/s9.py:long")
  parser.add_argument("--config", default=default, type=common.config_file)
  parser.add_argument("--batch", type=common.positive, help="instead of that of the config")
  parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
  parser.add_argument("--steps-per-call", type=int, default=0, help="0 leaves it to the device")
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
