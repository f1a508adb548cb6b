"""Prints the layer table of a config: python -m flax_cifar.tools.summary --config=configs/s9.py"""

from absl import app, flags, logging
from ml_collections import config_flags

from flax_cifar.layer_table import format_layer_table, get_layer_table
from flax_cifar.models import create_model

_CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/.", lock_config=True)
_CLASSES = flags.DEFINE_integer("classes", 10, "Number of classes.", lower_bound=1)


def main(argv: list[str]) -> None:
  del argv
  logging.set_verbosity(logging.ERROR)
  config = _CONFIG.value
  model = create_model(**config.model, num_classes=_CLASSES.value, norm_arguments=config.norm)
  image_shape = (config.data.image_size, config.data.image_size, 3)
  print(format_layer_table(get_layer_table(model, image_shape)), end="")


if __name__ == "__main__":
  flags.mark_flag_as_required("config")
  app.run(main)
