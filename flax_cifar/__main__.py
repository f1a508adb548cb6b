"""The program: python main.py in a checkout, python -m flax_cifar where it is installed.

Several processes train one run together where each is started with --coordinator, --num_processes
and --process_id, or by a cluster that tells them; see docs/clusters.md.
"""

import os
import pathlib

from absl import flags
from ml_collections import ConfigDict

from flax_cifar import environment, errors
from flax_cifar.tools import command_line

WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of the run; the same command resumes. Default: runs/NAME-HASH."
)
CLUSTER = flags.DEFINE_string(
  "cluster",
  "auto",
  "auto: join other processes where the environment leaves no doubt; none: train in this one "
  "alone; slurm, openmpi, tpu or kubernetes: insist on that one.",
)
COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0.")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes train this run.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which one this is, from 0.")
INITIALIZATION_TIMEOUT = flags.DEFINE_integer(
  "initialization_timeout", 600, "Seconds to wait for the other processes at the start.", 1
)
HEARTBEAT_TIMEOUT = flags.DEFINE_integer(
  "heartbeat_timeout", 30, "Seconds of silence after which a process counts as dead.", 1
)
SHUTDOWN_TIMEOUT = flags.DEFINE_integer(
  "shutdown_timeout", 300, "Seconds to wait for the other processes at the end.", 1
)
STALL_TIMEOUT = flags.DEFINE_integer(
  "stall_timeout",
  900,
  "Seconds without a finished call, compilation included, after which several processes give up.",
  1,
)


def main() -> None:
  """Reads the command line, trains, and leaves with an exit status."""
  environment.apply_settings()
  command_line.run(train)


def train(config: ConfigDict) -> None:
  """Trains the run that `config` describes, alone or with other processes."""
  # Imported here: they bring JAX.
  from flax_cifar.parallel import cluster

  launch = cluster.Launch(
    cluster=CLUSTER.value,
    coordinator=COORDINATOR.value,
    num_processes=NUM_PROCESSES.value,
    process_id=PROCESS_ID.value,
    initialization_timeout=INITIALIZATION_TIMEOUT.value,
    heartbeat_timeout=HEARTBEAT_TIMEOUT.value,
    shutdown_timeout=SHUTDOWN_TIMEOUT.value,
    stall_timeout=STALL_TIMEOUT.value,
  )
  with cluster.leave_together(), command_line.one_line_errors(), cluster.joined(launch, os.environ):
    environment.check_devices()
    train_here(config)


def train_here(config: ConfigDict) -> None:
  """Trains in --workdir or its default."""
  from flax_cifar import train as train_lib
  from flax_cifar.parallel import agreement
  from flax_cifar.run import config as config_lib
  from flax_cifar.run import workdir as workdir_lib

  @agreement.by_first
  def find_workdir() -> str:
    if WORKDIR.value:
      return str(errors.get_path("--workdir", WORKDIR.value))
    return str(workdir_lib.find_workdir(config_lib.settle(config).to_dict()))

  train_lib.train_and_evaluate(config, pathlib.Path(find_workdir()))


if __name__ == "__main__":
  main()
