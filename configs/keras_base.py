"""Network C0, `keras_base`: three pairs of convolutions and a dense head, without a norm.

Source      EVA, session 6A, the network before its improvements; it gives neither accuracy nor
            recipe
Parameters  1,172,410
Recipe      ours, 15 epochs; docs/results.md has the accuracy, docs/recipes.md how it was chosen
Protocol    honest: 5,000 validation images are held out of training; test is read once, at the end
Command     python main.py --config=configs/keras_base.py
Variants    published   our reading, after the Keras examples of that time: Adam at its default
                        rate, pixels in [0, 1], no augmentation, dropout 0.25 and 0.5, Keras'
                        initialization. It trains on all 50,000 images and validates on the test
                        split, which drives nothing
            Every config has the others: see configs/variants.py
"""

from ml_collections import ConfigDict

from flax_cifar.configs import common, recipes, variants


def get_config(arg: str = "") -> ConfigDict:
  config = common.get_config()
  config.name = "keras_base"
  config.model.name = "keras_base"
  config.model.norm = "none"
  return variants.apply_arg(config, arg, {"ours": _ours, "published": _published})


def _ours(config: ConfigDict) -> None:
  recipes.use_our_recipe(config)
  config.total_epochs = 15
  config.model.init = "he"
  config.model.dropout_rate = 0.1  # 0.2 after the dense layers, which hold half of the parameters
  config.optimizer.learning_rate = 0.003  # lower than elsewhere, without a norm: docs/recipes.md


def _published(config: ConfigDict) -> None:
  config.protocol = "published"
  config.total_epochs = 25
  config.model.dropout_rate = 0.25
  config.model.init = "keras"
  config.optimizer.name = "adamw"
  config.optimizer.learning_rate = 0.001
  config.optimizer.adamw.epsilon = 1e-7
  config.augment.mean, config.augment.std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
