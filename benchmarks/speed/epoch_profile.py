"""The time of an epoch: its part within compiled code, and the operations there.

Command     python -m benchmarks.speed.epoch_profile [--network dilated] [--steps N] [--json FILE]

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

from benchmarks import common
from benchmarks.speed import step_worker

Event = Mapping[str, Any]


def main() -> None:
  from flax_cifar import environment

  environment.apply_settings()
  options = parse_options()
  run = create_epoch(options.network, options.batch)
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


def create_epoch(network: str, batch_size: int) -> Any:
  """A function that trains for a range of steps, as an epoch of train.py does."""
  import jax
  import numpy as np

  from benchmarks.speed import step_worker
  from flax_cifar import metrics, signals, train
  from flax_cifar import state as state_lib
  from flax_cifar.configs import s9
  from flax_cifar.data import dataset, feeds
  from flax_cifar.data.augment import arguments
  from flax_cifar.parallel import mesh as mesh_lib
  from flax_cifar.parallel import seeds as seeds_lib
  from flax_cifar.run import checkpoint

  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (5000, 32, 32, 3), np.uint8)
  mesh, config = mesh_lib.create_mesh(1), s9.get_config("published")
  feed = feeds.create_feed(
    dataset.Split(images, rng.integers(0, 10, 5000).astype(np.int32)),
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
    **{name: config.augment[name].to_dict() for name in arguments.RULES},
  )
  state, parts = step_worker.create_parts(network)
  state = jax.device_put(state, mesh_lib.replicated(mesh))
  step = functools.partial(train.train_step, **parts)
  steps_fn = seeds_lib.compile_steps(
    step, feed.get_batch, input_axes=feed.seed_axes, num_seeds=1, mesh=mesh
  )
  progress = state_lib.Progress(0, state, metrics.create_totals(1), [])
  guard = signals.InterruptGuard()
  policy = checkpoint.SavePolicy(every=1, every_steps=0, every_minutes=0)

  def run(steps: range) -> None:
    chunks = feed.chunks(steps)
    train.train_chunks(progress, chunks, steps_fn, guard, policy, lambda totals, count: None)

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
