"""The directives of networks.md: what the code and results.md say of a network.

`network` describes a config by the header of its file, the sums of its layer table, and its rows
in results.md. `layers` shows a layer table. Both make Markdown, which Sphinx reads like the page.
"""

import importlib
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import flax_cifar
from flax_cifar.run import tables
from flax_cifar.tools import summary

RESULTS = pathlib.Path(__file__).with_name("results.md")
CLASSES = 10
FIELD = re.compile(r"^(\w+)  +(.*(?:\n {12}\S.*)*)", re.MULTILINE)  # of the header of a config file
SHOWN = ("Source", "Recipe")  # of these fields
SYSTEM_COLUMNS = ("id", "network", "published", "replay", "ours", "full")
RUN_COLUMNS = ("name", "epochs", "type", "test", "hardware", "date")

Table = list[dict[str, str]]


class Network(SphinxDirective):
  """What is known of the network of a config; `ids` names its rows in results.md."""

  required_arguments = 1
  option_spec: ClassVar[dict[str, Callable[[str], Any]]] = {"ids": str.split}

  def run(self) -> list[nodes.Node]:
    self.env.note_dependency(str(RESULTS))
    (name,) = self.arguments
    text = describe(name) + "\n" + list_results(name, self.options.get("ids", []))
    return self.parse_text_to_nodes(text)


class Layers(SphinxDirective):
  """The layer table of a config, folded."""

  required_arguments = 1

  def run(self) -> list[nodes.Node]:
    (name,) = self.arguments
    return self.parse_text_to_nodes(fold(name))


def describe(name: str) -> str:
  """A table of the facts about the config `name`."""
  rows = summary.get_rows(flax_cifar.create_config(name), CLASSES)
  sums = summary.describe(name, rows)
  fields = read_header(name)
  facts = {field: fields[field] for field in SHOWN if field in fields}
  facts |= {
    "Parameters": f"{sums['parameters']:,}",
    "Multiply-adds": f"{sums['multiply-adds']:,}",
    "Receptive field": f"{sums['receptive field']} pixels",
    "Command": f"`{fields['Command'].splitlines()[0]}`",
    "Config": f"[configs/{name}.py](path:../configs/{name}.py)",
  }
  return tables.format_markdown(["", ""], list(facts.items()))


def read_header(name: str) -> dict[str, str]:
  """The fields of the header of `configs/NAME.py`, with links to the pages that it names."""
  header = importlib.import_module(f"flax_cifar.configs.{name}").__doc__ or ""
  fields = {}
  for field, text in FIELD.findall(header):
    lines = [line.strip() for line in text.splitlines()]
    joined = "\n".join(lines) if field == "Command" else " ".join(lines)
    fields[field] = re.sub(r"docs/(\w+\.md)", r"[\1](\1)", joined)
  return fields


def list_results(name: str, ids: Sequence[str]) -> str:
  """A table of the rows of `ids` in results.md, or of the runs of a config without any."""
  systems, runs = read_tables()
  if ids:
    rows, columns = [row for row in systems if row["id"] in ids], SYSTEM_COLUMNS
  else:
    rows, columns = [row for row in runs if row["name"].partition("-")[0] == name], RUN_COLUMNS
  if not rows:
    return "[results.md](results.md) has no run of it yet.\n"
  return tables.format_markdown(columns, [[row[column] for column in columns] for row in rows])


def read_tables() -> list[Table]:
  """The tables of results.md: the systems, and the runs."""
  found: list[Table] = []
  lines = RESULTS.read_text(encoding="utf-8").splitlines()
  for block in re.findall(r"(?:^\|.*\n?)+", "\n".join(lines), re.MULTILINE):
    header, _, *rows = [
      [cell.strip() for cell in line.strip("|").split(" | ")] for line in block.splitlines()
    ]
    found.append([dict(zip(header, row, strict=True)) for row in rows])
  return found


def fold(name: str) -> str:
  """The layer table of the config `name`, as text that opens when its title is clicked."""
  rows = summary.get_rows(flax_cifar.create_config(name), CLASSES)
  return "\n".join(
    [
      "<details>",
      f"<summary>Layers of <code>{name}</code></summary>",
      "",
      "```text",
      tables.format_layer_table(rows).rstrip(),
      "```",
      "",
      "</details>",
    ]
  )


def setup(app: Sphinx) -> dict[str, bool]:
  app.add_directive("network", Network)
  app.add_directive("layers", Layers)
  return {"parallel_read_safe": True}
