"""Writes the network of a checkpoint into a weights file, which every other program reads.

  python -m flax_cifar.tools.extract runs/NAME --out=best.safetensors
  python -m flax_cifar.tools.extract runs/NAME --checkpoint=latest --seed=1 --out=now.safetensors

A run writes the weights of its last epoch, and of its first seed, at its end. Its checkpoints also
hold the other seeds, the epoch with the highest validation accuracy among those that it saved (of
equal ones the last), and, while it trains, the newest state. This program needs the data of the
run, whose mean and standard deviation belong to the weights.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

from absl import logging

from flax_cifar import environment, errors
from flax_cifar.tools import command_line

CHECKPOINTS = ("best", "latest")


@dataclasses.dataclass(frozen=True)
class Extract:
  """A network of a checkpoint.

  Attributes:
    weights: the file that was written.
    seed: of the network.
    step: steps done.
    epochs: whole epochs done.
    validation_accuracy: of this seed at the end of the last whole epoch, in [0, 1]; None if it was
      not measured.
    peeked: whether the validation images were those of the test split, see `PROTOCOLS`.
  """

  weights: str
  seed: int
  step: int
  epochs: int
  validation_accuracy: float | None
  peeked: bool


def main() -> None:
  logging.set_verbosity(logging.FATAL)  # Orbax warns that it only reads
  with command_line.one_line_errors():
    options = parse(sys.argv[1:])
    environment.keep_off_devices()  # the run may still train there
    found = extract(options)
    print(json.dumps(dataclasses.asdict(found), indent=2) if options.json else format_text(found))


def create_parser() -> command_line.Parser:
  """The flags."""
  parser = command_line.create_parser("extract", __doc__)
  parser.add_argument("run", help="the folder of a run, finished or not")
  parser.add_argument("--out", required=True, help="the file to write, NAME.safetensors")
  parser.add_argument(
    "--checkpoint",
    choices=CHECKPOINTS,
    default="best",
    help="default: best, the one with the highest validation accuracy",
  )
  parser.add_argument("--seed", type=int, help="one of the seeds of the run; default: its first")
  command_line.add_data_dir(parser)
  parser.add_argument("--json", action="store_true", help="print JSON")
  return parser


def parse(arguments: Sequence[str]) -> argparse.Namespace:
  """The options of a command line.

  Raises:
    UserError: something is missing or unknown, or the file cannot be written.
  """
  options = create_parser().parse_args(arguments)
  options.run = errors.get_path("RUN", options.run)
  options.out = command_line.get_out("--out", options.out, ".safetensors")
  return options


def extract(options: argparse.Namespace) -> Extract:
  """Writes the weights file.

  Raises:
    UserError: there is no such run, checkpoint or seed, or it is damaged; or the data are missing
      or not those of the run.
  """
  # Imported here: they bring JAX, for which a wrong flag need not wait.
  from flax_cifar import metrics
  from flax_cifar.data import splits as splits_lib
  from flax_cifar.parallel import seeds
  from flax_cifar.run import checkpoint, weights, workdir
  from flax_cifar.run import config as config_lib

  config, fingerprint = workdir.read_start(options.run)
  number = find_seed(config, options.seed)
  snapshot = checkpoint.read(options.run / "checkpoints", best=options.checkpoint == "best")
  data = config["data"] | ({"dir": options.data_dir} if options.data_dir else {})
  splits = splits_lib.load_splits(protocol=config["protocol"], **data)
  workdir.check_data(options.run, fingerprint | splits.fingerprint)
  peeked = config["protocol"] == "published"
  if peeked and options.checkpoint == "best":
    errors.warn("the test images chose this epoch, so its test accuracy is not that of unseen ones")
  mean, std = config_lib.choose_normalization(config["augment"], splits)
  seed = config["seed"] + number
  weights.save_weights(
    options.out,
    seeds.select(snapshot.variables, config["num_seeds"], number),
    config=config | {"seed": seed, "num_seeds": 1},
    class_names=splits.class_names,
    image_shape=splits.image_shape,
    mean=mean,
    std=std,
    data=splits.fingerprint,
  )
  score, last = None, snapshot.records[-1] if snapshot.records else {}
  if "validation_accuracy" in last:
    score = metrics.get_per_seed(last, "validation_accuracy")[number]
  return Extract(
    weights=str(options.out),
    seed=seed,
    step=snapshot.step,
    epochs=len(snapshot.records),
    validation_accuracy=score,
    peeked=peeked,
  )


def find_seed(config: dict[str, Any], seed: int | None) -> int:
  """The number of `seed`, from 0, among the seeds of the run; None is the first.

  Raises:
    UserError: the run has no such seed.
  """
  first, count = config["seed"], config["num_seeds"]
  number = 0 if seed is None else seed - first
  expected = f"from {first} to {first + count - 1}" if count > 1 else f"{first}, the run's only one"
  errors.require(0 <= number < count, "--seed", seed, expected)
  return number


def format_text(found: Extract) -> str:
  """Lines for the screen."""
  from flax_cifar.run import tables

  lines = [f"network   seed {found.seed}, step {found.step:,}, {found.epochs} whole epochs"]
  if found.validation_accuracy is not None:
    peeked = tables.PEEKED if found.peeked else ""
    lines.append(f"validation accuracy {found.validation_accuracy:.2%}{peeked}")
  return "\n".join([*lines, f"weights   {found.weights}"])


if __name__ == "__main__":
  environment.apply_settings()
  main()
