"""Seconds of an epoch as a run makes it: data on the device, several seeds at once.

Command     python -m benchmarks.speed.epoch [--networks NAME ...] [--seeds 1 8 32] [--batch N]
                [--images N] [--dtype bfloat16] [--repeats N] [--steps-per-call N] [--json FILE]

Trains over noise with the augmentation of configs/s9.py:published. On an accelerator an epoch is
one call of compiled code, unless --steps-per-call says otherwise.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

from benchmarks import common
from benchmarks.speed import step_worker


def main() -> None:
  from flax_cifar import environment

  environment.apply_settings()
  options = parse_options()
  rows = []
  for network in options.networks:
    for num_seeds in options.seeds:
      rows.append(measure(network, num_seeds, options))
      print(rows[-1], flush=True)
      if options.json:
        common.write_json(options.json, rows)
  common.print_table(rows)


def parse_options() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  networks = list(step_worker.NORMS)
  parser.add_argument("--networks", nargs="+", default=["dilated"], choices=networks)
  parser.add_argument("--seeds", nargs="+", type=common.positive, default=[1])
  parser.add_argument("--batch", type=common.positive, default=128)
  parser.add_argument("--images", type=common.positive, default=50_000)
  parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
  parser.add_argument("--repeats", type=common.positive, default=3)
  parser.add_argument("--steps-per-call", type=int, default=0, help="0 leaves it to the device")
  parser.add_argument("--json", default="", help="file for the record")
  return parser.parse_args()


def measure(network: str, num_seeds: int, options: argparse.Namespace) -> dict[str, Any]:
  """The row of one network; the first epoch, which compiles, counts by itself."""
  run, steps = create_epoch(
    network,
    options.batch,
    num_images=options.images,
    num_seeds=num_seeds,
    dtype=options.dtype,
    steps_per_call=options.steps_per_call,
  )
  seconds = []
  for epoch in range(options.repeats + 1):
    started = time.perf_counter()
    run(range(epoch * steps, (epoch + 1) * steps))
    seconds.append(time.perf_counter() - started)
  median = statistics.median(seconds[1:])
  return {
    "network": network,
    "dtype": options.dtype,
    "seeds": num_seeds,
    "first epoch s": seconds[0],
    "epoch s": median,
    "fastest s": min(seconds[1:]),
    "slowest s": max(seconds[1:]),
    "images/s of all seeds": num_seeds * steps * options.batch / median,
  }


def create_epoch(
  network: str,
  batch_size: int,
  *,
  num_images: int,
  num_seeds: int = 1,
  dtype: str = "float32",
  steps_per_call: int = 0,
) -> tuple[Callable[[range], None], int]:
  """A function that trains for a range of steps of one epoch as train.py does, and their number."""
  import numpy as np

  from flax_cifar import metrics, signals, train
  from flax_cifar import state as state_lib
  from flax_cifar.configs import s9
  from flax_cifar.data import dataset, feeds
  from flax_cifar.data.augment import arguments
  from flax_cifar.parallel import mesh as mesh_lib
  from flax_cifar.parallel import seeds as seeds_lib
  from flax_cifar.run import checkpoint

  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (num_images, 32, 32, 3), np.uint8)
  mesh, config = mesh_lib.create_mesh(1), s9.get_config("published")
  feed = feeds.create_feed(
    dataset.Split(images, rng.integers(0, 10, num_images).astype(np.int32)),
    backend="device",
    workers=0,
    ops=config.augment.ops,
    mean=(0.5, 0.5, 0.5),
    batch_size=batch_size,
    total_epochs=1,
    steps_per_call=steps_per_call,
    seed=0,
    num_seeds=num_seeds,
    mesh=mesh,
    op_arguments={name: config.augment[name].to_dict() for name in arguments.RULES},
  )
  states = []
  for _ in range(num_seeds):
    state, parts = step_worker.create_parts(network, dtype)
    states.append(state)
  state = mesh_lib.place(seeds_lib.stack(states), mesh_lib.split_seeds(mesh))
  steps_fn = seeds_lib.compile_steps(
    functools.partial(train.train_step, **parts),
    feed.get_batch,
    input_axes=feed.seed_axes,
    num_seeds=num_seeds,
    mesh=mesh,
  )
  progress = state_lib.Progress(0, state, metrics.create_totals(num_seeds), [])
  guard = signals.InterruptGuard()
  policy = checkpoint.SavePolicy(every=1, every_steps=0, every_minutes=0)

  def run(steps: range) -> None:
    chunks = feed.chunks(steps)
    train.train_chunks(progress, chunks, steps_fn, guard, policy, lambda totals, count: None)

  return run, feed.steps_per_epoch


if __name__ == "__main__":
  main()
