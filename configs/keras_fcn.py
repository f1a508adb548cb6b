"""Network C1, `keras_fcn`: C0 without its dense layers, with batch norm and transitions.

Source      EVA, session 6A, after its improvements, which gives no layer table: train accuracy
            94 % in 100 epochs, with little distance to validation. Our widths: 250,080 parameters
Recipe      ours: 15 epochs; docs/results.md has the figures
Protocol    validation on 5,000 images taken from train; the test split is read once, at the end
Command     python main.py --config=configs/keras_fcn.py
Variants    published   our reading of "augmentation, light dropout, one schedule with a high
                        start": shifts and flips, dropout .05, SGD from 0.1 that halves every 10
                        epochs; trains on all 50,000 images and validates on the test split, which
                        steers nothing. Known difference: initialisation and the momentum and
                        epsilon of batch norm are PyTorch's defaults, not Keras'
            full        trains on all 50,000 images and validates on none
            trial       leaves the test split alone: for choosing among recipes
            smoke       two short epochs on a slice of the data
            norm=batch|layer|group|ghost|none, seed=N, epochs=N, lr=R
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = "") -> ConfigDict:
  config = common.get_config()
  config.name = "keras_fcn"
  config.model.name = "keras_fcn"
  return common.apply_arg(config, arg, {"ours": _ours, "published": _published})


def _ours(config: ConfigDict) -> None:
  common.use_our_recipe(config)
  config.total_epochs = 15


def _published(config: ConfigDict) -> None:
  common.use_keras_recipe(config)
  config.total_epochs = 100
