"""Seconds of an epoch as a run makes it: data on the device, several seeds at once.

Command     python -m benchmarks.speed.epoch [--configs FILE[:variant] ...] [--seeds 1 8 32]
                [--batch N] [--images N] [--dtype float32] [--repeats N] [--steps-per-call N]
                [--json FILE]

Trains over noise with the optimizer, schedule and augmentation of each config. On an accelerator an
epoch is one call of compiled code, unless --steps-per-call says otherwise. FLAX_CIFAR_KERNELS
chooses the kernels.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from benchmarks import common
from flax_cifar.tools import command_line


def main() -> None:
  from flax_cifar import environment

  environment.apply_settings()
  options = parse_options()
  rows: list[dict[str, Any]] = []
  with command_line.one_line_errors():
    configs = [command_line.load_config(text, "configs") for text in options.configs]
    for config, num_seeds in itertools.product(configs, options.seeds):
      rows.append(measure(change(config, num_seeds, options), options))
      print(rows[-1], flush=True)
      if options.json:
        common.write_record(options.json, rows)
  common.print_table(rows)


def parse_options() -> argparse.Namespace:
  parser = common.create_parser(__doc__)
  parser.add_argument(
    "--configs", nargs="+", default=["configs/s9.py:long"], metavar="FILE", help="as main.py has it"
  )
  parser.add_argument(
    "--seeds", nargs="+", type=common.positive, default=[1], metavar="N", help="trained together"
  )
  parser.add_argument("--batch", type=common.positive, help="instead of that of the config")
  parser.add_argument("--images", type=common.positive, default=50_000, help="per epoch")
  parser.add_argument(
    "--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="of products"
  )
  parser.add_argument("--repeats", type=common.positive, default=3, help="epochs after the first")
  parser.add_argument("--steps-per-call", type=int, default=0, help="0 leaves it to the device")
  common.add_json(parser)
  return parser.parse_args()


def change(config: ConfigDict, num_seeds: int, options: argparse.Namespace) -> ConfigDict:
  """`config` with what the command line says."""
  changed = config.copy_and_resolve_references()
  changed.batch_size = options.batch or config.batch_size
  changed.num_seeds, changed.compute_dtype = num_seeds, options.dtype
  changed.steps_per_call = options.steps_per_call
  return changed


def measure(config: ConfigDict, options: argparse.Namespace) -> dict[str, Any]:
  """The row of one config; the first epoch, which compiles, counts by itself."""
  from flax_cifar.kernels import backend

  run, steps = create_epoch(config, num_images=options.images)
  seconds = []
  for epoch in range(options.repeats + 1):
    started = time.perf_counter()
    run(range(epoch * steps, (epoch + 1) * steps))
    seconds.append(time.perf_counter() - started)
  median = statistics.median(seconds[1:])
  return {
    "config": config.name,
    "kernels": backend.select_backend(),
    "dtype": config.compute_dtype,
    "batch": config.batch_size,
    "seeds": config.num_seeds,
    "first epoch s": seconds[0],
    "epoch s": median,
    "fastest s": min(seconds[1:]),
    "slowest s": max(seconds[1:]),
    "ms a step": 1000 * median / steps,
    "images/s of all seeds": config.num_seeds * steps * config.batch_size / median,
  }


def create_epoch(config: ConfigDict, *, num_images: int) -> tuple[Callable[[range], None], int]:
  """A function that trains for a range of steps of one epoch as train.py does, and their number."""
  import numpy as np

  from flax_cifar import metrics, signals, train
  from flax_cifar import state as state_lib
  from flax_cifar.data import dataset
  from flax_cifar.parallel import mesh as mesh_lib
  from flax_cifar.run import checkpoint, setup

  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (num_images, 32, 32, 3), np.uint8)
  split = dataset.Split(images, rng.integers(0, 10, num_images).astype(np.int32))
  mesh = mesh_lib.create_mesh(1, config.num_seeds)
  ready = setup.create_setup(
    config,
    train.train_step,
    split,
    class_names=tuple("0123456789"),
    mean=(0.5,) * 3,
    std=(0.25,) * 3,
    mesh=mesh,
  )
  feed, totals = ready.feed, metrics.create_totals(config.num_seeds)
  progress = state_lib.Progress(0, ready.state, totals, [])
  guard = signals.InterruptGuard()
  policy = checkpoint.SavePolicy(every=1, every_steps=0, every_minutes=0)

  def run(steps: range) -> None:
    chunks = feed.chunks(steps)
    train.train_chunks(progress, chunks, ready.steps_fn, guard, policy, lambda totals, count: None)

  return run, feed.steps_per_epoch


if __name__ == "__main__":
  main()
