"""Network D, `ghost`: ghost batch norm, dilated and spatially separable units.

Source      hardayaleva5/EVA5_Phase1_Assignment, Session_7: test accuracy over 82 % from epoch 20
            (82.60 %), best 82.96 % in 25 epochs
Parameters  657,146, of which 992 belong to the norms; their 496 scales stay at 1
Recipe      ours, 25 epochs; docs/results.md has the accuracy, docs/recipes.md how it was chosen
Protocol    honest: 5,000 validation images are held out of training; test is read once, at the end
Command     python main.py --config=configs/ghost.py
Variants    published   replays the source: trains on all 50,000 images and validates on the test
                        split, which drives nothing. It normalizes by a standard deviation that is
                        widely used but wrong. Known difference: each epoch drops its incomplete
                        last batch (80 of 50,000 images, different ones each epoch)
            Every config has the others: see configs/variants.py
"""

from ml_collections import ConfigDict

from flax_cifar.configs import common, recipes, variants


def get_config(arg: str = "") -> ConfigDict:
  config = common.get_config()
  config.name = "ghost"
  config.model.name = "ghost"
  config.model.norm = "ghost"
  config.norm.ghost.update({"num_splits": 2, "train_scale": False})
  return variants.apply_arg(config, arg, {"ours": _ours, "published": _published})


def _ours(config: ConfigDict) -> None:
  recipes.use_our_recipe(config)
  config.total_epochs = 25
  # Chosen by trials on validation images: docs/recipes.md
  config.optimizer.learning_rate = 0.0025
  config.optimizer.weight_decay = 0.4
  recipes.add_cutout(config)


def _published(config: ConfigDict) -> None:
  config.protocol = "published"
  config.total_epochs = 25
  config.batch_size = 256
  config.model.dropout_rate = 0.1
  config.optimizer.learning_rate = 0.016
  config.schedule.name = "step"
  config.schedule.step.update({"factor": 0.92, "every": 2.0})
  config.augment.ops = ("random_crop", "horizontal_flip", "rotate")
  config.augment.random_crop.update({"padding": 4, "border": "fill", "fill": "black"})
  recipes.rotate_as_torchvision(config, limit=8.0)
  config.augment.std = (0.2023, 0.1994, 0.2010)
