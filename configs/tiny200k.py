"""Network `tiny200k`, our own: residual depthwise-separable units in three stages.

Parameters  188,970
Recipe      ours, 60 epochs
Protocol    honest: 5,000 validation images are held out of training; test is read once, at the end
Command     python main.py --config=configs/tiny200k.py
Variants    cpu   120 epochs with cutout and smooth activations
            long  180 epochs of more augmentation, smooth activations and large batches, for GPUs
            Every config has the others: see configs/variants.py
"""

from ml_collections import ConfigDict

from flax_cifar.configs import common, recipes, variants


def get_config(arg: str = "") -> ConfigDict:
  config = common.get_config()
  config.name = "tiny200k"
  config.model.name = "tiny200k"
  return variants.apply_arg(config, arg, recipes.list_tiny_recipes())
