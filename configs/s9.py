"""Network A, `dilated`, with the recipe its source published (ERA V1 session 9).

Source      niharikavadapalli/ERA-V1, session 9: 192,672 parameters, receptive field 99; test
            accuracy 87.31 % (best of 51 epochs on the test set), 45.0 56.7 62.2 70.2 % after
            epochs 1 to 4
Protocol    the learning rate follows the loss of 5,000 validation images taken from train, and the
            test split is read once, at the end
Command     python main.py --config=configs/s9.py
Variants    published   replays the source: trains on all 50,000 images, the learning rate follows
                        the test loss, and the hole of coarse dropout is black, because the source
                        fills it with 0.49 on a scale of 0 to 255. Known differences: an
                        epoch leaves out its incomplete last batch (80 of 50,000 images, others
                        each epoch); Albumentations 2 shifts by whole pixels and zooms each
                        axis by itself
            study       the recipe of its normalisation study (B1): step schedule, rotation
            smoke       two short epochs on a slice of the data
            norm=batch|layer|group|ghost|none, seed=N, epochs=N
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = "") -> ConfigDict:
  config = common.get_config()
  config.name = "s9"
  config.total_epochs = 51
  config.model.name = "dilated"
  config.optimizer.learning_rate = 0.01
  config.schedule.name = "plateau"
  config.schedule.plateau.factor = 0.05
  config.schedule.plateau.patience = 5
  config.schedule.plateau.threshold = 0.1
  config.augment.ops = ("horizontal_flip", "shift_scale_rotate", "coarse_dropout")
  variants = {"published": _published, "study": _study, "smoke": common.smoke}
  return common.apply_arg(config, arg, variants)


def _published(config: ConfigDict) -> None:
  config.protocol = "published"
  config.augment.coarse_dropout.fill = "black"


def _study(config: ConfigDict) -> None:
  config.total_epochs = 21
  config.schedule.name = "step"
  config.schedule.step.factor = 0.1
  config.schedule.step.every = 6.0
  config.augment.ops = ("shift_scale_rotate",)
  config.augment.shift_scale_rotate.update(
    {"shift": 0.0, "scale": 0.0, "rotate": 6.0, "border": "fill", "p": 1.0}
  )
