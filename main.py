"""Trains a small image network: python main.py --config=configs/s9.py

Any key of the config can be overridden, for instance --config.optimizer.learning_rate=0.1.
"""

import os
import pathlib

from absl import flags
from ml_collections import ConfigDict

from flax_cifar import command_line

WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of the run; the same command resumes. Default: runs/NAME-HASH."
)
CACHE_DIR = pathlib.Path.home() / ".cache" / "flax_cifar" / "xla"
# Switched off, XLA:CPU orders a step for memory, which is faster here too.
XLA_FLAG = "--xla_cpu_enable_concurrency_optimized_scheduler"


def set_environment() -> None:
  """What JAX reads when it is imported; a value set by the user stays."""
  os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE_DIR))
  xla_flags = os.environ.get("XLA_FLAGS", "")
  if XLA_FLAG not in xla_flags:
    os.environ["XLA_FLAGS"] = f"{xla_flags} {XLA_FLAG}=false"


def main(config: ConfigDict) -> None:
  set_environment()
  # Imported here: they bring JAX.
  from flax_cifar.train import train_and_evaluate
  from flax_cifar.workdir import default_workdir

  workdir = WORKDIR.value or default_workdir(config.to_dict())
  train_and_evaluate(config, pathlib.Path(workdir))


if __name__ == "__main__":
  command_line.run(main)
