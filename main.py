"""Trains a small image network: python main.py --config=configs/s9.py

Any key of the config can be overridden, for instance --config.optimizer.learning_rate=0.1.
Exit status: 0 done, 2 a mistake in what was asked for, 128 + N stopped by signal N.
"""

import os
import pathlib
import sys

from absl import app, flags, logging
from ml_collections import config_flags

CACHE_DIR = pathlib.Path.home() / ".cache" / "flax_cifar" / "xla"

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "A file of configs/, with :variant,key=value after it.", lock_config=True
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of the run; the same command resumes. Default: runs/NAME-HASH."
)


def fail(message: object, status: int = 2) -> None:
  """Prints one clear line and leaves."""
  print(f"error: {message}" if status == 2 else message, file=sys.stderr)
  sys.exit(status)


def parse_flags(argv: list[str]) -> list[str]:
  """Parses the command line; what is wrong with it becomes one line."""
  try:
    rest = flags.FLAGS(argv)
    if len(rest) > 1:
      raise ValueError(f"{rest[1]!r} is not a flag; write --config=FILE and --config.KEY=VALUE.")
    if not _CONFIG.value:
      raise ValueError("--config is missing; try --config=configs/quickstart.py")
  except (flags.Error, ValueError, TypeError, KeyError, AttributeError, OSError) as error:
    fail(str(error).strip().replace("\n", " "))
  return rest


def main(argv: list[str]) -> None:
  del argv
  os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE_DIR))
  # XLA:CPU then orders the step for memory: half as much of it, and a fifth faster.
  flag = "--xla_cpu_enable_concurrency_optimized_scheduler"
  if flag not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}=false"
  logging.set_verbosity(logging.ERROR)
  # Imported here: they bring JAX, which reads the environment when it starts.
  from flax_cifar.errors import UserError
  from flax_cifar.interrupt import Interrupted
  from flax_cifar.train import train_and_evaluate
  from flax_cifar.workdir import default_workdir

  workdir = _WORKDIR.value or default_workdir(_CONFIG.value.to_dict())
  try:
    train_and_evaluate(_CONFIG.value, pathlib.Path(workdir))
  except UserError as error:
    fail(error)
  except Interrupted as stop:
    fail(stop, status=128 + stop.signum)
  except KeyboardInterrupt:
    fail("stopped at once; the same command goes on from the last checkpoint", status=130)


if __name__ == "__main__":
  app.run(main, flags_parser=parse_flags)
