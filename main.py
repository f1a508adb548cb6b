"""Trains a small image network: python main.py --config=configs/s9.py

Any key of the config can be overridden, for instance --config.optimizer.learning_rate=0.1.
"""

import pathlib

from absl import flags
from ml_collections import ConfigDict

from flax_cifar import command_line
from flax_cifar.settings import apply_settings

WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of the run; the same command resumes. Default: runs/NAME-HASH."
)


def main(config: ConfigDict) -> None:
  # Imported here: they bring JAX.
  from flax_cifar.train import train_and_evaluate
  from flax_cifar.workdir import default_workdir

  workdir = WORKDIR.value or default_workdir(config.to_dict())
  train_and_evaluate(config, pathlib.Path(workdir))


if __name__ == "__main__":
  apply_settings()
  command_line.run(main)
