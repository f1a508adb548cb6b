"""Prints the layer table of a config: python -m flax_cifar.tools.summary --config=configs/s9.py"""

from absl import flags
from ml_collections import ConfigDict

from flax_cifar import environment
from flax_cifar.models import layer_table
from flax_cifar.run import config as config_lib
from flax_cifar.run import tables
from flax_cifar.tools import command_line

CLASSES = flags.DEFINE_integer("classes", 10, "Number of classes.", lower_bound=1)


def main(config: ConfigDict) -> None:
  environment.check_devices()
  model = config_lib.create_model(config, num_classes=CLASSES.value)
  image_shape = (config.data.image_size, config.data.image_size, 3)
  print(tables.format_layer_table(layer_table.get_layer_table(model, image_shape)), end="")


if __name__ == "__main__":
  command_line.run(main)
