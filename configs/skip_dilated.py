"""Network E4, `skip_dilated`: strides, a dilated and a depthwise unit, three identity paths.

Source      ERA V1, session 9: test accuracy 85.75 % after 37 epochs
Parameters  167,424; receptive field 47
Recipe      ours, 25 epochs; docs/results.md has the accuracy
Protocol    honest: 5,000 validation images are held out of training; test is read once, at the end
Command     python main.py --config=configs/skip_dilated.py
Variants    long        ours for 100 epochs, with cutout in half of the images
            published   our reading of the source, which gives the epochs and "Albumentations":
                        optimizer and schedule of its session 8 (configs/skip.py), augmentation of
                        its session 9 (configs/s9.py), but holes filled with the mean. It trains on
                        all 50,000 images, and the test loss drives the learning rate
            Every config has the others: see configs/variants.py
"""

from ml_collections import ConfigDict

from flax_cifar.configs import common, recipes, variants


def get_config(arg: str = "") -> ConfigDict:
  config = common.get_config()
  config.name = "skip_dilated"
  config.model.name = "skip_dilated"
  config.norm.group.num_groups = 4
  return variants.apply_arg(config, arg, {"ours": _ours, "long": _long, "published": _published})


def _ours(config: ConfigDict) -> None:
  recipes.use_our_recipe(config)
  config.total_epochs = 25


def _long(config: ConfigDict) -> None:
  _ours(config)
  config.total_epochs = 100
  recipes.add_cutout(config)


def _published(config: ConfigDict) -> None:
  config.protocol = "published"
  config.total_epochs = 37
  config.batch_size = 32
  config.optimizer.learning_rate = 0.01
  config.schedule.name = "plateau"
  config.schedule.plateau.update({"factor": 0.8, "patience": 0})
  config.augment.ops = ("horizontal_flip", "shift_scale_rotate", "coarse_dropout")
