"""Trains a small image network: python main.py --config=configs/s9.py

Any key of the config can be overridden, for instance --config.optimizer.learning_rate=0.1.
"""

import pathlib

from absl import flags
from ml_collections import ConfigDict

from flax_cifar import environment
from flax_cifar.tools import command_line

WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of the run; the same command resumes. Default: runs/NAME-HASH."
)


def main(config: ConfigDict) -> None:
  # Imported here: they bring JAX.
  from flax_cifar import train
  from flax_cifar.run import workdir as workdir_lib

  workdir = WORKDIR.value or workdir_lib.default_workdir(config.to_dict())
  train.train_and_evaluate(config, pathlib.Path(workdir))


if __name__ == "__main__":
  environment.apply_settings()
  command_line.run(main)
