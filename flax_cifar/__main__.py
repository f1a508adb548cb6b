"""The program: python main.py in a checkout, flax_cifar where the package is installed.

  python main.py --config=configs/s9.py [--workdir=DIR] [--config.KEY=VALUE ...]

It trains. Where the first argument names a tool, it runs that: flax_cifar predict --help. There are
compare, completion, evaluate, export, extract, find_lr, predict, profile, publish, report, summary
and sweep; each is also a module, python -m flax_cifar.tools.predict.

Several processes train one run together where each is started with --coordinator, --num_processes
and --process_id, or by a cluster that tells them; see docs/clusters.md.
"""

import argparse
import faulthandler
import importlib
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import logging
from ml_collections import ConfigDict

import flax_cifar
from flax_cifar import environment, errors
from flax_cifar.tools import command_line

SECONDS = ("initialization_timeout", "heartbeat_timeout", "shutdown_timeout", "stall_timeout")


def main() -> None:
  """Trains, or runs the tool that the first argument names, and leaves with an exit status."""
  environment.apply_settings()
  if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
    find_tool(sys.argv.pop(1))()
  else:
    run(sys.argv[1:])


def find_tool(name: str) -> Callable[[], None]:
  """The program of the tool `name`; leaves with one line where there is none."""
  with command_line.one_line_errors():
    if name not in command_line.TOOLS:
      hint = f"; to train, write --config={name}" if command_line.is_config(name) else ""
      raise errors.UserError(
        f"{name!r} is no tool; there are {', '.join(command_line.TOOLS)}{hint}."
      )
  return importlib.import_module(f"flax_cifar.tools.{name}").main


def run(arguments: Sequence[str]) -> None:
  """Trains what a command line asks for.

  Leaves with status 0 if it is done; for the others see `command_line.one_line_errors`.
  """
  faulthandler.enable()
  logging.use_absl_handler()
  logging.set_verbosity(logging.FATAL)  # Orbax logs the traceback of what it raises as well
  sys.unraisablehook = report_unraisable
  with command_line.one_line_errors():
    options, config = parse(arguments)
  train(config, **vars(options))


def report_unraisable(problem: Any) -> None:
  """A `sys.unraisablehook`: after a failed save TensorStore calls an event loop that has ended."""
  if str(problem.exc_value) != "Event loop is closed":
    sys.__unraisablehook__(problem)


# ---- The command line


def create_parser() -> command_line.Parser:
  """The flags beside those of the config."""
  parser = command_line.create_parser(environment.PACKAGE, __doc__)
  version = f"{environment.PACKAGE} {flax_cifar.__version__}"
  parser.add_argument("--version", action="version", version=version)
  parser.add_argument(
    "--workdir", help="folder of the run; the same command resumes; default: runs/NAME-HASH"
  )
  parser.add_argument(
    "--cluster",
    default="auto",
    help="auto: join other processes where the environment leaves no doubt; none: train in this "
    "one alone; slurm, openmpi, tpu or kubernetes: insist on that one",
  )
  parser.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0")
  parser.add_argument("--num_processes", type=int, help="how many processes train this run")
  parser.add_argument("--process_id", type=int, help="which one this is, from 0")
  add_seconds(parser, "initialization", 600, "to wait for the other processes at the start")
  add_seconds(parser, "heartbeat", 30, "of silence after which a process counts as dead")
  add_seconds(parser, "shutdown", 300, "to wait for the other processes at the end")
  add_seconds(
    parser,
    "stall",
    900,
    "without a finished call, compilation included, after which several processes give up",
  )
  return parser


def add_seconds(parser: argparse.ArgumentParser, name: str, default: int, what: str) -> None:
  """Adds the flag --`name`_timeout."""
  parser.add_argument(
    f"--{name}_timeout",
    type=int,
    default=default,
    metavar="SECONDS",
    help=f"{what}; default: {default}",
  )


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, ConfigDict]:
  """The flags of a command line, and its config.

  Raises:
    UserError: something is missing, unknown or out of range.
  """
  options, config = command_line.parse_with_config(create_parser(), arguments)
  for name in SECONDS:
    value = getattr(options, name)
    errors.require(value > 0, f"--{name}", value, "1 or more")
  return options, config


# ---- Training


def train(config: ConfigDict, *, workdir: str | None, **flags: Any) -> None:
  """Trains the run that `config` describes, alone or with other processes, as `flags` say."""
  # Imported here: they bring JAX.
  from flax_cifar.parallel import cluster

  launch = cluster.Launch(**flags)
  with cluster.leave_together(), command_line.one_line_errors(), cluster.joined(launch, os.environ):
    environment.check_devices()
    train_here(config, workdir)


def train_here(config: ConfigDict, workdir: str | None) -> None:
  """Trains in `workdir`, or in the default of the config."""
  from flax_cifar import train as train_lib
  from flax_cifar.parallel import agreement
  from flax_cifar.run import workdir as workdir_lib

  @agreement.by_first
  def find_workdir() -> str:
    return str(workdir_lib.choose(config, workdir, "--workdir"))

  train_lib.train_and_evaluate(config, pathlib.Path(find_workdir()))


if __name__ == "__main__":
  main()
