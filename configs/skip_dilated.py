"""Network E4, `skip_dilated`: strides, a dilated and a depthwise unit, three identity paths.

Source      ERA V1, session 9: 167,424 parameters, receptive field 47; test accuracy 85.75 % after
            37 epochs
Recipe      ours: 25 epochs; docs/results.md has the figures
Protocol    validation on 5,000 images taken from train; the test split is read once, at the end
Command     python main.py --config=configs/skip_dilated.py
Variants    published   our reading of the source, which gives the epochs and "Albumentations":
                        optimiser and schedule of its session 8 (configs/skip.py), augmentation of
                        its session 9 (configs/s9.py), but holes filled with the mean. It trains on
                        all 50,000 images, and the learning rate follows the test loss
            full        trains on all 50,000 images and validates on none
            trial       leaves the test split alone: for choosing among recipes
            smoke       two short epochs on a slice of the data
            norm=batch|layer|group|ghost|none, seed=N, epochs=N, lr=R
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = "") -> ConfigDict:
  config = common.get_config()
  config.name = "skip_dilated"
  config.model.name = "skip_dilated"
  config.norm.group.num_groups = 4
  return common.apply_arg(config, arg, {"ours": _ours, "published": _published})


def _ours(config: ConfigDict) -> None:
  common.use_our_recipe(config)
  config.total_epochs = 25


def _published(config: ConfigDict) -> None:
  config.protocol = "published"
  config.total_epochs = 37
  config.batch_size = 32
  config.optimizer.learning_rate = 0.01
  config.schedule.name = "plateau"
  config.schedule.plateau.update({"factor": 0.8, "patience": 0})
  config.augment.ops = ("horizontal_flip", "shift_scale_rotate", "coarse_dropout")
