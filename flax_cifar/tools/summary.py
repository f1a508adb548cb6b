"""Prints the layer table of a config: python -m flax_cifar.tools.summary --config=configs/s9.py"""

from absl import flags
from ml_collections import ConfigDict

from flax_cifar import command_line
from flax_cifar.layer_table import format_layer_table, get_layer_table
from flax_cifar.models import create_model

CLASSES = flags.DEFINE_integer("classes", 10, "Number of classes.", lower_bound=1)


def main(config: ConfigDict) -> None:
  model = create_model(
    **config.model,
    num_classes=CLASSES.value,
    norm_arguments=config.norm,
    dtype=config.compute_dtype,
  )
  image_shape = (config.data.image_size, config.data.image_size, 3)
  print(format_layer_table(get_layer_table(model, image_shape)), end="")


if __name__ == "__main__":
  command_line.run(main)
