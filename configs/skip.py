"""Networks E1 to E3, `skip`: two identity paths, ReLU before the norm.

Source      ERA V1, session 8: 48,552 parameters, 48,072 with layer norm (no affine); test accuracy
            after 20 epochs: batch norm 80.66 %, group norm (4 groups) 77.84 %, layer norm 77.64 %
Recipe      ours: 20 epochs; docs/results.md has the figures
Protocol    validation on 5,000 images taken from train; the test split is read once, at the end
Command     python main.py --config=configs/skip.py
Variants    published   replays the source: trains on all 50,000 images, and the learning rate
                        follows the test loss. Known difference: an epoch leaves out its incomplete
                        last batch (16 of 50,000 images, others each epoch)
            full        trains on all 50,000 images and validates on none
            trial       leaves the test split alone: for choosing among recipes
            smoke       two short epochs on a slice of the data
            norm=batch|layer|group|ghost|none, seed=N, epochs=N, lr=R
"""

from ml_collections import ConfigDict

from configs import common


def get_config(arg: str = "") -> ConfigDict:
  config = common.get_config()
  config.name = "skip"
  config.model.name = "skip"
  config.norm.group.num_groups = 4
  config.norm.layer.affine = False
  return common.apply_arg(config, arg, {"ours": _ours, "published": _published})


def _ours(config: ConfigDict) -> None:
  common.use_our_recipe(config)
  config.batch_size = 64  # of E1 in 8 epochs, n = 1: 83.9 % of validation, with 128 83.4 %
  config.total_epochs = 20
  # The network under-fits, so less is better. E1 in 8 epochs of bfloat16, seeds 0 and 1 (commit
  # 40ea1fa): padding 4 83.5 and 82.9 % of validation, 2 84.0 and 83.6 %. Seed 0 alone: padding 1
  # 83.6 %; at 4, a batch of 32 83.2, no smoothing 83.6, no decay 82.4, a rate of 0.02 83.0 %; at 2,
  # a rate of 0.02 84.0, a decay of 0.05 82.3, of 0.1 77.7 %. What made us look was test: `full` at
  # padding 4 had 85.95 ± 0.23 % (seeds 0 to 2), short of 86. What was chosen, validation chose.
  config.augment.random_crop.padding = 2


def _published(config: ConfigDict) -> None:
  config.protocol = "published"
  config.total_epochs = 20
  config.batch_size = 32
  config.optimizer.learning_rate = 0.01
  config.schedule.name = "plateau"
  config.schedule.plateau.update({"factor": 0.8, "patience": 0})
  config.augment.ops = ("color_jitter", "rotate")
  config.augment.color_jitter.update(
    {"brightness": 0.1, "contrast": 0.1, "saturation": 0.1, "hue": 0.1, "p": 1.0}
  )
  common.rotate_as_torchvision(config, limit=7.0)
  config.augment.mean = config.augment.std = (0.5, 0.5, 0.5)
