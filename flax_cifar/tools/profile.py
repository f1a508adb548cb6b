"""Shows where the time of a training step goes: by layer, by operation, and a trace to look at.

  python -m flax_cifar.tools.profile --config=configs/s9.py --out=trace

It trains --steps steps to compile, then as many again, whose times it shows. "(rest)" is what
belongs to no layer: data, augmentation, loss, optimizer, average of the weights. --out keeps the
trace of JAX's profiler: open its perfetto_trace.json.gz at ui.perfetto.dev, or the folder with
TensorBoard and xprof. The profiler costs time itself, so benchmarks/speed measures without it.
"""

import argparse
import collections
import contextlib
import gzip
import json
import pathlib
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from flax_cifar import environment, errors
from flax_cifar.tools import command_line

Event = Mapping[str, Any]
REST = "(rest)"
# As Linen and JAX name the operations of a layer, forward and backward.
LAYER = re.compile(r"(transpose\()?jvp\(\w+\)+/([^/]+)/")


def main() -> None:
  with command_line.one_line_errors(), tempfile.TemporaryDirectory() as temporary:
    options, config = parse(sys.argv[1:])
    environment.check_devices()
    folder = create_folder(options.out) if options.out else None
    traces = folder or pathlib.Path(temporary)
    summary = profile_run(config, num_steps=options.steps, folder=traces)
    if options.json:
      print(json.dumps(summary, indent=2))
    else:
      print(format_summary(summary, folder, options.top))


def create_parser() -> command_line.Parser:
  """The flags."""
  parser = command_line.create_parser("profile", __doc__)
  parser.add_argument("--steps", type=int, default=12, help="steps to show; default: 12")
  parser.add_argument("--top", type=int, default=15, help="operations to print; default: 15")
  parser.add_argument("--out", default="", help="the folder to keep the trace in")
  parser.add_argument("--json", action="store_true", help="print JSON")
  return parser


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, ConfigDict]:
  """The options of a command line, and its config.

  Raises:
    UserError: something is missing, unknown or out of range.
  """
  options, config = command_line.parse_with_config(create_parser(), arguments)
  for flag in ("steps", "top"):
    value = getattr(options, flag)
    errors.require(value > 0, f"--{flag}", value, "1 or more")
  return options, config


def create_folder(name: str) -> pathlib.Path:
  """The folder of --out; a UserError if it cannot be made."""
  folder = errors.get_path("--out", name)
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise errors.UserError(
      f"--out={name!r} cannot be made a folder ({error.strerror}); choose another."
    ) from error
  return folder


def profile_run(config: ConfigDict, *, num_steps: int, folder: pathlib.Path) -> dict[str, Any]:
  """Trains twice `num_steps` steps of `config` or a few more, and describes the last `num_steps`.

  Args:
    config: of the run.
    num_steps: to describe; on an accelerator at most those of an epoch.
    folder: for the trace.

  Raises:
    UserError: as a run of `config` would; or the profiler has seen no operation.
  """
  import jax

  from flax_cifar.tools import first_steps

  first_steps.check(config)
  config = config.copy_and_resolve_references()
  images = 2 * num_steps * config.batch_size  # more would only take longer to load
  config.data.limit = min(config.data.limit or images, images)
  if config.augment.backend == "device" and jax.default_backend() != "cpu":
    config.steps_per_call = config.steps_per_call or num_steps  # all in one program
  setup = first_steps.set_up(config, 3 * num_steps)
  start = num_steps  # those before compile the program
  if setup.feed.steps_per_call > 1:  # the steps of a call are of one epoch: its first ones
    start = setup.feed.steps_per_epoch
    num_steps = min(num_steps, start)
  with contextlib.closing(setup.feed):
    *_, (state, _) = first_steps.iterate(setup, setup.state, range(start))

    def run() -> None:
      for _ in first_steps.iterate(setup, state, range(start, start + num_steps)):
        pass

    events, seconds = trace(run, folder)
    length = min(num_steps, setup.feed.steps_per_epoch, setup.feed.steps_per_call)
    lowered = setup.steps_fn.lower(setup.state, setup.feed.example_inputs(), length)
    program = lowered.compile().as_text() or ""
  operations = [event for event in events if "hlo_op" in event.get("args", {})]
  if not operations:
    raise errors.UserError(
      "JAX's profiler has seen no operation of the devices; on a GPU it needs CUPTI, and the "
      "permission to use it."
    )
  return {
    "config": config.name,
    "steps": num_steps,
    "batch_size": config.batch_size,
    "ms_a_step": 1000 * seconds / num_steps,
    "compiled_percent": 100 * union_seconds(operations) / seconds,
    "layers": list_layers(operations, find_layers(program), num_steps),
    "operations": list_operations(operations, num_steps),
  }


def trace(run: Callable[[], None], folder: pathlib.Path) -> tuple[list[Event], float]:
  """The trace's events and the seconds that `run` took; the trace is written to `folder`."""
  import jax

  with jax.profiler.trace(folder, create_perfetto_trace=True):
    started = time.perf_counter()
    run()
    seconds = time.perf_counter() - started
  path = max(folder.glob("**/perfetto_trace.json.gz"), key=lambda path: path.stat().st_mtime)
  with gzip.open(path) as file:
    content = json.load(file)
  events = content["traceEvents"] if isinstance(content, dict) else content
  return [event for event in events if event.get("ph") == "X"], seconds


def union_seconds(events: Iterable[Event]) -> float:
  """The time in which at least one of `events` ran.

  >>> union_seconds([{"ts": 0, "dur": 2e6}, {"ts": 1e6, "dur": 2e6}, {"ts": 9e6, "dur": 1e6}])
  4.0
  """
  total, end = 0.0, 0.0
  for start, stop in sorted((e["ts"], e["ts"] + e["dur"]) for e in events):
    total += max(0.0, stop - max(start, end))
    end = max(end, stop)
  return total / 1e6


def find_layers(program: str) -> dict[str, tuple[str, str]]:
  """{operation: (layer, "forward" or "backward")} of a compiled program, for those of a layer.

  >>> find_layers('%add.3 = f32[] add(%a, %b), metadata={op_name="jit(run)/jvp(Net)/c1/conv/add"}')
  {'add.3': ('c1', 'forward')}
  """
  found = {}
  for name, path in re.findall(r'%?([\w.-]+) = .*op_name="([^"]*)"', program):
    if match := LAYER.search(path):
      found[name] = match[2], "backward" if match[1] else "forward"
  return found


def list_layers(
  events: Iterable[Event], layers: Mapping[str, tuple[str, str]], num_steps: int
) -> list[dict[str, Any]]:
  """Milliseconds a step of each layer, in the order of the program, and of the rest."""
  times: collections.Counter[str] = collections.Counter()  # of each operation
  for event in events:
    times[event["args"]["hlo_op"]] += event["dur"] / 1000 / num_steps
  rows: dict[str, dict[str, float]] = {}
  for operation, (layer, way) in layers.items():
    if operation in times:
      row = rows.setdefault(layer, {"forward_ms": 0.0, "backward_ms": 0.0})
      row[f"{way}_ms"] += times[operation]
  total, named = times.total(), sum(sum(row.values()) for row in rows.values())
  rest = {"layer": REST, "ms_a_step": total - named, "percent": 100 * (total - named) / total}
  return [
    *({"layer": n, **row, "percent": 100 * sum(row.values()) / total} for n, row in rows.items()),
    rest,
  ]


def list_operations(events: Iterable[Event], num_steps: int) -> list[dict[str, Any]]:
  """Milliseconds a step of each kind of operation, the longest first."""
  seconds: collections.Counter[str] = collections.Counter()
  for event in events:
    seconds[re.sub(r"[.\d]+$", "", event["args"]["hlo_op"])] += event["dur"] / 1e6
  total = seconds.total()
  return [
    {"operation": name, "ms_a_step": 1000 * value / num_steps, "percent": 100 * value / total}
    for name, value in seconds.most_common()
  ]


def format_summary(summary: Mapping[str, Any], folder: pathlib.Path | None, top: int) -> str:
  """Lines for the screen."""
  from flax_cifar.run import tables

  layers = [["layer", "forward, ms a step", "backward", "%"]]
  for row in summary["layers"]:
    times = [row.get("forward_ms", row.get("ms_a_step")), row.get("backward_ms")]
    cells = ["" if time is None else f"{time:.2f}" for time in times]
    layers.append([row["layer"], *cells, f"{row['percent']:.1f}"])
  operations = [["operation", "ms a step", "%"]]
  for row in summary["operations"][:top]:
    operations.append([row["operation"], f"{row['ms_a_step']:.2f}", f"{row['percent']:.1f}"])
  return "\n".join(
    [
      *tables.format_text(layers, [False, True, True, True]),
      "",
      *tables.format_text(operations, [False, True, True]),
      "",
      f"{summary['steps']} steps of {summary['config']} in batches of {summary['batch_size']}: "
      f"{summary['ms_a_step']:.1f} ms a step with the profiler on, "
      f"{summary['compiled_percent']:.1f} % of it in compiled code",
      *([f"trace in {folder}"] if folder else []),
    ]
  )


if __name__ == "__main__":
  environment.apply_settings()
  main()
