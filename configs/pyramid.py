"""Network B2, `pyramid`, on which ERA V1 session 8 compared norms.

Source      ERA V1, session 8: test accuracy within 21 epochs with batch norm 77.01 %, layer norm
            (one group) 71.76 %, group norm (2 groups) 70.41 %
Parameters  48,656; receptive field 44
Recipe      ours, 21 epochs; docs/results.md has the accuracy, docs/recipes.md how it was chosen
Protocol    honest: 5,000 validation images are held out of training; test is read once, at the end
Command     python main.py --config=configs/pyramid.py
            To compare the norms, with a table and a plot of the curves:
            python -m flax_cifar.tools.sweep --config=configs/pyramid.py
                --over=norm=batch,layer,group,ghost
Variants    long        ours for 100 epochs
            published   replays the source: trains on all 50,000 images and validates on the test
                        split, which drives nothing. Known difference: each epoch drops its
                        incomplete last batch (80 of 50,000 images, different ones each epoch)
            Every config has the others: see configs/variants.py
"""

from ml_collections import ConfigDict

from flax_cifar.configs import common, recipes, variants


def get_config(arg: str = "") -> ConfigDict:
  config = common.get_config()
  config.name = "pyramid"
  config.model.name = "pyramid"
  return variants.apply_arg(
    config, arg, {"ours": _ours, "long": _long, "published": recipes.use_study_recipe}
  )


def _ours(config: ConfigDict) -> None:
  recipes.use_our_recipe(config)
  config.batch_size = 64  # docs/recipes.md
  config.total_epochs = 21


def _long(config: ConfigDict) -> None:
  _ours(config)
  config.total_epochs = 100
