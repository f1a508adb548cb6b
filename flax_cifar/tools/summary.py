"""Prints the layer table of a config, or several networks side by side.

python -m flax_cifar.tools.summary --config=configs/s9.py
python -m flax_cifar.tools.summary --config=s9 --beside=pyramid --beside=skip:norm=layer
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from flax_cifar import environment, errors
from flax_cifar.data.augment import arguments
from flax_cifar.models import layer_table
from flax_cifar.run import config as config_lib
from flax_cifar.run import tables
from flax_cifar.tools import command_line


def main() -> None:
  with command_line.one_line_errors():
    summarize(sys.argv[1:])


def create_parser() -> command_line.Parser:
  """The flags."""
  parser = command_line.create_parser("summary", __doc__)
  parser.add_argument("--beside", action="append", default=[], help="another config; repeatable")
  parser.add_argument("--classes", type=int, default=10, help="number of classes")
  parser.add_argument("--json", action="store_true", help="print JSON")
  return parser


def summarize(arguments: Sequence[str]) -> None:
  """Prints what a command line asks for.

  Raises:
    UserError: something is missing or unknown.
  """
  options, config = command_line.parse_with_config(create_parser(), arguments)
  errors.require(options.classes > 0, "--classes", options.classes, "1 or more")
  environment.check_devices()
  configs = [config, *(command_line.load_config(text, "--beside") for text in options.beside)]
  layers = [get_rows(one, options.classes) for one in configs]
  rows = [describe(one.name, rows) for one, rows in zip(configs, layers, strict=True)]
  if options.json:
    for row, table in zip(rows, layers, strict=True):
      row["table"] = [dataclasses.asdict(layer) for layer in table]
    print(json.dumps(rows, indent=2))
  elif len(rows) > 1:
    print(format_rows(rows))
  else:
    print(tables.format_layer_table(layers[0]), end="")


def get_rows(config: ConfigDict, num_classes: int) -> list[layer_table.Row]:
  """The layer table of the config's network."""
  config = config_lib.settle(config)
  arguments.check_image_size(config.data.image_size)
  model = config_lib.create_model(config, num_classes=num_classes)
  with config_lib.explain_misfit(config):
    return layer_table.get_layer_table(model, (config.data.image_size,) * 2 + (3,))


def describe(name: str, rows: Sequence[layer_table.Row]) -> dict[str, Any]:
  """The sums of a layer table."""
  sums = layer_table.summarize(rows)
  field = sums["receptive_field"]
  return {
    "config": name,
    "layers": len(rows),
    "parameters": sums["parameters"],
    "multiply-adds": sums["multiply_adds"],
    "receptive field": "{}x{}".format(*field) if field else "all",
  }


def format_rows(rows: Sequence[dict[str, Any]]) -> str:
  """A table with a line for each network."""
  cells = [list(rows[0])]
  for row in rows:
    cells.append([f"{value:,}" if isinstance(value, int) else value for value in row.values()])
  return "\n".join(tables.format_text(cells, [False, True, True, True, True]))


if __name__ == "__main__":
  environment.apply_settings()
  main()
