"""Measures how memory, open files, threads and seconds per epoch grow in a long run.

Command     python -m tests.stress.soak [--epochs 200] [--config configs/quickstart.py]
                                      [--backends device albumentations] [--output FILE]
                                      [-- any flag of main.py]

Runs main.py unchanged in a new folder, on a slice of its data, with TensorBoard, an evaluation and
a checkpoint each epoch. At each new line of metrics.jsonl it measures the process from outside:
memory, open files and threads are sums over the process and its children. The seconds of an epoch
are the time between two lines, so they include the evaluation and the checkpoint.

A checkpoint is written in the background; meanwhile there are more threads and files and up to 100
MiB more memory. So the level is the minimum of 20 epochs, which a leak raises and a save does not;
the level of seconds is their median. A slope is fitted by least squares to the levels after the
20th epoch, when every program is compiled. A second slope is fitted to the later half of them,
because a leak continues and a cache that fills does not. The standard error allows for correlation
between neighbors.

A slope grows if it is above its tolerance, and above 0 by two standard errors. It does not grow if
the slope plus two standard errors is at most the tolerance; otherwise it is too noisy to tell. A
quantity grows if both its slopes do, and does not grow if the later one does not.
"""

import argparse
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import psutil

from benchmarks import common
from flax_cifar.run import tables

Sample = dict[str, Any]
Row = dict[str, Any]

BACKENDS = ("device", "albumentations")
BLOCK = 20  # epochs per level
WARM_UP = 20  # epochs that the slopes leave out
RECENT = 20  # epochs whose median seconds are printed
MIN_EPOCHS = WARM_UP + 6 * BLOCK  # half of the levels must suffice for a standard error
GROWS, STAYS, UNCLEAR = "grows", "does not grow", "too noisy to tell"
POLL_SECONDS = 0.01
MIB = 2**20
FLAGS = {  # so that an epoch is well under a second
  "data.limit": 256,
  "data.validation_size": 64,
  "batch_size": 32,
  "checkpoint.every": 1,
  "log.tensorboard": True,
}
# Quantity -> unit, and the growth per 100 epochs that may be noise of the machine. "%": of the
# median.
TOLERANCES = {
  "rss": ("MiB", 2.0),
  "files": ("files", 0.5),
  "threads": ("threads", 0.5),
  "epoch_seconds": ("%", 5.0),
}


def main() -> None:
  options = parse_options()
  rows: list[Row] = []
  for backend in options.backends:
    samples = soak(backend, options)
    slopes = [describe_slope(backend, name, samples) for name in TOLERANCES]
    rows += [*({"backend": backend, **sample} for sample in samples), *slopes]
    print(format_samples(backend, samples, options.epochs))
    print(format_slopes(slopes), flush=True)
  if options.output:
    common.write_json(options.output, rows)
  sys.exit(any(row.get("verdict") == GROWS for row in rows))


def parse_options() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--epochs", type=int, default=200)
  parser.add_argument("--config", default="configs/quickstart.py")
  parser.add_argument("--backends", nargs="+", default=BACKENDS, choices=BACKENDS)
  parser.add_argument("--output", default="", help="file for the record, with every sample")
  parser.add_argument("flags", nargs="*", help="for main.py, after --")
  options = parser.parse_args()
  if options.epochs < MIN_EPOCHS:
    parser.error(f"--epochs={options.epochs}: a fit needs {MIN_EPOCHS} or more")
  return options


# ---- The run and its samples


def soak(backend: str, options: argparse.Namespace) -> list[Sample]:
  """A sample for each epoch of a run with `backend`."""
  flags = {**FLAGS, "augment.backend": backend, "total_epochs": options.epochs}
  with tempfile.TemporaryDirectory(prefix="soak-") as folder:
    workdir, screen = pathlib.Path(folder, "run"), pathlib.Path(folder, "screen.txt")
    command = [
      *(sys.executable, "main.py", f"--config={options.config}", f"--workdir={workdir}"),
      *(f"--config.{key}={value}" for key, value in flags.items()),
      *options.flags,
    ]
    environment = {**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1"}
    with screen.open("w") as file:
      process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
      try:
        samples = list(sample_epochs(process, workdir / "metrics.jsonl"))
      finally:
        process.kill()  # has no effect unless this script failed
        process.wait()
    if len(samples) < options.epochs:
      raise RuntimeError(f"{backend} ended after {len(samples)} epochs:\n{screen.read_text()}")
  return samples


def sample_epochs(process: subprocess.Popen, metrics: pathlib.Path) -> Iterator[Sample]:
  """Measures `process` whenever `metrics` has a new line, until it ends."""
  root, seen, last = psutil.Process(process.pid), 0, None
  while process.poll() is None:
    text = metrics.read_text() if metrics.exists() else ""
    lines = text.split("\n")[:-1]  # the last one may be half written
    now = time.perf_counter()
    for line in lines[seen:]:  # more than one only if this loop was delayed
      record = json.loads(line)
      yield {
        "epoch": record["epoch"],
        **measure(root),
        "epoch_seconds": now - last if last else None,
        "train_seconds": record["seconds"],
      }
      last = now
    seen = len(lines)
    time.sleep(POLL_SECONDS)


def measure(root: psutil.Process) -> Sample:
  """Memory in MiB, open files and threads of a process and its children."""
  processes = [root, *root.children(recursive=True)]
  sums = {"rss": 0.0, "files": 0, "threads": 0}
  for process in processes:
    try:
      with process.oneshot():
        found = process.memory_info().rss / MIB, process.num_fds(), process.num_threads()
    except psutil.NoSuchProcess:  # a child that has just ended
      continue
    sums = {name: total + new for (name, total), new in zip(sums.items(), found, strict=True)}
  return sums


# ---- Slopes


def describe_slope(backend: str, name: str, samples: Sequence[Sample]) -> Row:
  """The slope of `name` per 100 epochs, its standard error, and the verdict."""
  unit, tolerance = TOLERANCES[name]
  levels = get_levels(name, samples)
  if unit == "%":
    levels *= 100 / np.median(levels)
  slope, error = fit_slope(levels)
  late_slope, late_error = fit_slope(levels[len(levels) // 2 :])
  verdicts = get_verdict(slope, error, tolerance), get_verdict(late_slope, late_error, tolerance)
  return {
    "backend": backend,
    "quantity": name,
    "unit": unit,
    "slope": slope,
    "error": error,
    "late_slope": late_slope,
    "late_error": late_error,
    "tolerance": tolerance,
    "verdict": combine_verdicts(*verdicts),
  }


def get_levels(name: str, samples: Sequence[Sample]) -> np.ndarray:
  """The level of `name` in each block of epochs after the warm-up."""
  values = np.array([sample[name] for sample in samples[WARM_UP:]], float)
  blocks = values[: len(values) // BLOCK * BLOCK].reshape(-1, BLOCK)
  return np.median(blocks, 1) if name == "epoch_seconds" else blocks.min(1)


def fit_slope(levels: np.ndarray) -> tuple[float, float]:
  """The least-squares slope per 100 epochs, and its standard error.

  The residuals of a process are not independent, so the error is widened by their correlation with
  the previous one, as for a first-order autoregression.
  """
  x, y = np.arange(len(levels)) * BLOCK / 100, levels
  centered = x - x.mean()
  slope = float(centered @ y / (centered @ centered))
  residuals = y - y.mean() - slope * centered
  square = float(residuals @ residuals)
  if square == 0:
    return slope, 0.0
  correlation = min(max(float(residuals[1:] @ residuals[:-1]) / square, 0.0), 0.99)
  error = math.sqrt(square / (len(x) - 2) / float(centered @ centered))
  return slope, error * math.sqrt((1 + correlation) / (1 - correlation))


def get_verdict(slope: float, error: float, tolerance: float) -> str:
  if slope > max(2 * error, tolerance):
    return GROWS
  return STAYS if slope + 2 * error <= tolerance else UNCLEAR


def combine_verdicts(overall: str, later: str) -> str:
  if later == STAYS:
    return STAYS
  return GROWS if overall == later == GROWS else UNCLEAR


# ---- Tables


def format_samples(backend: str, samples: Sequence[Sample], epochs: int) -> str:
  header = [
    "backend",
    "epoch",
    "RSS MiB",
    "most",
    "open files",
    "threads",
    "s per epoch",
    "of steps",
  ]
  marks = sorted({mark for mark in (10, 50, 100, 150, 200) if mark < epochs} | {epochs})
  rows = [[backend, str(mark), *_cells(samples[:mark])] for mark in marks]
  return tables.format_markdown(header, rows)


def _cells(samples: Sequence[Sample]) -> list[str]:
  """The levels of the last epochs, the maximum memory so far, the median seconds."""
  last, recent = samples[-BLOCK:], samples[-RECENT:]
  rss, files, threads = (
    min(sample[name] for sample in last) for name in ("rss", "files", "threads")
  )
  most = max(sample["rss"] for sample in samples)
  seconds = statistics.median(s["epoch_seconds"] for s in recent if s["epoch_seconds"] is not None)
  train = statistics.median(s["train_seconds"] for s in recent)
  return [f"{rss:.1f}", f"{most:.1f}", str(files), str(threads), f"{seconds:.3f}", f"{train:.3f}"]


def format_slopes(slopes: Sequence[Mapping[str, Any]]) -> str:
  header = ["backend", "quantity", "per 100 epochs", "later half", "tolerance", "verdict"]
  rows = []
  for row in slopes:
    fits = [(row["slope"], row["error"]), (row["late_slope"], row["late_error"])]
    numbers = [f"{slope:+.2f} ± {error:.2f} {row['unit']}" for slope, error in fits]
    names = [row["backend"], row["quantity"]]
    rows.append([*names, *numbers, f"{row['tolerance']:g}", row["verdict"]])
  return tables.format_markdown(header, rows)


if __name__ == "__main__":
  main()
