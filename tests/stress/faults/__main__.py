"""The command line of the fault tests, which the package describes."""

import argparse
import pathlib
import sys
import tempfile
from collections.abc import Callable, Sequence

from benchmarks import common
from flax_cifar.run import tables
from tests.stress import faults
from tests.stress.faults import bench as bench_lib
from tests.stress.faults import damages, disks, folders, kills, peers, signals

SCENARIOS: dict[str, Callable[[bench_lib.Bench], list[bench_lib.Row]]] = {
  "kills": kills.inject_kills,
  "signals": signals.inject_signals,
  "second": signals.inject_second_signals,
  "damages": damages.inject_damages,
  "leftovers": folders.inject_leftovers,
  "disk": disks.inject_full_disk,
  "removal": folders.inject_removal,
  "twins": folders.inject_twins,
  "peers": peers.inject_peer_faults,
}


def main() -> None:
  options = parse_options()
  rows: list[bench_lib.Row] = []
  with tempfile.TemporaryDirectory(prefix="faults-") as folder:
    bench = bench_lib.Bench(pathlib.Path(folder), options)
    if options.only != ["peers"]:
      bench.make_reference()
    for name in options.only:
      rows += SCENARIOS[name](bench)
  print(format_rows(rows))
  if options.output:
    common.write_json(options.output, rows)
  sys.exit(any(row["lost"] for row in rows))


def parse_options() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=faults.__doc__.splitlines()[0])
  parser.add_argument("--kills", type=int, default=50)
  parser.add_argument("--signals", type=int, default=5, help="of each of SIGINT, SIGTERM, SIGUSR1")
  parser.add_argument("--damages", type=int, default=24, help="of a checkpoint's files; 0 for all")
  parser.add_argument("--peers", type=int, default=3, help="of each fault of one of two processes")
  parser.add_argument("--jobs", type=int, default=2, help="runs at once, where none is timed")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--only", nargs="+", default=list(SCENARIOS), choices=list(SCENARIOS))
  parser.add_argument("--output", default="", help="file for the record")
  return parser.parse_args()


def format_rows(rows: Sequence[bench_lib.Row]) -> str:
  header = ["scenario", "injected", "survived", "lost", "notes"]
  total = {name: sum(row[name] for row in rows) for name in header[1:-1]}
  lines = [*rows, {"scenario": "all", **total, "notes": ""}]
  return tables.format_markdown(header, [[str(row[name]) for name in header] for row in lines])


if __name__ == "__main__":
  main()
