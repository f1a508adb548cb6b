"""Network D, `ghost`: ghost batch norm, dilated and spatially separable units.

Source      hardayaleva5/EVA5_Phase1_Assignment, Session_7: 657,146 parameters, 992 of them in the
            norms, whose 496 scales stay at 1; over 82 % test accuracy from epoch 20 (82.60 %),
            82.96 % at best in 25 epochs
Recipe      ours: 25 epochs; docs/results.md has the figures
Protocol    validation on 5,000 images taken from train; the test split is read once, at the end
Command     python main.py --config=configs/ghost.py
Variants    published   replays the source: trains on all 50,000 images, validates on the test
                        split, which steers nothing, and normalises by a standard deviation that is
                        widely used but wrong. Known difference: an epoch leaves out its incomplete
                        last batch (80 of 50,000 images, others each epoch)
            full        trains on all 50,000 images and validates on none
            trial       leaves the test split alone: for choosing among recipes
            smoke       two short epochs on a slice of the data
            norm=batch|layer|group|ghost|none, seed=N, epochs=N, lr=R
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = "") -> ConfigDict:
  config = common.get_config()
  config.name = "ghost"
  config.model.name = "ghost"
  config.model.norm = "ghost"
  config.norm.ghost.update({"num_splits": 2, "train_scale": False})
  return common.apply_arg(config, arg, {"ours": _ours, "published": _published})


def _ours(config: ConfigDict) -> None:
  common.use_our_recipe(config)
  config.total_epochs = 25
  # Two layers have no norm, so the rate is lower than elsewhere. Validation after 8 epochs as
  # `:trial`, n = 1, commit 3a99bcf: 0.01 86.4, 0.005 86.8, 0.0025 87.2 %, all at a decay of 0.1. On
  # another processor: 0.00125 86.0 %, at twice the decay 85.9 % (commit 90b76f2); today's rate at a
  # decay of 0.2 87.7, of 0.4 87.9 % (commit 6f04874). After 25 epochs, where the network memorises:
  # 0.1 90.1 % (train 94.4; commit 50a540b), 0.4 90.6 % (train 93.0; commit f478dc7), behind 0.1
  # until epoch 20. It was adopted by a rule set beforehand, on validation, before test was read.
  config.optimizer.learning_rate = 0.0025
  config.optimizer.weight_decay = 0.4
  # Squares left out, n = 1, 25 epochs at a rate of 0.01 and a decay of 0.02: in no image 89.2 %
  # of validation (train 93.0), in half of them 89.4 % (train 91.0), which is within the noise. At
  # a rate of 0.0025 and a decay of 0.1 in half of them 90.1 % (train 94.4). In all of them, with a
  # dropout of 0.05 and a smoothing of 0.1, no more than 89.0 % by epoch 23 (train 89.4; commit
  # fb20b49).
  common.leave_out_squares(config)


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
  common.rotate_as_torchvision(config, limit=8.0)
  config.augment.std = (0.2023, 0.1994, 0.2010)
