"""Shared by the benchmarks: turns, tables, and records that name their origin."""

import argparse
import datetime
import itertools
import json
import math
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from flax_cifar import environment, errors, files
from flax_cifar.run import tables
from flax_cifar.tools import command_line

Row = Mapping[str, Any]
FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")  # of processors, by their Linux names
PATH_FLAGS = ("--json", "--output", "--torch-python", "--add")  # they name places of this machine


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
  """A docstring as it is written, and the default of each flag."""


def create_parser(doc: str | None) -> argparse.ArgumentParser:
  """A parser whose help shows the docstring of a benchmark, and the default of each flag."""
  return argparse.ArgumentParser(description=doc, formatter_class=_Help)


def add_names(
  parser: argparse.ArgumentParser, flag: str, choices: Sequence[str], default: Sequence[str]
) -> None:
  """Adds a flag that takes one or several of `choices`."""
  text = " | ".join(choices)
  parser.add_argument(
    flag, nargs="+", default=list(default), choices=choices, metavar="NAME", help=text
  )


def positive(text: str) -> int:
  """A type of argparse: a whole number above 0."""
  number = int(text)
  if number <= 0:
    raise argparse.ArgumentTypeError(f"{text} is not above 0")
  return number


def duration(text: str) -> float:
  """A type of argparse: finite seconds above 0."""
  seconds = float(text)
  if not 0 < seconds < math.inf:
    raise argparse.ArgumentTypeError(f"{text} is no number of seconds above 0")
  return seconds


def record_file(text: str) -> pathlib.Path:
  """A type of argparse: a file that can be written, so that nothing is measured in vain."""
  try:
    return command_line.get_out("file", text)
  except errors.UserError as error:
    raise argparse.ArgumentTypeError(str(error)) from error


def add_json(parser: argparse.ArgumentParser) -> None:
  """Adds the flag --json, which names a file for the record."""
  parser.add_argument("--json", type=record_file, metavar="FILE", help="file for the record")


def config_file(text: str) -> ConfigDict:
  """A type of argparse: the config that main.py would take, NAME or FILE, with a variant."""
  try:
    return command_line.load_config(text, "config")
  except errors.UserError as error:
    raise argparse.ArgumentTypeError(str(error)) from error


def interleave(cases: Mapping[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
  """Seconds of each call, for each case.

  The cases take turns, A B C A B C, so that a slow minute of the machine hits all of them.
  """
  seconds: dict[str, list[float]] = {name: [] for name in cases}
  for _ in range(repeats):
    for name, run in cases.items():
      started = time.perf_counter()
      run()
      seconds[name].append(time.perf_counter() - started)
  return seconds


def print_table(rows: Sequence[Row]) -> None:
  """One line per row under the keys of the first one; numbers stand to the right."""
  header = list(rows[0])
  cells = [header, *([format_cell(row[key]) for key in header] for row in rows)]
  print("\n".join(tables.format_text(cells, [isinstance(rows[0][k], int | float) for k in header])))


def format_cell(value: Any) -> str:
  """A value for a table: numbers to three digits, None as a blank."""
  if isinstance(value, float):
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
  return "" if value is None else str(value)


def write_record(path: pathlib.Path, rows: Sequence[Row]) -> None:
  """Writes the rows with versions, hardware, commit, date and command."""
  files.write_json(path, create_record(rows))


def add_record(path: pathlib.Path, rows: Sequence[Row]) -> None:
  """Adds the record of `rows` to the list of records in a file.

  It replaces that of the same command on the same kind of machine, and no other.
  """
  record = create_record(rows)
  records = read_records(path) if path.exists() else []
  keys = ("command", "hardware")
  others = [old for old in records if any(old[key] != record[key] for key in keys)]
  files.write_json(path, [*others, record])


def read_records(path: pathlib.Path) -> list[dict[str, Any]]:
  """The records of a file of `add_record`, or the one of `write_record`.

  Raises:
    UserError: the file cannot be read, or holds none.
  """
  try:
    content = json.loads(path.read_text(encoding="utf-8"))
  except (OSError, ValueError) as error:
    raise errors.UserError(
      f"{str(path)!r} holds no record ({errors.shorten(error)}); name another file."
    ) from error
  return content if isinstance(content, list) else [content]


def create_record(rows: Sequence[Row]) -> dict[str, Any]:
  """The rows with versions, hardware, commit, date and command."""
  return {
    "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "command": environment.get_command(leave_out_paths(sys.orig_argv[1:])),
    "commit": environment.get_commit(),
    "hardware": describe_hardware(),
    "versions": environment.get_versions(),
    "rows": list(rows),
  }


def describe_hardware() -> str:
  """The devices and the processor, with the instruction sets that matter here."""
  features = environment.list_processor_features()
  known = [name for name in FEATURES if name in features]
  return ", ".join([environment.get_hardware(len(jax.local_devices())), *known])


def leave_out_paths(arguments: Sequence[str]) -> list[str]:
  """The arguments of a command line without PATH_FLAGS and their values."""
  pairs = itertools.pairwise(["", *arguments])
  return [
    word
    for before, word in pairs
    if before not in PATH_FLAGS and word.split("=")[0] not in PATH_FLAGS
  ]
