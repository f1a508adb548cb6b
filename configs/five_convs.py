"""Network C2, `five_convs`: one block for each of five kinds of convolution.

Source      EVA, session 6B, which gives no layer table: train accuracy 92.27 %, validation accuracy
            85.48 % in 50 epochs
Parameters  436,480; the widths are ours
Recipe      ours, 15 epochs; docs/results.md has the accuracy
Protocol    honest: 5,000 validation images are held out of training; test is read once, at the end
Command     python main.py --config=configs/five_convs.py
Variants    published   our reading of the source: the recipe of configs/keras_fcn.py:published for
                        50 epochs
            Every config has the others: see configs/variants.py
"""

from ml_collections import ConfigDict

from flax_cifar.configs import common, recipes, variants


def get_config(arg: str = "") -> ConfigDict:
  config = common.get_config()
  config.name = "five_convs"
  config.model.name = "five_convs"
  return variants.apply_arg(config, arg, {"ours": _ours, "published": _published})


def _ours(config: ConfigDict) -> None:
  recipes.use_our_recipe(config)
  config.total_epochs = 15


def _published(config: ConfigDict) -> None:
  recipes.use_keras_recipe(config)
  config.total_epochs = 50
