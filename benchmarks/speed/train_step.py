"""Training steps, or predictions, per second: ours, naive Flax and PyTorch, by turns in one run.

Command     python -m benchmarks.speed.train_step [--task train | predict]
                [--networks dilated ghost skip pyramid tiny50k wide] [--repeats N]
                [--modes ours "naive Flax" ...] [--add FILE]
                [--torch-python /other/bin/python where PyTorch lives in another environment]
            python -m benchmarks.speed.train_step --show FILE

--add adds a record to those of other commands and other processors in a file, and --show prints
such a file as Markdown. PyTorch comes with the extra `benchmark`; without it, its rows are left
out. A ratio compares with the fastest mode of PyTorch of the same type.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import common
from benchmarks.speed import step_worker
from flax_cifar.run import tables
from flax_cifar.tools import command_line

NETWORKS = ("dilated", "ghost", "skip", "pyramid", "tiny50k", "wide")  # of docs/performance.md
MATMUL = "matmul"
MATMUL_FLOP = 2 * 2048**3
FLOP = {"train": 6, "predict": 2}  # floating-point operations per multiply-add of the layer table
SHOWN = (
  *("network", "mode", "images/s", "slowest", "fastest", "x PyTorch", "GFLOP/s", "% of matmul"),
  "peak MiB",
)


class Worker:
  """A process of `step_worker` that waits for orders."""

  def __init__(
    self,
    python: str,
    mode: str,
    network: str,
    batch_size: int,
    task: str = "train",
    *,
    environment: Mapping[str, str] | None = None,
    folder: pathlib.Path | None = None,
  ):
    """`folder` is that of another checkout, whose code the process runs."""
    command = [python, "-m", "benchmarks.speed.step_worker", mode, network, str(batch_size)]
    self._process = subprocess.Popen(
      command if task == "train" else [*command, task],  # earlier commits know no tasks
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
      env=environment,
      cwd=folder,
    )
    ready = json.loads(self._read())
    self.first_step, self.library = ready["first_step"], ready["library"]

  def _read(self) -> str:
    assert self._process.stdout
    line = self._process.stdout.readline()
    if not line:
      sys.exit(f"error: {' '.join(self._process.args)} ended early")  # type: ignore[arg-type]
    return line

  def measure(self, steps: int) -> float:
    """Seconds of one step, the mean of `steps`."""
    assert self._process.stdin
    self._process.stdin.write(f"{steps}\n")
    self._process.stdin.flush()
    return float(self._read()) / steps

  def close(self) -> float:
    """Ends the process; the most memory it had, in MiB."""
    assert self._process.stdin
    self._process.stdin.close()
    peak_memory = float(self._read())
    self._process.wait()
    return peak_memory


def main() -> None:
  options = parse_options()
  if options.show:
    with command_line.one_line_errors():
      for record in common.read_records(pathlib.Path(options.show)):
        print(format_record(record))
    return
  others = [mode for mode in options.modes if not mode.startswith("PyTorch")]
  if others != options.modes and not has_torch(options.torch_python):
    print(f"PyTorch is left out: {options.torch_python} has none; --torch-python names another")
    options.modes = others or sys.exit("error: no other mode was asked for")
  rows: list[common.Row] = []
  for network in options.networks:
    rows += measure_network(network, options)
    common.print_table(rows[-len(options.modes) :])
    print(flush=True)
    if options.json:  # after each network: the next one may not end
      common.write_record(options.json, rows)
    if options.add:
      common.add_record(options.add, rows)


def has_torch(python: str) -> bool:
  command = [python, "-c", "import torch"]
  try:
    return subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0
  except OSError:  # there is no such program
    return False


def parse_options() -> argparse.Namespace:
  parser = common.create_parser(__doc__)
  parser.add_argument("--task", default="train", choices=step_worker.TASKS, help="what is timed")
  common.add_names(parser, "--networks", list(step_worker.NORMS), NETWORKS)
  modes = [mode for mode in step_worker.MODES if mode != MATMUL]
  common.add_names(parser, "--modes", modes, modes)
  parser.add_argument("--batch", type=common.positive, default=128, help="images per batch")
  parser.add_argument("--repeats", type=common.positive, default=7, help="turns of each mode")
  parser.add_argument("--seconds", type=common.duration, default=1.0, help="least length of a turn")
  parser.add_argument(
    "--torch-python", default=sys.executable, metavar="FILE", help="a Python that has PyTorch"
  )
  common.add_json(parser)
  parser.add_argument(
    "--add", type=common.record_file, metavar="FILE", help="file of records that gets this one, too"
  )
  parser.add_argument("--show", metavar="FILE", help="file of records to print as Markdown")
  return parser.parse_args()


def format_record(record: Mapping[str, Any]) -> str:
  """A table of a record, below a line that says where it comes from."""
  versions = {row["library"] for row in record["rows"] if "library" in row}
  shown = [key for key in SHOWN if key in record["rows"][0]]  # older records have fewer
  origin = (
    f"`{record['command']}`, {record['hardware']}, {', '.join(sorted(versions))}, commit "
    f"`{record['commit'][:7]}`, {record['date'][:10]}:"
  )
  cells = [[common.format_cell(row[key]) for key in shown] for row in record["rows"]]
  numeric = [key not in ("network", "mode") for key in shown]
  return f"{origin}\n\n{tables.format_markdown(shown, cells, numeric)}"


def measure_network(network: str, options: argparse.Namespace) -> list[common.Row]:
  """A row per mode."""
  workers = {}
  for mode in [*options.modes, MATMUL]:
    python = options.torch_python if mode.startswith("PyTorch") else sys.executable
    workers[mode] = Worker(python, mode, network, options.batch, options.task)
  seconds = take_turns(workers, options.repeats, options.seconds)
  memory = {mode: worker.close() for mode, worker in workers.items()}
  peak = MATMUL_FLOP / statistics.median(seconds.pop(MATMUL))
  flop = FLOP[options.task] * count_multiply_adds(network) * options.batch
  return [
    {
      **describe(network, mode, seconds, options.batch, flop, peak),
      "first step s": workers[mode].first_step,
      "peak MiB": memory[mode],
      "library": workers[mode].library,
    }
    for mode in seconds
  ]


def take_turns(workers: Mapping[str, Worker], repeats: int, least: float) -> dict[str, list[float]]:
  """Seconds per step of each worker, `repeats` times, A B C A B C."""
  steps = {mode: max(1, round(least / worker.measure(1))) for mode, worker in workers.items()}
  seconds: dict[str, list[float]] = {mode: [] for mode in workers}
  for _ in range(repeats):
    for mode, worker in workers.items():
      seconds[mode].append(worker.measure(steps[mode]))
  return seconds


def describe(
  network: str,
  mode: str,
  seconds: Mapping[str, Sequence[float]],
  batch_size: int,
  flop: int,
  peak: float,
) -> dict[str, Any]:
  """The ratio is the median over turns, each against the fastest PyTorch of its turn and type."""
  own = seconds[mode]
  rivals = [
    seconds[name]
    for name in seconds
    if name.startswith("PyTorch") and ("bf16" in name) == ("bf16" in mode)
  ]
  best = [min(turn) for turn in zip(*rivals, strict=True)]
  ratios = [rival / mine for rival, mine in zip(best, own, strict=False)]
  median = statistics.median(own)
  return {
    "network": network,
    "mode": mode,
    "images/s": batch_size / median,
    "slowest": batch_size / max(own),
    "fastest": batch_size / min(own),
    "x PyTorch": statistics.median(ratios) if ratios else None,
    "GFLOP/s": flop / median / 1e9,
    "% of matmul": 100 * flop / median / peak,
  }


def count_multiply_adds(network: str) -> int:
  """Multiply-adds of one image's forward pass; a training step takes three times as many."""
  from flax_cifar.configs import common
  from flax_cifar.models import layer_table
  from flax_cifar.run import config as config_lib

  config = common.get_config()
  config.model.update(name=network, norm=step_worker.NORMS[network])
  model = config_lib.create_model(config, num_classes=10)
  return sum(row.multiply_adds for row in layer_table.get_layer_table(model, (32, 32, 3)))


if __name__ == "__main__":
  main()
