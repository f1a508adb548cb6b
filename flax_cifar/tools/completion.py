"""Prints a script that lets a shell complete the command `flax_cifar`.

  flax_cifar completion bash > ~/.local/share/bash-completion/completions/flax_cifar
  flax_cifar completion zsh > DIRECTORY/_flax_cifar    # a directory of $fpath

A new shell then completes the tools, their flags, and the names of configs, networks and files. It
needs shtab: pip install 'flax_cifar[completion]'.
"""

import argparse
import importlib
import sys
from collections.abc import Mapping
from typing import Any

from flax_cifar import errors, zoo
from flax_cifar.tools import command_line

SHELLS = ("bash", "zsh", "fish", "tcsh")
TAKE_CONFIG = ("find_lr", "profile", "summary", "sweep")
# By their names in the parsers.
FILES = ("weights", "out", "picture", "pictures")
FOLDERS = ("a", "b", "run", "folders", "workdir", "data_dir")


def main() -> None:
  with command_line.one_line_errors():
    options = create_parser().parse_args(sys.argv[1:])
    print(create_script(options.shell))


def create_parser() -> command_line.Parser:
  """The flags."""
  parser = command_line.create_parser("completion", __doc__)
  parser.add_argument("shell", choices=SHELLS)
  return parser


def create_script(shell: str) -> str:
  """The script for `shell`.

  Raises:
    UserError: shtab is not installed.
  """
  try:
    import shtab
  except ImportError as error:
    raise errors.UserError(
      "completion needs shtab; run pip install 'flax_cifar[completion]'."
    ) from error
  places = dict.fromkeys(FILES, shtab.FILE) | dict.fromkeys(FOLDERS, shtab.DIRECTORY)
  return shtab.complete(create_program(places), shell)


def create_program(places: Mapping[str, Any]) -> argparse.ArgumentParser:
  """A parser with the flags of training, and the tools as commands with theirs.

  Args:
    places: what stands for a file or a folder, by the name of the argument.
  """
  from flax_cifar import __main__ as program  # here: it imports the tools

  parser = program.create_parser()
  tools = parser.add_subparsers()
  for name in command_line.TOOLS:
    tool = importlib.import_module(f"flax_cifar.tools.{name}").create_parser()
    add_words(tool, places, takes_config=name in TAKE_CONFIG)
    summary = tool.description.splitlines()[0]
    tools.add_parser(name, parents=[tool], add_help=False, help=summary)
  add_words(parser, places, takes_config=True)
  return parser


def add_words(
  parser: argparse.ArgumentParser, places: Mapping[str, Any], *, takes_config: bool
) -> None:
  """Adds what follows the flags of `parser`: names of configs and networks, files, folders."""
  known = {action.dest: action for action in parser._actions}
  if takes_config and "config" not in known:
    known["config"] = parser.add_argument("--config", help=command_line.CONFIG_HELP)
  words = {"config": command_line.list_configs(), "model": zoo.list_models()}
  for name in words.keys() & known.keys():
    known[name].choices = words[name]
  for name in places.keys() & known.keys():
    vars(known[name])["complete"] = places[name]


if __name__ == "__main__":
  main()
