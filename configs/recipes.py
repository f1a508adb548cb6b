"""Recipes that several configs share."""

from collections.abc import Callable

from ml_collections import ConfigDict


def use_our_recipe(config: ConfigDict) -> None:
  """Our own recipe, from which each config starts; docs/recipes.md tells how it was chosen.

  Alternating flip and reflect-padded crop, Muon under a triangular schedule, label smoothing, a
  moving average of the weights, no dropout. Sources: Page 2018 ("How to train your ResNet"); Jordan
  2024 (arXiv:2404.00498) for the flip; `flax_cifar/optim.py` for Muon.
  """
  config.batch_size = 128
  config.model.dropout_rate = 0.0
  config.loss.label_smoothing = 0.05
  config.optimizer.name = "muon"
  config.optimizer.learning_rate = 0.03
  config.optimizer.weight_decay = 0.02
  config.schedule.name = "one_cycle"
  config.ema.decay = 0.998
  config.augment.ops = ("random_crop", "alternating_flip")
  config.augment.random_crop.border = "reflect"


def add_cutout(config: ConfigDict) -> None:
  """Adds cutout: a square of 8 x 8 pixels is erased in half of the images."""
  config.augment.ops = (*config.augment.ops, "coarse_dropout")
  config.augment.coarse_dropout.update({"height": 8, "width": 8, "p": 0.5})


def use_study_recipe(config: ConfigDict) -> None:
  """The published recipe of B1 and B2, the study of norms (ERA V1, session 8)."""
  config.protocol = "published"
  config.total_epochs = 21
  config.optimizer.learning_rate = 0.01
  config.schedule.name = "step"
  config.schedule.step.update({"factor": 0.1, "every": 6.0})
  config.augment.ops = ("rotate",)
  rotate_as_torchvision(config, limit=6.0)


def rotate_as_torchvision(config: ConfigDict, *, limit: float) -> None:
  """Rotates like torchvision.transforms.RandomRotation: every image, black outside, no blur."""
  config.augment.rotate.update(
    {"limit": limit, "interpolation": "nearest", "border": "fill", "fill": "black", "p": 1.0}
  )


def use_keras_recipe(config: ConfigDict) -> None:
  """Our reading of the recipe of C1 and C2 (EVA, session 6)."""
  config.protocol = "published"
  config.optimizer.learning_rate = 0.1
  config.schedule.name = "step"
  config.schedule.step.update({"factor": 0.5, "every": 10.0})
  config.augment.ops = ("horizontal_flip", "shift_scale_rotate")
  config.augment.shift_scale_rotate.update({"shift": 0.1, "scale": 0.0, "rotate": 0.0, "p": 1.0})


def list_tiny_recipes() -> dict[str, Callable[[ConfigDict], None]]:
  """The recipes of the networks of residual depthwise-separable units."""
  return {"ours": _train_tiny, "cpu": _train_tiny_on_cpu, "long": _train_tiny_long}


def _train_tiny(config: ConfigDict) -> None:
  use_our_recipe(config)
  config.total_epochs = 60
  config.augment.random_crop.padding = 3


def _train_tiny_on_cpu(config: ConfigDict) -> None:
  """Smooth activations and cutout, for the hours that a CPU takes."""
  _train_tiny(config)
  config.model.residual.activation = "silu"
  add_cutout(config)
  config.total_epochs = 120


def _train_tiny_long(config: ConfigDict) -> None:
  """More augmentation, smooth activations and large batches: minutes on a GPU, days on a CPU."""
  _train_tiny(config)
  config.model.residual.activation = "silu"
  config.augment.ops = (*config.augment.ops, "trivial_augment")
  config.augment.trivial_augment.p = 0.5
  add_cutout(config)
  config.total_epochs = 180
  config.batch_size = 512
  config.optimizer.learning_rate = 0.06
  config.ema.decay = 0.995
