"""Everything worth knowing of an accelerator, most decisive first, in a given time.

Command     python -m benchmarks.accelerator --minutes 8 --out DIR [--data FILE ...]
                [--only ITEM ...]
            python -m benchmarks.accelerator --collect DIR

Each item is a process of its own with a limit of its own; DIR has its record and its log as soon
as it has ended, and items.json tells how each one did. Nothing is installed or downloaded. --data
is CIFAR-10 as one or several npz files (train_images, train_labels, test_images, test_labels; or
train_x, train_y, test_x, test_y), whose arrays are joined; without it and without TFDS_DATA_DIR the
run for accuracy takes the drawn `shapes`. --collect prints the records of DIR as Markdown tables.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks import common
from flax_cifar import files
from flax_cifar.run import tables
from flax_cifar.tools import command_line

SHARE = 0.5  # of the time that is left, at most, for one item: each is to have a turn
NETWORKS = ("dilated", "pyramid", "ghost", "skip", "sprint_wide", "tiny50k")
CONFIGS = [f"configs/{name}" for name in ("sprint.py:wide", "tiny200k.py:long", "s9.py:long")]
MODES = ("ours", "ours bf16", "naive Flax", "PyTorch channels_last", "PyTorch compiled bf16")
NAMES = {"x": "images", "y": "labels"}  # of arrays, in other people's files
DESCRIBE = """
import jax
from flax_cifar import environment
print(environment.get_hardware(len(jax.devices())))
print(environment.get_versions())
print({"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend()))
"""
GPU_TESTS = (
  "tests/test_train.py",
  "tests/run/test_resume.py",
  "tests/data/test_feeds.py",
  "tests/data/augment/test_device.py",
)


@dataclasses.dataclass(frozen=True)
class Item:
  """A command, the most seconds it gets, and whether it takes --json for its record."""

  name: str
  arguments: Sequence[str]
  seconds: float
  has_record: bool = True


def main() -> None:
  options = parse_options()
  if options.collect:
    with command_line.one_line_errors():
      print(collect(options.collect))
    return
  options.out.mkdir(parents=True, exist_ok=True)
  data = join_data(options.data, options.out) if options.data else find_data()
  ends = time.monotonic() + 60 * options.minutes
  records: list[dict[str, Any]] = []
  for item in list_items(data):
    if not options.only or item.name in options.only:
      records.append(run_item(item, options.out, ends - time.monotonic()))
      print(f"{item.name}: {records[-1]['ended']} after {records[-1]['seconds']:.0f} s", flush=True)
      files.write_json(options.out / "items.json", records)
  (options.out / "tables.md").write_text(collect(options.out), encoding="utf-8")


def parse_options() -> argparse.Namespace:
  parser = common.create_parser(__doc__)
  parser.add_argument("--minutes", type=float, default=8, help="in all")
  out = pathlib.Path("accelerator")
  parser.add_argument("--out", type=pathlib.Path, default=out, metavar="DIR", help="for records")
  parser.add_argument(
    "--data", nargs="+", default=[], type=pathlib.Path, metavar="FILE", help="npz files"
  )
  common.add_names(parser, "--only", [item.name for item in list_items("shapes")], [])
  parser.add_argument("--collect", type=pathlib.Path, metavar="DIR", help="records to print")
  return parser.parse_args()


def list_items(data: str) -> list[Item]:
  """What to run, most decisive first; seconds are limits, not estimates."""
  module, batches = "-m", {128: "step", 512: "step_512"}
  steps = [
    Item(
      name,
      [
        *(module, "benchmarks.speed.train_step", "--batch", str(batch), "--repeats", "3"),
        *("--seconds", "0.3", "--networks", *NETWORKS, "--modes", *MODES),
      ],
      240,
    )
    for batch, name in batches.items()
  ]
  epoch = [module, "benchmarks.speed.epoch"]
  accuracy = [module, "benchmarks.accuracy.time_to_accuracy"]
  changes = ["--", f"--config.data.name={data}", "--config.compute_dtype=bfloat16"]
  tests = [module, "pytest", "-vv", "-n", "4", "-p", "no:cacheprovider", *GPU_TESTS]
  profile = [module, "flax_cifar.tools.profile", "--config=configs/s9.py:long", changes[1]]
  return [
    Item("device", ["-c", DESCRIBE], 60, has_record=False),
    Item("tests", [*tests, "-k", "not devices"], 150, has_record=False),
    Item("epoch", [*epoch, "--configs", *CONFIGS], 240),
    Item("sprint", [*accuracy, "--config", "configs/sprint.py:wide", *changes], 120),
    steps[0],
    Item("accuracy", [*accuracy, "--config", "configs/s9.py:long", *changes], 240),
    Item("seeds", [*epoch, "--seeds", "1", "8", "32"], 150),
    Item("scan", [*epoch, "--steps-per-call", "1"], 90),
    steps[1],
    Item("profile", profile, 90, has_record=False),
    Item("augment", [module, "benchmarks.speed.augment"], 90),
  ]


def run_item(item: Item, out: pathlib.Path, left: float) -> dict[str, Any]:
  """Runs `item` in its own time or SHARE of what is `left`, and tells how it ended."""
  arguments = list(item.arguments)
  if item.has_record:  # before what is passed on after --
    place = arguments.index("--") if "--" in arguments else len(arguments)
    arguments[place:place] = ["--json", str(out / f"{item.name}.json")]
  record = {"item": item.name, "seconds": 0.0}
  limit = min(item.seconds, SHARE * left)
  if limit < 1:
    return {**record, "ended": "left out: no time"}
  started = time.monotonic()
  with (out / f"{item.name}.log").open("w", encoding="utf-8") as log:
    process = subprocess.Popen(
      [sys.executable, *arguments],
      stdout=log,
      stderr=subprocess.STDOUT,
      process_group=0,
      env=os.environ | get_platform(out),  # pytest would choose the CPU
    )
    try:
      ended = f"status {process.wait(limit)}"
    except subprocess.TimeoutExpired:
      ended = f"stopped at its limit of {limit:.0f} s"
    finally:
      if process.poll() is None:
        os.killpg(process.pid, 9)  # and the processes that it has started
        process.wait()
  return {**record, "seconds": time.monotonic() - started, "ended": ended}


def get_platform(out: pathlib.Path) -> dict[str, str]:
  """The variable that chooses the platform which the item `device` has found."""
  path = out / "device.log"
  lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
  return {"JAX_PLATFORMS": lines[-1]} if lines and lines[-1].isalpha() else {}


# ---- Data


def find_data() -> str:
  """The value of data.name: CIFAR-10 where it is prepared, else the drawn shapes."""
  prepared = pathlib.Path(os.environ.get("TFDS_DATA_DIR", ""), "cifar10")
  return "cifar10" if "TFDS_DATA_DIR" in os.environ and prepared.is_dir() else "shapes"


def join_data(paths: Sequence[pathlib.Path], out: pathlib.Path) -> str:
  """Joins the arrays of npz files in order under our names; returns the value of data.name."""
  arrays: dict[str, list[np.ndarray]] = {}
  for path in paths:
    with np.load(path, allow_pickle=False) as content:
      for name in content.files:
        split, _, kind = name.partition("_")
        arrays.setdefault(f"{split}_{NAMES.get(kind, kind)}", []).append(content[name])
  joined = out / "data.npz"
  contents: dict[str, Any] = {name: np.concatenate(parts) for name, parts in arrays.items()}
  np.savez(joined, **contents)
  return f"npz:{joined}"


# ---- Tables


def collect(folder: pathlib.Path) -> str:
  """The records of `folder` as Markdown: how the items ended, and a table for each."""
  items = common.read_records(folder / "items.json")
  rows = [[item["item"], item["ended"], f"{item['seconds']:.0f}"] for item in items]
  parts = [tables.format_markdown(["item", "ended", "seconds"], rows)]
  for item in items:
    path = folder / f"{item['item']}.json"
    if path.exists():
      parts.append(format_record(item["item"], json.loads(path.read_text(encoding="utf-8"))))
  return "\n\n".join(parts) + "\n"


def format_record(name: str, record: dict[str, Any]) -> str:
  """One record as a headline, its origin and its table."""
  header = list(dict.fromkeys(key for row in record["rows"] for key in row))
  cells = [[common.format_cell(row.get(key)) for key in header] for row in record["rows"]]
  origin = f"{record['hardware']}, JAX {record['versions']['jax']}, commit {record['commit'][:7]}"
  command = f"    {record['command']}"
  return "\n\n".join([f"## {name}", origin, command, tables.format_markdown(header, cells)])


if __name__ == "__main__":
  main()
