"""Images per second of augmentation: Albumentations in one thread, in grain workers, the device.

Command     python -m benchmarks.speed.augment [--images N] [--batch N] [--repeats N]
                [--config FILE] [--json FILE]
"""

import argparse
import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from benchmarks import common
from flax_cifar.data import batches as batches_lib
from flax_cifar.data import dataset, host_feed
from flax_cifar.data.augment import device, host

MEAN = (0.49139968, 0.48215841, 0.44653091)
SKIPPED_BATCHES = 12  # made ahead by grain while its workers start
BASE = "albumentations, 1 thread"


@dataclasses.dataclass
class Case:
  """A way to augment; `run` does it once for all images."""

  run: Callable[[], None]
  startup: float  # seconds, once: compilation or the start of worker processes
  seconds: list[float]


def main() -> None:
  """Measures the op list of the config, and flip with crop, and reports both."""
  options = parse_options()
  config = options.config.augment
  count = max(1, options.images // options.batch) * options.batch
  images = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), np.uint8)
  op_lists = [tuple(config.ops), ("horizontal_flip", "random_crop")]
  rows: list[common.Row] = []
  for ops in op_lists:
    rows += measure(ops, config, images, batch_size=options.batch, repeats=options.repeats)
  common.print_table(rows)
  if options.json:
    common.write_record(options.json, rows)


def parse_options() -> argparse.Namespace:
  parser = common.create_parser(__doc__)
  parser.add_argument(
    "--images", type=common.positive, default=2560, help="per repeat; whole batches are taken"
  )
  parser.add_argument("--batch", type=common.positive, default=128, help="images per batch")
  parser.add_argument("--repeats", type=common.positive, default=5, help="turns of each case")
  parser.add_argument(
    "--config",
    type=common.config_file,
    default="configs/s9.py:published",
    help="whose augment.ops are measured",
  )
  common.add_json(parser)
  return parser.parse_args()


def measure(
  ops: Sequence[str], config: ConfigDict, images: np.ndarray, *, batch_size: int, repeats: int
) -> list[common.Row]:
  """A row per way to apply `ops`."""
  arguments: dict[str, Any] = {"ops": ops, "mean": MEAN}
  arguments |= {name: config[name].to_dict() for name in device.DEVICE_OPS}
  cases = {
    BASE: thread_case(arguments, images),
    "grain, 1 process": grain_case(arguments, images, batch_size, workers=1),
    "grain, 2 processes": grain_case(arguments, images, batch_size, workers=2),
    f"device, {jax.devices()[0].device_kind}": device_case(arguments, images, batch_size),
  }
  timed = common.interleave({name: case.run for name, case in cases.items()}, repeats)
  for name, case in cases.items():
    case.seconds = case.seconds or timed[name]
  base = statistics.median(cases[BASE].seconds)
  return [describe(ops, name, case, len(images), base) for name, case in cases.items()]


def describe(ops: Sequence[str], name: str, case: Case, count: int, base: float) -> common.Row:
  seconds = statistics.median(case.seconds)
  return {
    "ops": " + ".join(ops),
    "case": name,
    "images/s": count / seconds,
    "ratio": base / seconds,
    "slowest": count / max(case.seconds),
    "fastest": count / min(case.seconds),
    "start-up s": case.startup,
  }


def thread_case(arguments: dict[str, Any], images: np.ndarray) -> Case:
  augment = host.create_host_augment(**arguments)
  assert augment

  def run() -> None:
    for example, image in enumerate(images):
      augment(image, (0, 0, example))

  return Case(run, 0.0, [])


def grain_case(
  arguments: dict[str, Any], images: np.ndarray, batch_size: int, *, workers: int
) -> Case:
  """Starts the workers for each repeat, so that they do not work while others are timed."""
  measured = len(images) // batch_size
  batches = batches_lib.TrainBatches(
    dataset.Split(images, np.zeros(len(images), np.int32)),
    batch_size=batch_size,
    total_epochs=1 + math.ceil((SKIPPED_BATCHES + 1) / measured),
    seed=0,
    augment=host.create_host_augment(**arguments),
  )

  def run() -> None:
    started = time.perf_counter()
    stream = host_feed.iterate_batches(batches, start_step=0, workers=workers)
    next(stream)
    case.startup = time.perf_counter() - started
    take(stream, SKIPPED_BATCHES)
    started = time.perf_counter()
    take(stream, measured)
    case.seconds.append(time.perf_counter() - started)
    stream.close()

  case = Case(run, 0.0, [])
  return case


def take(stream: Any, count: int) -> None:
  for _ in range(count):
    next(stream)


def device_case(arguments: dict[str, Any], images: np.ndarray, batch_size: int) -> Case:
  """Images are on the device already; each batch is awaited."""
  augment = device.create_device_augment(**arguments)
  assert augment
  step = jax.jit(augment)
  starts = range(0, len(images), batch_size)
  batches = [jnp.asarray(images[start : start + batch_size]) for start in starts]
  examples = [jnp.arange(start, start + batch_size) for start in starts]
  key, epoch = jax.random.key(0), jnp.int32(0)

  def run() -> None:
    for batch, example in zip(batches, examples, strict=True):
      step(batch, key, epoch, example).block_until_ready()

  started = time.perf_counter()
  run()
  return Case(run, time.perf_counter() - started, [])


if __name__ == "__main__":
  main()
