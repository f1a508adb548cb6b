"""Epochs and seconds until runs reach given accuracies.

Command     python -m benchmarks.accuracy.time_to_accuracy [--config configs/sprint.py]
                [--targets 85 90 93 94] [--pytorch IMAGES_PER_SECOND] [--json FILE]
                [-- any flag of main.py]
            python -m benchmarks.accuracy.time_to_accuracy --runs FOLDER ...

Trains with main.py in a new folder, or takes finished runs, and reads metrics.jsonl. The accuracy
is the one on validation images of the run's protocol, of the weights that would be tested. Seconds
are those of training, without evaluation: as they were, and without compiling, which is that many
times the median epoch. "first step" of benchmarks.speed.start_up has what comes before.

--pytorch adds the seconds that PyTorch would take for the same epochs of the same network, at the
speed that benchmarks.speed.train_step has measured for it on the same cores.
"""

import argparse
import pathlib
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence

from benchmarks import common
from flax_cifar import errors
from flax_cifar.run import finished
from flax_cifar.tools import command_line

Records = Sequence[finished.Record]  # of the epochs of a run


def main() -> None:
  options = parse_options()
  with command_line.one_line_errors():
    runs = [read(folder) for folder in options.runs] or [train(options.config, options.flags)]
  rows = [describe(target, runs, options.pytorch) for target in options.targets]
  common.print_table(rows)
  if options.json:
    common.write_record(options.json, rows)


def parse_options() -> argparse.Namespace:
  parser = common.create_parser(__doc__)
  parser.add_argument("--config", default="configs/sprint.py", help="what is trained")
  parser.add_argument(
    "--runs", nargs="+", default=[], type=pathlib.Path, metavar="FOLDER", help="finished runs"
  )
  parser.add_argument("--targets", nargs="+", type=float, default=[85, 90, 93, 94], help="in %%")
  parser.add_argument("--pytorch", type=float, metavar="IMAGES_PER_SECOND", help="its speed")
  common.add_json(parser)
  parser.add_argument("flags", nargs="*", help="for main.py, after --")
  return parser.parse_args()


def train(config: str, flags: Sequence[str]) -> Records:
  """Trains a run in a folder of its own; ends the program with its status if it fails.

  Raises:
    UserError: the config has no validation images, whose accuracy is the one that counts.
  """
  parser = command_line.create_parser("time_to_accuracy", None)
  _, settings = command_line.parse_with_config(parser, [f"--config={config}", *flags])
  has_validation = settings.protocol == "published" or settings.data.validation_size > 0
  errors.require(has_validation, "--config", config, "a config with validation images")
  with tempfile.TemporaryDirectory() as folder:
    workdir = pathlib.Path(folder, "run")
    program = [sys.executable, "-m", "flax_cifar"]
    command = [*program, f"--config={config}", f"--workdir={workdir}", *flags]
    if status := subprocess.run(command).returncode:
      sys.exit(status)  # main.py has said why
    return read(workdir)


def read(workdir: pathlib.Path) -> Records:
  """The epochs of a finished run; a UserError where there is none, or it was not validated."""
  records = finished.read_run(workdir).records
  validated = all("validation_accuracy" in record for record in records)
  errors.require(validated, "--runs", str(workdir), "a run with validation images")
  return records


def describe(target: float, runs: Sequence[Records], pytorch: float | None = None) -> common.Row:
  """The means of the runs that reached `target`; blanks where none did.

  Args:
    target: accuracy, in percent.
    runs: their epochs.
    pytorch: images per second of PyTorch.
  """
  reached = [(run, number) for run in runs if (number := count_epochs(run, target))]
  times = [[record["seconds"] for record in run] for run, _ in reached]
  epochs = [number for _, number in reached]
  seconds = [sum(spent[:number]) for spent, number in zip(times, epochs, strict=True)]
  steady = [
    number * statistics.median(spent[1:] or spent)
    for spent, number in zip(times, epochs, strict=True)
  ]
  row = {
    "target %": target,
    "runs": f"{len(reached)} of {len(runs)}",
    "epochs": statistics.mean(epochs) if reached else None,
    "seconds": statistics.mean(seconds) if reached else None,
    "sd": statistics.stdev(seconds) if len(seconds) > 1 else None,
    "without compiling": statistics.mean(steady) if reached else None,
    "last %": statistics.mean(100 * run[-1]["validation_accuracy"] for run in runs),
    "of epochs": max(map(len, runs)),
  }
  if pytorch:
    images = [number * count_images(run) for run, number in reached]
    row["PyTorch s"] = statistics.mean(images) / pytorch if reached else None
  return row


def count_images(run: Records) -> float:
  """The images of an epoch."""
  return run[0]["images_per_second"] * run[0]["seconds"]


def count_epochs(run: Records, target: float) -> int | None:
  """How many epochs `run` took to reach `target` % of the validation images; None: never."""
  accuracies = [100 * record["validation_accuracy"] for record in run]
  return next((i for i, accuracy in enumerate(accuracies, 1) if accuracy >= target), None)


if __name__ == "__main__":
  main()
