"""Runs one config several times and compares: its norms, say, or its seeds.

  python -m flax_cifar.tools.sweep --config=configs/pyramid.py --over=norm=batch,layer,group,ghost

Each --over names a short key that config files take after the colon (norm, seed, epochs, lr) and
its values; the runs are the product of all --over. Any --config.KEY=VALUE of main.py is passed on.
The same command again goes on where it stopped. A run that diverges leaves the others. The workdir
gets a folder per run, table.md, table.json (accuracies in [0, 1]) and curves.png; seeds are
averaged. On a CPU, --jobs=2 makes two runs at once, each on half of the cores and with a log in
place of the screen, which takes less time than one after the other on all cores.

On many machines that share the workdir, --shard=I/N makes every N-th run from the I-th on; a SLURM
array, SLURM tasks or an indexed job tell it by themselves. --engine=slurm submits a job per run.
Then --collect compares the runs that have finished.
"""

import dataclasses
import hashlib
import itertools
import json
import math
import operator
import os
import pathlib
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from flax_cifar import environment, errors, files
from flax_cifar.configs import common, variants
from flax_cifar.tools import command_line
from flax_cifar.tools import jobs as jobs_lib
from flax_cifar.tools import shards as shards_lib

if TYPE_CHECKING:
  from flax_cifar.run import finished as finished_lib

RANGES = {
  "seed": (0, errors.SEEDS - 1),
  "epochs": (1, errors.MAX_STEPS),
  "lr": (0, errors.MAX_NUMBER),
}


@dataclasses.dataclass(frozen=True)
class Sweep:
  """The runs of a sweep: `over` has the values of each key, `overrides` are flags of main.py."""

  config: str
  over: dict[str, list[str]]
  overrides: list[str]
  workdir: pathlib.Path
  num_jobs: int = 1  # runs at once
  shard: shards_lib.Shard = shards_lib.WHOLE
  engine: str = "here"
  parameters: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of the engine
  collects: bool = False  # what has finished, and runs nothing


def main() -> None:
  with command_line.one_line_errors():
    try:
      run_sweep(parse(sys.argv[1:]))
    except jobs_lib.JobFailed as failure:
      command_line.leave(f"error: {failure}", failure.status)


def run_sweep(sweep: Sweep) -> None:
  """Makes every run, then writes and prints the comparison.

  Raises:
    JobFailed: a run crashed or was stopped, and those before it are kept; or runs were refused, as
      those that diverge, and the others are compared.
  """
  # Imported here, because it brings JAX, and a wrong flag need not wait for that.
  from flax_cifar.run import workdir as workdir_lib

  combinations = get_combinations(sweep.over)
  failed: list[jobs_lib.JobFailed] = []
  with workdir_lib.explain_failed_writes(sweep.workdir):
    if not sweep.collects:
      check_runs(sweep, combinations)
      failed = make_runs(sweep, sweep.shard.select(combinations))
    is_whole = sweep.engine != "slurm" and sweep.shard == shards_lib.WHOLE
    if len(failed) == len(combinations):
      raise failed[0]
    if sweep.collects or is_whole:
      compare_finished(sweep, combinations)
    else:
      place = shlex.quote(f"--workdir={sweep.workdir}")
      print(f"once they are done: {get_command_line(sweep)} {place} --collect")
  if failed:
    raise failed[0]


def check_runs(sweep: Sweep, combinations: Sequence[variants.Settings]) -> None:
  """Raises a UserError for a config that its run, perhaps hours later, would refuse.

  The devices are those of the runs, so this process keeps off them.
  """
  from flax_cifar.tools import first_steps

  environment.keep_off_devices()
  for settings in combinations:
    config = load_config(sweep, settings)
    config.num_devices = 0
    first_steps.check(config)


def make_runs(sweep: Sweep, combinations: Sequence[variants.Settings]) -> list[jobs_lib.JobFailed]:
  """Makes the runs of `combinations` here, or submits them.

  Returns:
    The runs that failed, where the others were made all the same.
  """
  jobs = [create_job(sweep, settings) for settings in combinations]
  if sweep.num_jobs > 1 or sweep.engine != "here":  # for the logs
    sweep.workdir.mkdir(parents=True, exist_ok=True)
  if sweep.engine == "here":
    return jobs_lib.run_jobs(jobs, jobs_lib.split_cores(sweep.num_jobs))
  shards_lib.submit(jobs, sweep.workdir / "jobs", sweep.parameters)
  return []


def compare_finished(sweep: Sweep, combinations: Sequence[variants.Settings]) -> None:
  """Writes and prints the comparison of the runs that have finished.

  Raises:
    UserError: none has.
  """
  from flax_cifar.tools import compare

  begun = [s for s in combinations if (get_workdir(sweep, s) / "result.json").exists()]
  missing = [variants.format_settings(s) for s in combinations if s not in begun]
  finished = [(s, run) for s in begun if (run := read_run(sweep, s))]
  if not finished:
    raise errors.UserError(f"no run of {str(sweep.workdir)!r} has finished; start them first.")
  if missing:
    errors.warn(f"not finished and left out: {errors.list_some(missing)}")
  groups = compare.group_runs(finished)
  rows = [compare.summarize(name, group) for name, group in groups.items()]
  text = write_table(sweep, rows, compare.format_table(rows))
  drawn = compare.save_curves(sweep.workdir / "curves.png", groups)
  print(text)
  for name in ("table.md", "table.json", *(["curves.png"] if drawn else [])):
    print(f"written   {sweep.workdir / name}")


def read_run(sweep: Sweep, settings: variants.Settings) -> "finished_lib.Run | None":
  """Reads a finished run; None, with a warning, where its folder has a run of another config."""
  from flax_cifar.run import config as config_lib
  from flax_cifar.run import finished as finished_lib
  from flax_cifar.run import workdir as workdir_lib

  folder, config = get_workdir(sweep, settings), load_config(sweep, settings)
  try:
    run = finished_lib.read_run(folder)
  except errors.UserError as error:  # it is damaged, or it is being extended
    errors.warn(f"left out: {error}")
    return None
  saved = config_lib.complete(run.result["config"])
  # What the machine of the run has decided, this one need not know.
  config.num_devices = config.num_devices or saved["num_devices"]
  if config.compute_dtype == "auto":
    config.compute_dtype = saved["compute_dtype"]
  changes = workdir_lib.list_changes(saved, config.to_dict())
  if run.result["epochs"] != config.total_epochs:
    changes.append(f"epochs are {run.result['epochs']} there and {config.total_epochs} here")
  if not changes:
    return run
  errors.warn(f"left out: {str(folder)!r} has another config: {errors.list_some(changes, 3)}")
  return None


def write_table(sweep: Sweep, rows: Sequence[Mapping[str, Any]], table: str) -> str:
  """Writes table.md, and its rows as table.json, under the command that made them.

  Returns:
    The text of table.md.
  """
  command = get_command_line(sweep)
  text = f"    {command}\n\n{table}"
  files.write_json(sweep.workdir / "table.json", {"command": command, "rows": rows})
  files.write_text(sweep.workdir / "table.md", text)
  return text


# ---- Arguments


def create_parser() -> command_line.Parser:
  """The flags beside those of the config."""
  parser = command_line.create_parser("sweep", __doc__)
  parser.add_argument("--config", help="a config; variants may follow it after a colon; needed")
  keys = ", ".join(variants.SHORT_KEYS)
  parser.add_argument(
    "--over",
    action="append",
    default=[],
    metavar="KEY=VALUE,VALUE",
    help=f"a key ({keys}) and its values; repeatable, for all combinations; needed",
  )
  parser.add_argument("--workdir", help="default: runs/NAME-sweep-KEYS-HASH")
  parser.add_argument("--jobs", type=int, default=1, help="runs at once; default: 1")
  parser.add_argument("--shard", metavar="I/N", help="makes every N-th run from the I-th on")
  parser.add_argument("--collect", action="store_true", help="compares what has finished")
  parser.add_argument(
    "--engine",
    default="here",
    choices=shards_lib.ENGINES,
    help="what makes the runs: this process (here), or SLURM by submitit; default: here",
  )
  parser.add_argument(
    "--slurm",
    action="append",
    default=[],
    metavar="KEY=VALUE",
    help="a parameter of submitit, such as timeout_min=60 or slurm_partition=gpu; repeatable",
  )
  return parser


def parse(arguments: Sequence[str]) -> Sweep:
  """The sweep that a command line asks for.

  Raises:
    UserError: something is missing, unknown or contradicts itself.
  """
  options, overrides = create_parser().parse_known_args(arguments)
  if not options.config:
    raise errors.UserError("--config is missing; try --config=configs/pyramid.py")
  over = parse_over(options.over)
  check_overrides(overrides, over)
  check_configs(options.config, over, overrides)
  cores = environment.count_cores()
  expected = f"from 1 to {cores}, the cores that this process may use"
  errors.require(1 <= options.jobs <= cores, "--jobs", options.jobs, expected)
  if options.engine == "here":
    errors.require(not options.slurm, "--slurm", options.slurm, "given with --engine=slurm")
  else:
    errors.require(options.jobs == 1, "--jobs", options.jobs, "1, which is for --engine=here alone")
  parameters = shards_lib.parse_parameters(options.slurm)
  if options.engine == "slurm" and not options.collect:
    shards_lib.check_parameters(parameters)
  workdir = (
    errors.get_path("--workdir", options.workdir)
    if options.workdir
    else default_workdir(options.config, list(over), overrides)
  )
  return Sweep(
    options.config,
    over,
    overrides,
    workdir,
    options.jobs,
    shard=shards_lib.find_shard(options.shard, os.environ),
    engine=options.engine,
    parameters=parameters,
    collects=options.collect,
  )


def parse_over(texts: Sequence[str]) -> dict[str, list[str]]:
  """{"norm": ["batch", "layer"]} of ["norm=batch,layer"].

  Raises:
    UserError: there is none, or one has an unknown key or value, no value, or one twice.
  """
  if not texts:
    raise errors.UserError("--over is missing; try --over=norm=batch,layer,group,ghost")
  over: dict[str, list[str]] = {}
  for text in texts:
    key, _, values = text.partition("=")
    errors.choose("--over", key, variants.SHORT_KEYS)
    if key in over:
      raise errors.UserError(f"--over={key} is given twice; write --over={key}=VALUE,VALUE once.")
    over[key] = values.split(",")
    for value in over[key]:
      _check_value(key, value)
    if len({_to_number(v) if key == "lr" else v for v in over[key]}) < len(over[key]):
      raise errors.UserError(f"--over={text} repeats a value; name each once.")
  return over


def _check_value(key: str, value: str) -> None:
  """Raises a UserError for a value that its run, perhaps hours later, would refuse."""
  if not value:
    raise errors.UserError(f"--over={key} lacks a value; write --over={key}=VALUE,VALUE.")
  defaults = common.get_config()
  if key == "norm":
    errors.choose("--over=norm", value, defaults.norm)
    return
  low, high = RANGES[key]
  if isinstance(operator.attrgetter(variants.SHORT_KEYS[key])(defaults), int):
    # "01" would be another name of the run "1".
    plain = re.fullmatch("0|[1-9][0-9]{0,9}", value) is not None
    fits, expected = plain and low <= int(value) <= high, f"a whole number from {low} to {high}"
  else:
    fits = low < _to_number(value) <= high
    expected = f"a positive number, {high:g} at most"
  errors.require(fits, f"--over={key}", value, expected)


def _to_number(text: str) -> float:
  """The number that `text` holds; nan if it holds none."""
  try:
    return float(text)
  except ValueError:
    return math.nan


def check_overrides(overrides: Sequence[str], over: Mapping[str, object]) -> None:
  """Raises a UserError for what main.py would not take, and for overrides of what is swept."""
  swept = [variants.SHORT_KEYS[key] for key in over] + ["num_seeds"] * ("seed" in over)
  for override in overrides:
    if not override.startswith("--config."):
      raise errors.UserError(
        f"{override!r} is unknown; use --over, --jobs, --workdir, --shard, --collect, --engine, "
        "--slurm or --config.KEY=VALUE."
      )
    key = override.removeprefix("--config.").split("=")[0]
    if key in swept:
      raise errors.UserError(f"{override!r} would hold for every run of the sweep; leave it out.")


def check_configs(config: str, over: Mapping[str, list[str]], overrides: Sequence[str]) -> None:
  """Raises a UserError for a config, variant or key that a run would refuse at its start."""
  for part in config.partition(":")[2].split(","):
    key = part.partition("=")[0]
    errors.require(key not in over, "--config", config, f"without {part!r}, as --over has {key}")
  for settings in get_combinations(over):
    loaded = command_line.load_config(get_config(config, settings), "--config")
  for override in overrides:
    command_line.get_value(loaded, override.removeprefix("--config.").partition("=")[0])


def default_workdir(config: str, keys: Sequence[str], overrides: Sequence[str]) -> pathlib.Path:
  """runs/NAME-sweep-KEYS-HASH: a sweep with more values finds the runs that are done."""
  digest = hashlib.sha256(json.dumps([config, keys, overrides]).encode()).hexdigest()[:8]
  name = pathlib.Path(config.split(":")[0]).stem
  return pathlib.Path("runs", "-".join([name, "sweep", *keys, digest]))


# ---- Runs


def get_combinations(over: Mapping[str, Sequence[str]]) -> list[variants.Settings]:
  """The settings of each run; the last key changes fastest."""
  return [dict(zip(over, values, strict=True)) for values in itertools.product(*over.values())]


def get_workdir(sweep: Sweep, settings: variants.Settings) -> pathlib.Path:
  """The folder of one run."""
  return sweep.workdir / variants.format_settings(settings)


def get_config(config: str, settings: variants.Settings) -> str:
  """The value of --config of one run.

  >>> get_config("s9:full", {"seed": "1"})
  's9:full,seed=1'
  """
  return f"{config}{',' if ':' in config else ':'}{variants.format_settings(settings)}"


def load_config(sweep: Sweep, settings: variants.Settings) -> ConfigDict:
  """The config of one run, as its own process will load it."""
  parser = command_line.create_parser("sweep", None)
  flags = [f"--config={get_config(sweep.config, settings)}", *sweep.overrides]
  return command_line.parse_with_config(parser, flags)[1]


def get_command(sweep: Sweep, settings: variants.Settings) -> list[str]:
  """The command line of one run."""
  config = get_config(sweep.config, settings)
  workdir = f"--workdir={get_workdir(sweep, settings)}"
  alone = "--cluster=none"  # this process may be one of several, but its runs are not
  return [
    sys.executable,
    "-m",
    "flax_cifar",
    f"--config={config}",
    *sweep.overrides,
    workdir,
    alone,
  ]


def create_job(sweep: Sweep, settings: variants.Settings) -> jobs_lib.Job:
  """One run as a process; several at once would mix up their output."""
  name = variants.format_settings(settings)
  log = sweep.workdir / f"{name}.log" if sweep.num_jobs > 1 else None
  return jobs_lib.Job(name, get_command(sweep, settings), log)


def get_command_line(sweep: Sweep) -> str:
  """The command that repeats the sweep."""
  over = (f"--over={key}={','.join(values)}" for key, values in sweep.over.items())
  flags = [f"--config={sweep.config}", *over, *sweep.overrides]
  return shlex.join(["python", "-m", "flax_cifar.tools.sweep", *flags])


if __name__ == "__main__":
  environment.apply_settings()
  main()
