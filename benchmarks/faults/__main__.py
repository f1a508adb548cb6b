"""The command: see the package."""

import argparse
import pathlib
import sys
import tempfile
from collections.abc import Callable, Sequence

from benchmarks import faults
from benchmarks.common import write_json
from benchmarks.faults.bench import Bench, Row
from benchmarks.faults.damages import inject_damages
from benchmarks.faults.disks import inject_full_disk
from benchmarks.faults.folders import inject_leftovers, inject_removal, inject_twins
from benchmarks.faults.kills import inject_kills
from benchmarks.faults.signals import inject_second_signals, inject_signals
from benchmarks.results import format_table

SCENARIOS: dict[str, Callable[[Bench], list[Row]]] = {
  "kills": inject_kills,
  "signals": inject_signals,
  "second": inject_second_signals,
  "damages": inject_damages,
  "leftovers": inject_leftovers,
  "disk": inject_full_disk,
  "removal": inject_removal,
  "twins": inject_twins,
}


def main() -> None:
  options = parse_options()
  rows: list[Row] = []
  with tempfile.TemporaryDirectory(prefix="faults-") as folder:
    bench = Bench(pathlib.Path(folder), options)
    bench.make_reference()
    for name in options.only:
      rows += SCENARIOS[name](bench)
  print(format_rows(rows))
  if options.output:
    write_json(options.output, rows)
  sys.exit(any(row["lost"] for row in rows))


def parse_options() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=faults.__doc__.splitlines()[0])
  parser.add_argument("--kills", type=int, default=50)
  parser.add_argument("--signals", type=int, default=5, help="of each of SIGINT, SIGTERM, SIGUSR1")
  parser.add_argument("--damages", type=int, default=24, help="of a checkpoint's files; 0 for all")
  parser.add_argument("--jobs", type=int, default=2, help="runs at once, where none is timed")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--only", nargs="+", default=list(SCENARIOS), choices=list(SCENARIOS))
  parser.add_argument("--output", default="", help="file for the record")
  return parser.parse_args()


def format_rows(rows: Sequence[Row]) -> str:
  header = ["scenario", "injected", "survived", "lost", "notes"]
  total = {name: sum(row[name] for row in rows) for name in header[1:-1]}
  lines = [*rows, {"scenario": "all", **total, "notes": ""}]
  return format_table(header, [[str(row[name]) for name in header] for row in lines])


if __name__ == "__main__":
  main()
