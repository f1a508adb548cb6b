"""Prints the layer table of a config, or several networks side by side.

python -m flax_cifar.tools.summary --config=configs/s9.py
python -m flax_cifar.tools.summary --config=s9 --beside=pyramid --beside=skip:norm=layer
"""

import json
from collections.abc import Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from flax_cifar import environment
from flax_cifar.models import layer_table
from flax_cifar.run import config as config_lib
from flax_cifar.run import tables
from flax_cifar.tools import command_line

CLASSES = flags.DEFINE_integer("classes", 10, "Number of classes.", lower_bound=1)
BESIDE = flags.DEFINE_multi_string("beside", [], "Another config; may be given several times.")
JSON = flags.DEFINE_bool("json", False, "Print JSON.")


def main(config: ConfigDict) -> None:
  environment.check_devices()
  configs = [config, *(command_line.load_config(text, "--beside") for text in BESIDE.value)]
  layers = [get_rows(one) for one in configs]
  rows = [describe(one.name, rows) for one, rows in zip(configs, layers, strict=True)]
  if JSON.value:
    print(json.dumps(rows, indent=2))
  elif len(rows) > 1:
    print(format_rows(rows))
  else:
    print(tables.format_layer_table(layers[0]), end="")


def get_rows(config: ConfigDict) -> list[layer_table.Row]:
  """The layer table of the config's network."""
  model = config_lib.create_model(config, num_classes=CLASSES.value)
  with config_lib.explain_misfit(config):
    return layer_table.get_layer_table(model, (config.data.image_size,) * 2 + (3,))


def describe(name: str, rows: Sequence[layer_table.Row]) -> dict[str, Any]:
  """The sums of a layer table."""
  height, width = layer_table.get_receptive_field(rows)
  return {
    "config": name,
    "layers": len(rows),
    "parameters": sum(row.parameters for row in rows),
    "multiply-adds": sum(row.multiply_adds for row in rows),
    "receptive field": f"{height}x{width}",
  }


def format_rows(rows: Sequence[dict[str, Any]]) -> str:
  """A table with a line for each network."""
  cells = [list(rows[0])]
  for row in rows:
    cells.append([f"{value:,}" if isinstance(value, int) else value for value in row.values()])
  return "\n".join(tables.format_text(cells, [False, True, True, True, True]))


if __name__ == "__main__":
  command_line.run(main)
