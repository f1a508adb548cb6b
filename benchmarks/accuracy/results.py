"""Collects finished runs in docs/results/ and sets them beside the published systems.

Command     python -m benchmarks.accuracy.results add RUN_FOLDER ... [--force]
                copies finished runs
            python -m benchmarks.accuracy.results
                writes docs/results.md
            python -m benchmarks.accuracy.results missing
                lists the commands of the runs that are missing
"""

import argparse
import dataclasses
import itertools
import json
import pathlib
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks import common
from benchmarks.accuracy import published
from flax_cifar import errors
from flax_cifar import metrics as metrics_lib
from flax_cifar.run import config, finished, tables
from flax_cifar.run import result as result_lib
from flax_cifar.tools import command_line
from flax_cifar.tools import compare as compare_lib

DOCS = pathlib.Path(__file__).parents[2] / "docs"
NOT_RUN = "not run"
# The keys that the page shows beside a run's name.
SHOWN_KEYS = (*compare_lib.REPETITION_KEYS, "compute_dtype")
INTRODUCTION = """\
# Results

Written by `python -m benchmarks.accuracy.results` from `docs/results/`, which has a file per run
with its config and every epoch, and from `benchmarks/accuracy/published.py`. Accuracies are
percentages: the mean ± the sample standard deviation over n seeds. A single run says n = 1 and has
no deviation.

- **Published** is what the source reports: a single run, mostly the best epoch on the test split.
- **Replay** is our run of the source's recipe and protocol: it trains on all 50,000 images and
  validates on the test split. We choose nothing by it, and yet report its **best epoch on test**,
  as the source did, beside the last epoch. Where the source's learning rate follows the test loss
  (A and E1 to E4), that of the replay does too. No claim of ours rests on it. C0 to C2 and E4 state
  only parts of their recipe: there the replay is our reading of it, as their configs say.
- **Ours** is our recipe. Validation images are held out of training. Test is read once, after the
  last epoch, with the moving average of the weights and without test-time augmentation. **Full**
  is the same recipe on all of train, as the sources trained, with nothing held out to choose by.
- **Three recipes were revised after a test score.** E1 missed its target of 86.0, and the change to
  E1 to E3 was chosen on validation images. `long` of the tiny networks followed a test accuracy
  of 93.11 of `tiny100k` (cutout, 80 epochs), and `cpu` the scores of `tiny50k` and of `long`; no
  trial chose either. `sprint:wide`, which has no row here, may be a fourth. See
  [recipes.md](recipes.md#e1-to-e3-skip).
- **Minutes of training** do not compare processors or recipes: most runs had other work beside
  them, AMD EPYC and Intel Xeon name processors with and without AVX-512 or AMX, and the kernels
  became faster from commit to commit. [performance.md](performance.md) has timings.
- The runs of `tiny100k-full-long` and `tiny200k-full-long` were made at commit `bcd2780` with the
  keys of `long` as flags and the images from an npz file. The command shown sets the same recipe,
  but draws other batches.
- **B1**: an early text of its source has the figures of a study of norms beside this network; by
  the study itself they are of B2's (76.96 in that text, 77.01 in the study). `s9:study` makes
  that study with this network.
- **Target** is what ours, or full where it has been run, is to reach; where we have set none, to
  beat the source.
"""

Records = Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Run:
  """A file of docs/results/: one run, of one seed or of several at once."""

  name: str  # of the config, without its seed
  seeds: range
  content: Mapping[str, Any]  # of result.json, and "metrics": the records of metrics.jsonl

  @property
  def records(self) -> Records:
    return self.content["metrics"]

  @property
  def scores(self) -> dict[str, list[float]]:
    return compare_lib.get_scores(self.content, self.records)


def main() -> None:
  options = parse_options()
  try:
    if options.command == "missing":
      print("\n".join(list_missing(load_runs(DOCS))))
      return
    if options.command == "add":
      paths = add(options.folders, DOCS, force=options.force)
    else:
      paths = [write_page(DOCS)]
  except errors.UserError as error:
    command_line.leave(f"error: {error}", 2)
  for path in paths:
    print(f"written   {path}")


def parse_options() -> argparse.Namespace:
  parser = common.create_parser(__doc__)
  commands = parser.add_subparsers(dest="command")
  commands.add_parser("missing", help="list the commands of what is not run yet")
  adder = commands.add_parser("add", help="copy finished runs to docs/results/")
  adder.add_argument("folders", nargs="+", type=pathlib.Path, metavar="RUN_FOLDER")
  adder.add_argument("--force", action="store_true", help="replace files; take any commit")
  return parser.parse_args()


# ---- Add


def add(folders: Iterable[pathlib.Path], docs: pathlib.Path, *, force: bool) -> list[pathlib.Path]:
  """Copies finished runs, all or none, and returns the files.

  Raises:
    UserError: a folder holds no finished run, or a trial, its code was not committed, it names a
      path of this machine, its name hides what it changed, or its file is there already.
  """
  texts: dict[pathlib.Path, str] = {}
  for folder in folders:
    run = read_run(folder)
    path = docs / "results" / f"{run.name}-seed-{run.seeds[0]}.json"
    check_content(folder, run.content, force=force)
    check_name(folder, run.content, force=force)
    if path in texts or (path.exists() and not force):
      raise errors.UserError(
        f"{path.name} is there already, so {str(folder)!r} would replace it; --force?"
      )
    texts[path] = encode(run.content)
  for path, text in texts.items():
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
  return list(texts)


def read_run(folder: pathlib.Path) -> Run:
  """Reads the workdir of a finished run.

  Raises:
    UserError: it holds none; or one that goes on, beyond its result.
  """
  run = finished.read_run(folder)
  command = result_lib.drop_workdir(run.result.get("command", ""))
  return create_run({**run.result, "command": command, "metrics": run.records})


def create_run(content: Mapping[str, Any]) -> Run:
  name = re.sub(r"-seed-\d+", "", content["config"]["name"])
  first = content["seed"]
  return Run(name, range(first, first + content["num_seeds"]), content)


def check_content(folder: pathlib.Path, content: Mapping[str, Any], *, force: bool) -> None:
  """Raises a UserError for a trial, what cannot be repeated, or a path of this machine."""
  if content["protocol"] == "trial":
    raise errors.UserError(f"{str(folder)!r} is a trial: it has no test accuracy.")
  for commit in [] if force else result_lib.list_commits(content):
    if commit.endswith("+") or commit == "unknown":
      raise errors.UserError(
        f"{str(folder)!r} is of code that was not committed ({commit!r}); run it again, or --force."
      )
  if earlier := metrics_lib.list_earlier(content["metrics"], "total_epochs", content["epochs"]):
    raise errors.UserError(
      f"{str(folder)!r} was extended from {errors.list_some(earlier)} epochs, so its command does "
      "not repeat it; run it in one piece."
    )
  for key, value in result_lib.list_paths(content):
    raise errors.UserError(f"{key} of {str(folder)!r} has an absolute path: {value!r}.")


def check_name(folder: pathlib.Path, content: Mapping[str, Any], *, force: bool) -> None:
  """Raises a UserError where the command changes the recipe and keeps the name of its config."""
  words = shlex.split(content["command"])
  flags = [word.removeprefix("--config.") for word in words if word.startswith("--config.")]
  keys = [flag.split("=")[0] for flag in flags]
  changes = config.without(dict.fromkeys(keys), SHOWN_KEYS)
  if changes and "name" not in keys and not force:
    raise errors.UserError(
      f"{str(folder)!r} is no plain run of {content['config']['name']!r}: its command changes "
      f"{', '.join(changes)}; run it with --config.name=OTHER too, or --force."
    )


def encode(content: Mapping[str, Any]) -> str:
  """JSON whose differences read well: indented, with a line for each epoch."""
  rest = json.dumps({key: value for key, value in content.items() if key != "metrics"}, indent=2)
  metrics = ",\n".join(f"    {json.dumps(record)}" for record in content["metrics"])
  return f'{rest.removesuffix("}").rstrip()},\n  "metrics": [\n{metrics}\n  ]\n}}\n'


# ---- The page


def write_page(docs: pathlib.Path) -> pathlib.Path:
  """Writes results.md from the files of results/."""
  path = docs / "results.md"
  path.write_text(format_page(load_runs(docs)), encoding="utf-8")
  return path


def format_page(runs: Sequence[Run]) -> str:
  return "\n".join([INTRODUCTION, format_comparison(runs), "## Runs\n", format_runs(runs)])


def load_runs(docs: pathlib.Path) -> list[Run]:
  """The runs of results/, sorted by name and seed.

  Raises:
    UserError: two of the same name have a seed in common, or differ in more than the seed.
  """
  paths = (docs / "results").glob("*.json")
  runs = [create_run(json.loads(path.read_text("utf-8"))) for path in paths]
  runs.sort(key=lambda run: (run.name, run.seeds[0]))
  for one, other in itertools.pairwise(runs):
    if one.name == other.name:
      _check_pair(one, other)
  return runs


def _check_pair(one: Run, other: Run) -> None:
  if set(one.seeds) & set(other.seeds):
    raise errors.UserError(
      f"results/ has seed {other.seeds[0]} of {one.name} twice; delete one file."
    )
  changes = errors.list_differences(
    *(compare_lib.get_recipe(finished.Run(run.content, run.records)) for run in (one, other))
  )
  if changes:
    seeds = f"{one.seeds[0]} and {other.seeds[0]}"
    raise errors.UserError(
      f"seeds {seeds} of {one.name} are no repetition: {'; '.join(changes[:5])}."
    )


def format_comparison(runs: Sequence[Run]) -> str:
  """The table of published systems."""
  header = ["id", "network", "parameters", "published", "replay", "ours", "full", "target"]
  return tables.format_markdown(header, [compare(row, runs) for row in published.ROWS])


def compare(row: published.Row, runs: Sequence[Run]) -> list[str]:
  """The cells of a published system."""
  runs = [run for run in runs if run.content["config"]["model"]["name"] == row.network]
  replay = select(runs, row.replay, "published")
  ours, full = (select(runs, name, "honest") for name in (row.ours, get_full_name(row)))
  parameters = row.parameters or (ours[0].content["parameters"] if ours else None)
  epochs = f", {row.epochs} epochs" if row.epochs else ""
  return [
    row.id,
    f"`{row.network}`, {row.what}",
    f"{parameters:,}" if parameters else "–",
    f"{row.reported}{epochs}",
    format_replay(replay),
    format_ours(ours),
    format_ours(full),
    check_target(row, full or ours),
  ]


def get_full_name(row: published.Row) -> str:
  """The name of the config `ours` with its variant `full`: skip-full-norm-group."""
  file, dash, rest = row.ours.partition("-")
  return f"{file}-full{dash}{rest}"


def list_missing(runs: Sequence[Run]) -> list[str]:
  """The commands that fill the cells of replays and of our recipe, each once."""
  done = {(run.name, run.content["protocol"]) for run in runs}
  ours = [(row.ours, "honest") for row in published.ROWS]
  replays = [(row.replay, "published") for row in published.ROWS if row.replay]
  wanted = dict.fromkeys([*ours, *replays])
  return [get_run_command(name) for name, protocol in wanted if (name, protocol) not in done]


def get_run_command(name: str) -> str:
  """skip-published-norm-group -> python main.py --config=configs/skip.py:published,norm=group"""
  file, _, variants = re.sub(r"-norm-", "-norm=", name).partition("-")
  colon = ":" if variants else ""
  return f"python main.py --config=configs/{file}.py{colon}{variants.replace('-', ',')}"


def select(runs: Sequence[Run], name: str | None, protocol: str) -> list[Run]:
  """The runs of the config `name`; those of another protocol do not count."""
  return [run for run in runs if (run.name, run.content["protocol"]) == (name, protocol)]


def collect(runs: Sequence[Run], name: str) -> dict[str, Any] | None:
  """`describe` of the score `name` over all seeds of `runs`."""
  return metrics_lib.describe_sample([value for run in runs for value in run.scores.get(name, [])])


def format_replay(runs: Sequence[Run]) -> str:
  """Best epoch on test, which is where such a run validates, and the last one."""
  if not runs:
    return NOT_RUN
  best = tables.format_percent(collect(runs, "best_validation_accuracy"))
  epochs = ", ".join(str(epoch) for run in runs for epoch in find_best_epochs(run.records))
  last = tables.format_percent(collect(runs, "test_accuracy"))
  return f"best on test {best} @ epoch {epochs}; last epoch {last}"


def find_best_epochs(records: Records) -> list[int]:
  """The epoch of the best validation accuracy of each seed; the first of equals."""
  curves = zip(
    *(metrics_lib.get_per_seed(record, "validation_accuracy") for record in records), strict=True
  )
  return [records[curve.index(max(curve))]["epoch"] for curve in curves]


def format_ours(runs: Sequence[Run]) -> str:
  if not runs:
    return NOT_RUN
  return (
    f"{tables.format_percent(collect(runs, 'test_accuracy'))}, {runs[0].content['epochs']} epochs"
  )


def check_target(row: published.Row, runs: Sequence[Run]) -> str:
  """The target and whether `runs`, those of our recipe, reach it on average."""
  goal = row.reported_accuracy if row.target is None else row.target
  if goal is None:
    return "none"
  text = f"{'over ' if row.target is None else ''}{goal:.2f}"
  text += f" in {row.target_epochs} epochs" if row.target_epochs else ""
  test = collect(runs, "test_accuracy")
  if test is None:
    return f"{text}: {NOT_RUN}"
  percent = round(100 * test["mean"], 6)  # 0.885 is 88.5, whatever the last bit says
  reached = percent > goal if row.target is None else percent >= goal
  in_time = row.target_epochs is None or runs[0].content["epochs"] <= row.target_epochs
  return f"{text}: {'reached' if reached and in_time else 'missed'}"


def format_runs(runs: Sequence[Run]) -> str:
  """The table of runs."""
  if not runs:
    return "None yet.\n"
  header = ["name", "seed", "command", "type", "epochs", "test", "validation, last epoch"]
  header += ["train, last epoch", "minutes of training", "hardware", "date", "commit", "JAX"]
  return tables.format_markdown(header, [describe_run(run) for run in runs])


def describe_run(run: Run) -> list[str]:
  """The cells of a run."""
  content, seeds = run.content, run.seeds
  commits = result_lib.list_commits(content)
  validation = tables.format_percent(collect([run], "validation_accuracy"))
  return [
    run.name,
    f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}",
    f"`{content['command']}`" if content.get("command") else "",
    content["config"]["compute_dtype"],
    str(content["epochs"]),
    tables.format_percent(collect([run], "test_accuracy")),
    f"{validation}{' on test' if content['protocol'] == 'published' else ''}",
    tables.format_percent(collect([run], "train_accuracy")),
    f"{content['train_seconds'] / 60:.1f}",
    content["hardware"],
    content["date"][:10],
    ", ".join(commit[:7] + "+" * commit.endswith("+") for commit in commits),
    content["versions"]["jax"],
  ]


if __name__ == "__main__":
  main()
