"""A network, a data set and a config small enough to train within a test."""

import contextlib
from functools import partial
from typing import Any

import flax.linen as nn
import numpy as np
import pytest
from ml_collections import ConfigDict

from flax_cifar import models
from flax_cifar.configs import common
from flax_cifar.models import blocks, norms

IMAGE_SIZE, CLASSES = 8, 3


class TinyNet(nn.Module):
  """One unit and the head; it has the attributes of every network."""

  num_classes: int = CLASSES
  norm: Any = partial(norms.BatchNorm, momentum=0.9, epsilon=1e-5)
  dropout_rate: float = 0.0
  kernel_init: Any = blocks.INITS["flax"]
  dtype: Any = np.float32
  features: int = 6

  @nn.compact
  def __call__(self, images, train):
    unit = blocks.ConvUnit(
      self.features, self.norm, self.kernel_init, self.dropout_rate, self.dtype, name="unit"
    )
    return blocks.ConvHead(self.num_classes, self.kernel_init, name="head")(unit(images, train))


@contextlib.contextmanager
def registered():
  """Registers TinyNet, as the fixture `tiny_model` does, for fixtures of a wider scope."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(models.MODELS, "tiny", TinyNet)
    yield


def write_data(path, *, train=96, test=40, size=IMAGE_SIZE, seed=0) -> str:
  """Writes images whose brightest channel is their class, and returns the data set's name."""
  rng = np.random.default_rng(seed)
  arrays = {}
  for name, count in (("train", train), ("test", test)):
    labels = rng.integers(CLASSES, size=count)
    images = rng.integers(0, 160, (count, size, size, 3))
    images += 60 * (np.arange(3) == labels[:, None])[:, None, None]
    arrays |= {f"{name}_images": images.astype(np.uint8), f"{name}_labels": labels}
  np.savez(path, **arrays)
  return f"npz:{path}"


def write_quick_run(folder, **changes: Any) -> list[str]:
  """Writes data for a short run of configs/quickstart.py and returns its flags.

  All tests that call the program share the sizes, and so the compiled programs.
  """
  keys = {
    "data.name": write_data(folder / "tiny.npz", train=400, size=32),
    "data.validation_size": 80,
    "batch_size": 16,
    "eval_batch_size": 16,
    "num_devices": 1,
    "log.pictures": False,
    **changes,
  }
  return [f"--config.{key}={value}" for key, value in keys.items()]


def get_config(data: str, **changes: Any) -> ConfigDict:
  """Three epochs of five steps of 16 images; `changes` has dotted keys."""
  config = common.get_config()
  config.update_from_flattened_dict(
    {
      "name": "tiny",
      "total_epochs": 3,
      "batch_size": 16,
      "eval_batch_size": 16,
      "num_devices": 1,
      "data.name": data,
      "data.image_size": IMAGE_SIZE,
      "data.validation_size": 16,
      "model.name": "tiny",
      "model.dropout_rate": 0.1,
      "optimizer.learning_rate": 0.1,
      "augment.ops": ("horizontal_flip",),
      "log.pictures": False,
      "log.tensorboard": False,
      "checkpoint.every": 3,  # a save takes an eighth of such a run
      **changes,
    }
  )
  return config
