"""Network C2, `five_convs`: a block each of normal, separable and grouped convolutions.

Source      EVA, session 6B, which gives no layer table: train accuracy 92.27 %, validation 85.48 %
            in 50 epochs. Our widths: 436,480 parameters
Recipe      ours: 15 epochs; docs/results.md has the figures
Protocol    validation on 5,000 images taken from train; the test split is read once, at the end
Command     python main.py --config=configs/five_convs.py
Variants    published   our reading: the recipe of configs/keras_fcn.py:published, 50 epochs
            full        trains on all 50,000 images and validates on none
            trial       leaves the test split alone: for choosing among recipes
            smoke       two short epochs on a slice of the data
            norm=batch|layer|group|ghost|none, seed=N, epochs=N, lr=R
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = "") -> ConfigDict:
  config = common.get_config()
  config.name = "five_convs"
  config.model.name = "five_convs"
  return common.apply_arg(config, arg, {"ours": _ours, "published": _published})


def _ours(config: ConfigDict) -> None:
  common.use_our_recipe(config)
  config.total_epochs = 15


def _published(config: ConfigDict) -> None:
  common.use_keras_recipe(config)
  config.total_epochs = 50
