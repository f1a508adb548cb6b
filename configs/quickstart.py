"""Quick start: the network `pyramid` on the embedded data set `shapes`.

Parameters  48,656
Result      over 95 % validation accuracy; docs/running.md has measured accuracies and times
Recipe      SGD with Nesterov momentum and a triangular schedule, 3 epochs
Protocol    honest: 1,000 validation images are held out of training; test is read once, at the end
Command     python main.py --config=configs/quickstart.py
Variants    those of every config: see configs/variants.py
"""

from ml_collections import ConfigDict

from flax_cifar.configs import common, variants


def get_config(arg: str = "") -> ConfigDict:
  config = common.get_config()
  config.name = "quickstart"
  config.data.name = "shapes"
  config.data.validation_size = 1000
  config.model.name = "pyramid"
  return variants.apply_arg(config, arg, {"ours": _ours})


def _ours(config: ConfigDict) -> None:
  config.total_epochs = 3
  config.batch_size = 32  # many short steps, which norms without batch statistics need
  config.model.init = "he"  # so that it trains without a norm too
  config.model.dropout_rate = 0.0
  config.optimizer.learning_rate = 0.03
  config.optimizer.weight_decay = 5e-4
  config.optimizer.sgd.nesterov = True
  config.schedule.name = "one_cycle"
  config.augment.ops = ("horizontal_flip", "shift_scale_rotate")
