"""The program: python main.py in a checkout, python -m flax_cifar where it is installed."""

from absl import flags
from ml_collections import ConfigDict

from flax_cifar import environment, errors
from flax_cifar.tools import command_line

WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of the run; the same command resumes. Default: runs/NAME-HASH."
)


def main() -> None:
  """Reads the command line, trains, and leaves with an exit status."""
  environment.apply_settings()
  command_line.run(train)


def train(config: ConfigDict) -> None:
  """Trains the run that `config` describes, in --workdir or its default."""
  # Imported here: they bring JAX.
  from flax_cifar import train as train_lib
  from flax_cifar.run import workdir as workdir_lib

  workdir = (
    errors.get_path("--workdir", WORKDIR.value)
    if WORKDIR.value
    else workdir_lib.find_workdir(config.to_dict())
  )
  train_lib.train_and_evaluate(config, workdir)


if __name__ == "__main__":
  main()
