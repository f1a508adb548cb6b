"""Small CIFAR-10 networks in JAX and Flax: see README.md."""

from flax_cifar.api import (
  Run,
  create_config,
  create_model,
  load_data,
  load_pretrained,
  load_run,
  train_network,
)
from flax_cifar.zoo import list_models

__version__ = "0.2.0"  # of the package; pyproject.toml reads it here

__all__ = [
  "Run",
  "create_config",
  "create_model",
  "list_models",
  "load_data",
  "load_pretrained",
  "load_run",
  "train_network",
]
