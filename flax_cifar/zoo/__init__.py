"""The trained networks that come with the package, by name.

The folder of each has `weights.safetensors`; `run.json`, which is the result of its run with the
config, the command and every epoch; `scores.json`, how well it classifies the test images, computed
in DTYPE; `layers.txt`, its layer table; and `README.md`, its card. This module imports no JAX when
it is imported. `hub` has networks of others.
"""

import pathlib

from flax_cifar import errors
from flax_cifar.zoo import hub

FOLDER = pathlib.Path(__file__).parent
WEIGHTS = hub.WEIGHTS
DTYPE = "float32"  # whatever type they were trained in: it rounds nearly alike on all CPUs


def list_models() -> list[str]:
  """The names of the trained networks, sorted."""
  return sorted(path.parent.name for path in FOLDER.glob(f"*/{WEIGHTS}"))


def find_weights(name: str, key: str = "model") -> pathlib.Path:
  """The weights file of the trained network `name`, of the package or `hf:USER/NAME`.

  Raises:
    UserError: there is none; the message calls the name `key`.
  """
  if name.startswith(hub.PREFIX):
    return hub.download(name)
  folders = {known: FOLDER / known for known in list_models()}
  return errors.choose(key, name, folders) / WEIGHTS
