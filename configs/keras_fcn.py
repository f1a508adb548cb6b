"""Network C1, `keras_fcn`: C0 without its dense layers, with batch norm and transitions.

Source      EVA, session 6A, after its improvements, which gives no layer table: train accuracy
            94 % in 100 epochs, with a small gap to validation
Parameters  250,080; the widths are ours
Recipe      ours, 15 epochs; docs/results.md has the accuracy
Protocol    honest: 5,000 validation images are held out of training; test is read once, at the end
Command     python main.py --config=configs/keras_fcn.py
Variants    published   our reading of "augmentation, light dropout, one schedule with a high
                        start": shifts and flips, dropout 0.05, SGD from 0.1, halved every 10
                        epochs. It trains on all 50,000 images and validates on the test split,
                        which drives nothing. Known difference: initialization and the momentum and
                        epsilon of batch norm are PyTorch's defaults, not Keras'
            Every config has the others: see configs/variants.py
"""

from ml_collections import ConfigDict

from flax_cifar.configs import common, recipes, variants


def get_config(arg: str = "") -> ConfigDict:
  config = common.get_config()
  config.name = "keras_fcn"
  config.model.name = "keras_fcn"
  return variants.apply_arg(config, arg, {"ours": _ours, "published": _published})


def _ours(config: ConfigDict) -> None:
  recipes.use_our_recipe(config)
  config.total_epochs = 15


def _published(config: ConfigDict) -> None:
  recipes.use_keras_recipe(config)
  config.total_epochs = 100
