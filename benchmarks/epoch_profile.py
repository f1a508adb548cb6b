"""Where an epoch's time goes: what share is spent in compiled code, and in which operations.

Command     python -m benchmarks.epoch_profile [--network dilated] [--steps N] [--json FILE]

Runs the loop of flax_cifar.train over noise on the device, with the augmentation of
configs/s9.py:published, under JAX's profiler, after as many steps to compile and to get memory.
"""

import argparse
import collections
import functools
import glob
import gzip
import json
import re
import tempfile
import time
from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.common import Row, positive, print_table, write_json
from benchmarks.step_worker import NORMS

Event = Mapping[str, Any]


def main() -> None:
  from flax_cifar.settings import apply_settings

  apply_settings()
  options = parse_options()
  run = create_epoch(options.network, options.batch)
  run(range(options.steps))  # as many, because a GPU makes them in one program
  events, seconds = profile(lambda: run(range(options.steps, 2 * options.steps)))
  operations = [event for event in events if "hlo_op" in event.get("args", {})]
  compiled = union_seconds(operations)
  print(f"{options.steps} steps of {options.network} took {seconds:.2f} s with the profiler on")
  print(f"in compiled code {compiled:.2f} s; outside {100 * (1 - compiled / seconds):.2f} %\n")
  rows = list_operations(operations, options.steps)
  print_table(rows[:14])
  if options.json:
    summary = {"operation": "in compiled code", "ms a step": 1000 * compiled / options.steps}
    total = {"operation": "whole epoch", "ms a step": 1000 * seconds / options.steps}
    write_json(options.json, [*rows, summary, total])


def parse_options() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--network", default="dilated", choices=list(NORMS))
  parser.add_argument("--batch", type=positive, default=128)
  parser.add_argument("--steps", type=positive, default=12)
  parser.add_argument("--json", default="", help="file for the record")
  return parser.parse_args()


def create_epoch(network: str, batch_size: int) -> Any:
  """A function that trains for a range of steps, as an epoch of train.py does."""
  import jax
  import numpy as np

  from benchmarks.step_worker import create_parts
  from configs import s9
  from flax_cifar import train
  from flax_cifar.data.augment_arguments import RULES
  from flax_cifar.data.dataset import Split
  from flax_cifar.data.feeds import create_feed
  from flax_cifar.evaluate import never
  from flax_cifar.metrics import create_totals
  from flax_cifar.partition import create_mesh, replicated

  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (5000, 32, 32, 3), np.uint8)
  mesh, config = create_mesh(1), s9.get_config("published")
  feed = create_feed(
    Split(images, rng.integers(0, 10, 5000).astype(np.int32)),
    backend="device",
    workers=0,
    ops=config.augment.ops,
    mean=(0.5, 0.5, 0.5),
    batch_size=batch_size,
    total_epochs=1,
    steps_per_call=0,
    seed=0,
    num_seeds=1,
    mesh=mesh,
    **{name: config.augment[name].to_dict() for name in RULES},
  )
  state, parts = create_parts(network)
  state = jax.device_put(state, replicated(mesh))
  step = functools.partial(train.train_step, **parts)
  steps_fn = train.create_steps_fn(step, feed, num_seeds=1, mesh=mesh)

  def run(steps: range) -> None:
    nonlocal state
    state, _, _ = train.train_epoch(
      steps_fn,
      state,
      create_totals(1),
      feed.calls(steps),
      done=steps.start,
      stop=never,
      report=lambda totals, count: None,
    )

  return run


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


def list_operations(events: Iterable[Event], steps: int) -> list[Row]:
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
