"""Network `sprint`, our own: as accurate as possible in a quarter of an hour on a CPU.

Parameters  569,656, or 1,972,792 (`wide`)
Recipe      ours, 12 epochs; its first trials are in docs/recipes.md
Protocol    honest: 5,000 validation images are held out of training; test is read once, at the end
Command     python main.py --config=configs/sprint.py
Variants    wide  twice as many channels, 25 epochs of larger batches: seconds on a large GPU
            Every config has the others: see configs/variants.py
"""

from ml_collections import ConfigDict

from flax_cifar.configs import common, recipes, variants


def get_config(arg: str = "") -> ConfigDict:
  config = common.get_config()
  config.name = "sprint"
  config.model.name = "sprint"
  return variants.apply_arg(config, arg, {"ours": _ours, "wide": _wide})


def _ours(config: ConfigDict) -> None:
  recipes.use_our_recipe(config)
  config.total_epochs = 12
  config.batch_size = 256
  config.optimizer.learning_rate = 0.04
  config.loss.label_smoothing = 0.2
  config.augment.random_crop.padding = 2
  config.ema.decay = 0.99


def _wide(config: ConfigDict) -> None:
  _ours(config)
  config.model.name = "sprint_wide"
  config.total_epochs = 25
  config.batch_size = 1000
  config.optimizer.learning_rate = 0.06
  config.optimizer.weight_decay = 0.1
  recipes.add_cutout(config)
  config.augment.coarse_dropout.p = 1.0
  config.ema.decay = 0.98
  config.eval_batch_size = 1000
