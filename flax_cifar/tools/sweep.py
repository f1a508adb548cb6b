"""Runs one config several times and compares: its norms, say, or its seeds.

  python -m flax_cifar.tools.sweep --config=configs/pyramid.py --over=norm=batch,layer,group,ghost

Each --over names a short key that config files take after the colon (norm, seed, epochs, lr) and
its values; the runs are the product of all --over. Any --config.KEY=VALUE of main.py is passed on.
The same command again goes on where it stopped. The workdir gets a folder per run, table.md,
table.json (accuracies in [0, 1]) and curves.png; seeds are averaged. On a CPU, --jobs=2 makes two
runs at once, each on half of the cores and with a log in place of the screen, which takes less time
than one after the other on all cores.
"""

import argparse
import dataclasses
import hashlib
import itertools
import json
import math
import pathlib
import re
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from configs import common
from flax_cifar.command_line import Parser, leave
from flax_cifar.environment import count_cores
from flax_cifar.errors import UserError, choose, describe_briefly, require
from flax_cifar.tools.jobs import Job, JobFailed, run_jobs, split_cores
from flax_cifar.workdir import explain_failed_writes, flatten, read_result, write_json

if TYPE_CHECKING:
  from matplotlib.axes import Axes

Record = Mapping[str, Any]
Settings = dict[str, str]  # the swept keys and their values in one run
Summary = dict[str, Any]  # a row of the table

SEED = "seed"
# What a run takes; the modules that check it bring JAX, for which a wrong flag need not wait.
RANGES = {SEED: (0, 2**32 - 1), "epochs": (1, 2**31 - 1), "lr": (0, 1e38)}
SCORES = {  # name in table.json -> header in table.md
  "validation_accuracy": "validation",
  "best_validation_accuracy": "best validation",
  "test_accuracy": "test",
  "train_accuracy": "train",
}


@dataclasses.dataclass(frozen=True)
class Sweep:
  """What to run: `over` has the values of each swept key, `overrides` are flags of main.py."""

  config: str
  over: dict[str, list[str]]
  overrides: list[str]
  workdir: pathlib.Path
  num_jobs: int = 1  # runs at once


@dataclasses.dataclass(frozen=True)
class Run:
  """A finished run: what result.json and metrics.jsonl hold."""

  settings: Settings
  result: Record
  records: list[Record]


def main() -> None:
  try:
    run_sweep(parse(sys.argv[1:]))
  except UserError as error:
    leave(f"error: {error}", 2)
  except JobFailed as failure:
    leave(f"error: {failure}", failure.status)
  except KeyboardInterrupt:
    leave("stopped between two runs; the same command goes on from there", 130)


def run_sweep(sweep: Sweep) -> None:
  """Makes every run, then writes and shows the comparison.

  Raises:
    JobFailed: a run failed or was stopped; those before it are kept.
  """
  combinations = get_combinations(sweep.over)
  if sweep.num_jobs > 1:  # for the logs
    with explain_failed_writes(sweep.workdir):
      sweep.workdir.mkdir(parents=True, exist_ok=True)
  jobs = [create_job(sweep, settings) for settings in combinations]
  run_jobs(jobs, split_cores(sweep.num_jobs))
  groups = group_runs([read_run(sweep, settings) for settings in combinations])
  rows = [summarise(name, runs) for name, runs in groups.items()]
  write_table(sweep, rows)
  save_curves(sweep.workdir / "curves.png", groups)
  print((sweep.workdir / "table.md").read_text())
  for name in ("table.md", "table.json", "curves.png"):
    print(f"written   {sweep.workdir / name}")


#### Arguments


def parse(arguments: Sequence[str]) -> Sweep:
  """The sweep that a command line asks for.

  Raises:
    UserError: something is missing, unknown or contradicts itself.
  """
  parser = Parser(
    "sweep", description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False
  )
  parser.add_argument("--config", help="a file of configs/; variants may follow it after a colon")
  parser.add_argument("--over", action="append", default=[], metavar="KEY=VALUE,VALUE")
  parser.add_argument("--workdir", type=pathlib.Path, help="default: runs/NAME-sweep-KEYS-HASH")
  parser.add_argument("--jobs", type=int, default=1, help="runs at once, on cores of their own")
  options, overrides = parser.parse_known_args(arguments)
  if not options.config:
    raise UserError("--config is missing; try --config=configs/pyramid.py")
  if not pathlib.Path(options.config.split(":")[0]).is_file():
    raise UserError(f"--config={options.config!r} is no file here; call from the repository root.")
  over = parse_over(options.over)
  check_overrides(overrides, over)
  cores = count_cores()
  expected = f"from 1 to {cores}, the cores that this process may use"
  require(1 <= options.jobs <= cores, "--jobs", options.jobs, expected)
  workdir = options.workdir or default_workdir(options.config, list(over), overrides)
  return Sweep(options.config, over, overrides, workdir, options.jobs)


def parse_over(texts: Sequence[str]) -> dict[str, list[str]]:
  """{"norm": ["batch", "layer"]} of ["norm=batch,layer"].

  Raises:
    UserError: there is none, or one has an unknown key or value, no value, or one twice.
  """
  if not texts:
    raise UserError("--over is missing; try --over=norm=batch,layer,group,ghost")
  over: dict[str, list[str]] = {}
  for text in texts:
    key, _, values = text.partition("=")
    choose("--over", key, common.SHORT_KEYS)
    if key in over:
      raise UserError(f"--over={key} is given twice; write --over={key}=VALUE,VALUE once.")
    over[key] = values.split(",")
    for value in over[key]:
      _check_value(key, value)
      if over[key].count(value) > 1:
        raise UserError(f"--over={text} repeats {value!r}.")
  return over


def _check_value(key: str, value: str) -> None:
  """Now rather than hours later, when its turn has come."""
  if not value:
    raise UserError(f"--over={key} lacks a value; write --over={key}=VALUE,VALUE.")
  defaults = common.get_config().to_dict()
  if key == "norm":
    choose("--over=norm", value, defaults["norm"])
  elif isinstance(flatten(defaults)[common.SHORT_KEYS[key]], int):
    low, high = RANGES[key]
    # "01" would be another name of the run "1".
    plain = re.fullmatch("0|[1-9][0-9]{0,9}", value) is not None
    fits = plain and low <= int(value) <= high
    require(fits, f"--over={key}", value, f"a whole number from {low} to {high}")
  else:
    low, high = RANGES[key]
    expected = f"a positive number, {high:g} at most"
    require(low < _to_number(value) <= high, f"--over={key}", value, expected)


def _to_number(text: str) -> float:
  """nan where it is none."""
  try:
    return float(text)
  except ValueError:
    return math.nan


def check_overrides(overrides: Sequence[str], over: Mapping[str, object]) -> None:
  """Raises a UserError for what main.py would not take, and for overrides of what is swept."""
  swept = [common.SHORT_KEYS[key] for key in over] + ["num_seeds"] * (SEED in over)
  for override in overrides:
    if not override.startswith("--config."):
      raise UserError(
        f"{override!r} is unknown; use --over, --jobs, --workdir or --config.KEY=VALUE."
      )
    key = override.removeprefix("--config.").split("=")[0]
    if key in swept:
      raise UserError(f"{override!r} would hold for every run of the sweep; leave it out.")


def default_workdir(config: str, keys: Sequence[str], overrides: Sequence[str]) -> pathlib.Path:
  """runs/NAME-sweep-KEYS-HASH: a sweep with more values finds the runs that are done."""
  digest = hashlib.sha256(json.dumps([config, keys, overrides]).encode()).hexdigest()[:8]
  name = pathlib.Path(config.split(":")[0]).stem
  return pathlib.Path("runs", "-".join([name, "sweep", *keys, digest]))


#### Runs


def get_combinations(over: Mapping[str, Sequence[str]]) -> list[Settings]:
  """The settings of each run; the last key changes fastest."""
  return [dict(zip(over, values, strict=True)) for values in itertools.product(*over.values())]


def format_settings(settings: Mapping[str, str]) -> str:
  """norm=layer,seed=1"""
  return ",".join(f"{key}={value}" for key, value in settings.items())


def get_command(sweep: Sweep, settings: Settings) -> list[str]:
  """The command line of one run."""
  name = format_settings(settings)
  config = f"{sweep.config}{',' if ':' in sweep.config else ':'}{name}"
  workdir = f"--workdir={sweep.workdir / name}"
  return [sys.executable, "main.py", f"--config={config}", *sweep.overrides, workdir]


def create_job(sweep: Sweep, settings: Settings) -> Job:
  """One run as a process; several at once would mix up what they print."""
  name = format_settings(settings)
  log = sweep.workdir / f"{name}.log" if sweep.num_jobs > 1 else None
  return Job(name, get_command(sweep, settings), log)


def read_run(sweep: Sweep, settings: Settings) -> Run:
  """Reads what the run has written.

  Raises:
    UserError: its folder holds no result or no records.
  """
  workdir = sweep.workdir / format_settings(settings)
  result = read_result(workdir)
  if result is None:
    raise UserError(f"{str(workdir)!r} holds no result.json; run the sweep again.")
  return Run(settings, result, read_records(workdir))


def read_records(workdir: pathlib.Path) -> list[Record]:
  """The epochs of a finished run.

  Raises:
    UserError: metrics.jsonl is missing or damaged.
  """
  path = workdir / "metrics.jsonl"
  try:
    return [json.loads(line) for line in path.read_text().splitlines()]
  except (OSError, ValueError) as error:
    raise UserError(
      f"{str(path)!r} cannot be read ({describe_briefly(error)}); delete result.json beside it, "
      "and the same command writes both anew from the last checkpoint."
    ) from error


#### Comparison


def group_runs(runs: Sequence[Run]) -> dict[str, list[Run]]:
  """The runs that differ in their seed alone, under the settings they share.

  Raises:
    UserError: runs of a group have trained for different numbers of epochs.
  """
  groups: dict[str, list[Run]] = {}
  for one in runs:
    shared = {key: value for key, value in one.settings.items() if key != SEED}
    groups.setdefault(format_settings(shared) or "all seeds", []).append(one)
  for name, group in groups.items():
    epochs = sorted({len(one.records) for one in group})
    if len(epochs) > 1:
      raise UserError(f"the seeds of {name!r} have {epochs} epochs; choose another --workdir.")
  return groups


def per_seed(record: Record, name: str) -> list[float]:
  """The values of a record for each seed that was trained at once; mostly one."""
  return record.get(f"{name}_per_seed", [record[name]])


def get_scores(result: Record, records: Sequence[Record]) -> dict[str, list[float]]:
  """Accuracies in [0, 1] of a finished run, a list over its seeds for each name of SCORES.

  Those of validation are missing where the run had no validation images, that of test in a trial.
  """
  last = records[-1]
  scores = {"train_accuracy": per_seed(last, "train_accuracy")}
  if "test_accuracy" in result:
    scores["test_accuracy"] = per_seed(result, "test_accuracy")
  if "validation_accuracy" in last:
    scores["validation_accuracy"] = per_seed(last, "validation_accuracy")
    epochs = (per_seed(record, "validation_accuracy") for record in records)
    scores["best_validation_accuracy"] = [max(values) for values in zip(*epochs, strict=True)]
  return scores


def describe(values: Sequence[float]) -> dict[str, Any] | None:
  """Mean, sample standard deviation (None of a single value) and number; None of no values."""
  if not values:
    return None
  sd = statistics.stdev(values) if len(values) > 1 else None
  return {"mean": statistics.fmean(values), "sd": sd, "n": len(values)}


def format_percent(score: Mapping[str, Any] | None) -> str:
  """84.10 ± 0.20 (n = 3), of fractions."""
  if score is None:
    return "–"
  spread = "" if score["sd"] is None else f" ± {100 * score['sd']:.2f}"
  return f"{100 * score['mean']:.2f}{spread} (n = {score['n']})"


def summarise(name: str, runs: Sequence[Run]) -> Summary:
  """The row of a combination; accuracies as `describe` gives them, seconds the mean over runs."""
  scores = [get_scores(one.result, one.records) for one in runs]
  return {
    "combination": name,
    "parameters": runs[0].result["parameters"],
    "protocol": runs[0].result["protocol"],
    **{
      key: describe([value for score in scores for value in score.get(key, [])]) for key in SCORES
    },
    "train_seconds": statistics.fmean(one.result["train_seconds"] for one in runs),
  }


def write_table(sweep: Sweep, rows: Sequence[Summary]) -> None:
  """Writes table.md, and the same as table.json, under the command that made them."""
  over = (f"--over={key}={','.join(values)}" for key, values in sweep.over.items())
  flags = [f"--config={sweep.config}", *over, *sweep.overrides]
  command = shlex.join(["python", "-m", "flax_cifar.tools.sweep", *flags])
  write_json(sweep.workdir / "table.json", {"command": command, "rows": rows})
  (sweep.workdir / "table.md").write_text(f"    {command}\n\n{format_table(rows)}")


def format_table(rows: Sequence[Summary]) -> str:
  """A table in Markdown, and what its columns mean."""
  header = ["combination", "parameters", *SCORES.values(), "seconds"]
  lines = [header, ["---", *["---:"] * (len(header) - 1)]]
  for row in rows:
    scores = (format_percent(row[key]) for key in SCORES)
    seconds = f"{row['train_seconds']:,.0f}"
    lines.append([row["combination"], f"{row['parameters']:,}", *scores, seconds])
  text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
  text += "\nAccuracies in percent, of the last epoch unless it says best; mean ± sample standard\n"
  text += "deviation over the seeds. Seconds of training, without evaluation, of one run.\n"
  if any(row["protocol"] == "published" for row in rows):
    text += "The protocol is `published`: validation is on the test split.\n"
  if any(row["protocol"] == "trial" for row in rows):
    text += "The protocol is `trial`: the test split was not looked at.\n"
  return text


def save_curves(path: pathlib.Path, groups: Mapping[str, Sequence[Run]]) -> None:
  """Writes loss and accuracy by epoch: a colour per combination, a band of ± sd over its seeds."""
  from flax_cifar import pictures

  figure = pictures.create_figure(11, 4.5)
  loss, accuracy = figure.subplots(1, 2)
  for axis, metric, scale in ((loss, "loss", 1), (accuracy, "accuracy", 100)):
    for colour, (name, runs) in zip(_get_colours(len(groups)), groups.items(), strict=True):
      axis.plot([], [], color=colour, label=name)
      _draw_metric(axis, runs, f"train_{metric}", scale, color=colour, linestyle="--")
      _draw_metric(axis, runs, f"validation_{metric}", scale, color=colour, linestyle="-")
    for split, style in (("train", "--"), ("validation", "-")):
      axis.plot([], [], color="grey", linestyle=style, label=split)
  pictures.finish_axis(loss, "loss (nats)")
  pictures.finish_axis(accuracy, "accuracy (%)")
  pictures.save_figure(figure, path)


def _get_colours(count: int) -> list[Any]:
  from matplotlib import colormaps

  if count <= 10:
    return [f"C{number}" for number in range(count)]
  return [colormaps["turbo"](number / (count - 1)) for number in range(count)]


def _draw_metric(
  axis: "Axes", runs: Sequence[Run], name: str, scale: float, *, color: Any, linestyle: str
) -> None:
  """Draws the mean over the seeds of `runs`, times `scale`; nothing where it was not measured."""
  import numpy as np

  records = [record for record in runs[0].records if name in record]
  if not records:
    return
  epochs = [record["epoch"] for record in records]
  curves = np.concatenate([np.transpose([per_seed(r, name) for r in o.records]) for o in runs])
  mean = scale * curves.mean(0)  # curves: (seeds, epochs)
  axis.plot(epochs, mean, color=color, linestyle=linestyle)
  if len(curves) > 1:
    sd = scale * curves.std(0, ddof=1)
    axis.fill_between(epochs, mean - sd, mean + sd, color=color, alpha=0.2, linewidth=0)


if __name__ == "__main__":
  main()
