"""Epochs and seconds until a run reaches given accuracies.

Command     python -m benchmarks.accuracy.time_to_accuracy [--config configs/s9.py]
                [--targets 85 87.31 90] [--json FILE] [-- any flag of main.py]

Trains with main.py in a new folder and reads its metrics.jsonl. The accuracy is the one on
validation images of the run's protocol, of the weights that would be tested. Seconds are those of
training, without evaluation; "first step" of benchmarks.speed.start_up has what comes before.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

from benchmarks import common


def main() -> None:
  options = parse_options()
  with tempfile.TemporaryDirectory() as folder:
    workdir = pathlib.Path(folder, "run")
    command = [sys.executable, "main.py", f"--config={options.config}", f"--workdir={workdir}"]
    status = subprocess.run([*command, *options.flags]).returncode
    if status:
      sys.exit(status)  # main.py has said why
    records = [
      json.loads(line) for line in (workdir / "metrics.jsonl").read_text("utf-8").splitlines()
    ]
  rows = [describe(options.config, target, records) for target in options.targets]
  common.print_table(rows)
  if options.json:
    common.write_json(options.json, rows)


def parse_options() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--config", default="configs/s9.py")
  parser.add_argument("--targets", nargs="+", type=float, default=[85, 87.31, 90], help="in %%")
  parser.add_argument("--json", default="", help="file for the record")
  parser.add_argument("flags", nargs="*", help="for main.py, after --")
  return parser.parse_args()


def describe(config: str, target: float, records: list[dict]) -> common.Row:
  """Blanks where the target was not reached."""
  accuracies = [100 * record["validation_accuracy"] for record in records]
  epochs = next((i for i, accuracy in enumerate(accuracies, 1) if accuracy >= target), None)
  seconds = sum(record["seconds"] for record in records[:epochs]) if epochs else None
  return {
    "config": config,
    "target %": target,
    "epochs": epochs,
    "seconds": seconds,
    "best %": max(accuracies),
    "last %": accuracies[-1],
    "of epochs": len(records),
  }


if __name__ == "__main__":
  main()
