"""Compares finished runs: two recipes, seed by seed.

  python -m flax_cifar.tools.compare A B

A and B are folders: that of one run, or one that holds the runs of several seeds. SWEEP/norm=batch
names the runs of a sweep that have this setting: norm=batch,seed=0 and norm=batch,seed=1. Two runs
of the same seed make a pair, and the differences of the pairs say whether one recipe is better
than the other, with Student's 95 % interval. The score is the validation accuracy of the last
epoch, by which recipes are to be chosen; --score=test takes that of the test split. A sweep makes
its table with this module too.
"""

import argparse
import dataclasses
import json
import pathlib
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from flax_cifar import environment, errors, metrics
from flax_cifar.configs import variants
from flax_cifar.data.augment import arguments
from flax_cifar.run import config as config_lib
from flax_cifar.run import finished, plots, tables, workdir
from flax_cifar.tools import command_line

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure

Summary = dict[str, Any]  # a row of the table

SEED = "seed"
FOLDER_HELP = "folder of a run, or of several, or settings in a sweep: SWEEP/norm=batch"
REPETITION_KEYS = ("name", "seed", "num_seeds", *config_lib.FREE_KEYS)  # may differ in repetitions
SCORES = {  # name in table.json -> header in table.md
  "validation_accuracy": "validation",
  "best_validation_accuracy": "best validation",
  "test_accuracy": "test",
  "train_accuracy": "train",
}


@dataclasses.dataclass(frozen=True)
class Difference:
  """Two recipes, A and B, compared seed by seed.

  Attributes:
    score: "validation", "test" or "train".
    peeked: for A and B, whether the validation images are those of the test split, see `PROTOCOLS`.
    seeds: those that both have, in order.
    unpaired: the seeds that A alone has, and those that B alone has.
    a: the scores of A, in [0, 1].
    b: the scores of B.
    changes: a line for each config key in which B differs from A.
  """

  score: str
  peeked: tuple[bool, bool]
  seeds: list[int]
  unpaired: tuple[list[int], list[int]]
  a: list[float]
  b: list[float]
  changes: list[str]

  @property
  def sample(self) -> dict[str, Any]:
    """`metrics.describe_difference` of B - A."""
    return metrics.describe_difference([b - a for a, b in zip(self.a, self.b, strict=True)])

  @property
  def verdict(self) -> str:
    interval = self.sample["interval"]
    if interval is None:
      return "one pair says nothing of chance; train more seeds"
    if interval[0] > 0 or interval[1] < 0:
      return f"{'B' if interval[0] > 0 else 'A'} is better"
    return "no difference is shown: the interval has 0 in it"


def main() -> None:
  with command_line.one_line_errors():
    options = parse(sys.argv[1:])
    difference = compare(options.a, options.b, options.score)
    print(format_json(difference) if options.json else format_difference(difference))


def create_parser() -> command_line.Parser:
  """The flags."""
  parser = command_line.create_parser("compare", __doc__)
  for name in "ab":
    parser.add_argument(name, metavar=name.upper(), help=FOLDER_HELP)
  parser.add_argument(
    "--score",
    choices=["validation", "test", "train"],
    default="validation",
    help="the split whose accuracy is compared; default: validation",
  )
  parser.add_argument("--json", action="store_true", help="print JSON")
  return parser


def parse(arguments: Sequence[str]) -> argparse.Namespace:
  """The options of a command line.

  Raises:
    UserError: something is missing or unknown.
  """
  options = create_parser().parse_args(arguments)
  options.a, options.b = (errors.get_path(name.upper(), vars(options)[name]) for name in "ab")
  return options


# ---- Two recipes


def compare(a: pathlib.Path, b: pathlib.Path, score: str) -> Difference:
  """Compares the runs in two folders by `score`: "validation", "test" or "train".

  It warns where the two were scored on different images.

  Raises:
    UserError: a folder has no finished run, or runs of several recipes; the two have no seed in
      common; a run has no such score.
  """
  runs_a, runs_b = find_runs(a), find_runs(b)
  scores_a, scores_b = (collect_scores(runs, score) for runs in (runs_a, runs_b))
  seeds = sorted(scores_a.keys() & scores_b.keys())
  if not seeds:
    raise errors.UserError(
      f"{str(a)!r} has seeds {sorted(scores_a)} and {str(b)!r} has {sorted(scores_b)}; a pair "
      "needs the same seed in both."
    )
  _warn_of_other_images(runs_a, runs_b, score)
  return Difference(
    score=score,
    peeked=(_has_peeked(runs_a, score), _has_peeked(runs_b, score)),
    seeds=seeds,
    unpaired=(sorted(scores_a.keys() - seeds), sorted(scores_b.keys() - seeds)),
    a=[scores_a[seed] for seed in seeds],
    b=[scores_b[seed] for seed in seeds],
    changes=errors.list_differences(
      get_recipe(runs_a[0]), get_recipe(runs_b[0]), places=("in A", "in B")
    ),
  )


def _has_peeked(runs: Sequence[finished.Run], score: str) -> bool:
  return score == "validation" and any(
    run.result["config"]["protocol"] == "published" for run in runs
  )


def _warn_of_other_images(
  runs_a: Sequence[finished.Run], runs_b: Sequence[finished.Run], score: str
) -> None:
  """Warns where a run of A and one of B, which both recorded their images, had different ones."""
  known_a, known_b = (_list_digests(runs, score) for runs in (runs_a, runs_b))
  if known_a and known_b and len({*known_a, *known_b}) > 1:
    errors.warn(
      f"A and B were scored on different {score} images ({score}_sha256 is "
      f"{' and '.join(known_a)} in A and {' and '.join(known_b)} in B); the difference is not that "
      "of the recipes alone"
    )


def _list_digests(runs: Sequence[finished.Run], split: str) -> list[str]:
  """The digests of the images of a split that the results have; older ones have none."""
  found = (run.result.get("data", {}).get(f"{split}_sha256") for run in runs)
  return sorted({digest for digest in found if digest})


def find_runs(folder: pathlib.Path) -> list[finished.Run]:
  """The finished runs of the one recipe that `folder` names, see `list_folders`.

  Raises:
    UserError: there is none, or they differ in more than their seeds.
  """
  first, *others = find_groups(folder).values()
  if others:
    changes = errors.list_differences(get_recipe(first[0]), get_recipe(others[0][0]))
    raise errors.UserError(
      f"the runs in {str(folder)!r} are of several recipes: {'; '.join(changes[:3])}; name those "
      "of one recipe, as SWEEP/norm=batch does in a sweep, or put them into a folder of their own."
    )
  return first


def find_groups(folder: pathlib.Path) -> dict[pathlib.Path, list[finished.Run]]:
  """The finished runs that `folder` names, in groups that differ in their seeds alone.

  It warns of runs there that have not finished.

  Returns:
    The runs of each group under a path that names it: `folder` for a single group, otherwise that
    of its runs without their seed, SWEEP/norm=batch.

  Raises:
    UserError: there is none, or one is damaged.
  """
  groups: list[tuple[dict[str, Any], dict[pathlib.Path, finished.Run]]] = []
  for path in list_folders(folder):
    run = finished.read_run(path)
    recipe = get_recipe(run)
    same = next((runs for known, runs in groups if known == recipe), None)
    if same is None:
      groups.append((recipe, same := {}))
    same[path] = run
  if not groups:
    raise errors.UserError(_explain_absence(folder))
  if unfinished := _list_unfinished(folder):
    names = errors.list_some([path.name for path in unfinished])
    errors.warn(f"not finished and left out: {names}")
  if len(groups) == 1:
    return {folder: list(groups[0][1].values())}
  return _name_groups([runs for _, runs in groups])


def list_folders(folder: pathlib.Path) -> list[pathlib.Path]:
  """The folders of the finished runs that `folder` names, sorted.

  It is that of a run, or holds some. One that does not exist names the runs beside it that have all
  of its settings: SWEEP/norm=batch names SWEEP/norm=batch,seed=0 and SWEEP/norm=batch,seed=1.
  """
  return [path for path in _list_named(folder) if (path / "result.json").exists()]


def _list_unfinished(folder: pathlib.Path) -> list[pathlib.Path]:
  """The folders of the runs that `folder` names and that have begun but not finished, sorted."""
  return [
    path
    for path in _list_named(folder)
    if (path / workdir.CONFIG).exists() and not (path / "result.json").exists()
  ]


def _list_named(folder: pathlib.Path) -> list[pathlib.Path]:
  """The folders that `folder` names, with or without a run; see `list_folders`."""
  if (folder / "result.json").exists():
    return [folder]
  if folder.exists():
    return sorted(folder.glob("*/"))
  wanted = set(folder.name.split(","))
  return sorted(path for path in folder.parent.glob("*/") if wanted <= set(path.name.split(",")))


def _explain_absence(folder: pathlib.Path) -> str:
  if folder.exists() or not folder.parent.exists():
    return f"{str(folder)!r} holds no finished run; one has result.json."
  return (
    f"{str(folder)!r} does not exist, and {str(folder.parent)!r} holds no finished run with the "
    f"settings {folder.name!r}; name a folder, or settings in a sweep, as in SWEEP/norm=batch."
  )


def _name_groups(
  groups: Sequence[Mapping[pathlib.Path, finished.Run]],
) -> dict[pathlib.Path, list[finished.Run]]:
  """The runs of each group under the names of its folders without their seed.

  They keep the seed where an earlier group has that name.
  """
  named: dict[pathlib.Path, list[finished.Run]] = {}
  for group in groups:
    parent = next(iter(group)).parent
    short = errors.list_some(list(dict.fromkeys(_drop_seed(path.name) for path in group)))
    whole = errors.list_some([path.name for path in group])
    named[parent / (whole if parent / short in named else short)] = list(group.values())
  return named


def _drop_seed(name: str) -> str:
  """The name of a run's folder without its seed, the whole name if it has nothing else."""
  parts = [part for part in name.split(",") if not part.startswith(f"{SEED}=")]
  return ",".join(parts) or name


def get_recipe(run: finished.Run) -> dict[str, Any]:
  """The flat config of a run without what repetitions may differ in.

  Settings of augmentations that the run does not use are left out, too: they change nothing, and an
  older run may lack some. A run that was extended has its earlier lengths besides, because it is no
  repetition of one that had its length from the start.
  """
  config = config_lib.complete(run.result["config"])
  unused = (f"augment.{op}" for op in arguments.RULES if op not in config["augment"]["ops"])
  recipe = config_lib.without(config_lib.flatten(config), (*REPETITION_KEYS, *unused))
  earlier = metrics.list_earlier(run.records, "total_epochs", config["total_epochs"])
  return recipe | ({"extended from epochs": earlier} if earlier else {})


def collect_scores(runs: Sequence[finished.Run], score: str) -> dict[int, float]:
  """{seed: accuracy}; a UserError where a run has no such accuracy, or two have the same seed."""
  found: dict[int, float] = {}
  for run in runs:
    name, first = run.result["config"]["name"], run.result["seed"]
    accuracies = get_scores(run.result, run.records).get(f"{score}_accuracy")
    if accuracies is None:
      raise errors.UserError(f"a run of {name!r} has no {score} accuracy; try another --score.")
    for seed, accuracy in enumerate(accuracies, first):
      if seed in found:
        raise errors.UserError(f"two runs of {name!r} have seed {seed}; keep one of them.")
      found[seed] = accuracy
  return found


def format_json(difference: Difference) -> str:
  """The difference and what follows from it, as JSON."""
  content = {**dataclasses.asdict(difference), **difference.sample}
  return json.dumps({**content, "verdict": difference.verdict}, indent=2)


def format_difference(difference: Difference) -> str:
  """Lines for the screen."""
  sample, lines = difference.sample, []
  sides = zip("AB", (difference.a, difference.b), difference.peeked, strict=True)
  for name, values, has_peeked in sides:
    text = tables.format_percent(metrics.describe_sample(values))
    peeked = tables.PEEKED if has_peeked else ""
    lines.append(f"{name}         {difference.score} accuracy {text}{peeked}")
  interval = ""
  if sample["interval"]:
    low, high = (100 * bound for bound in sample["interval"])
    interval = f", 95 % interval {low:+.2f} to {high:+.2f}"
  pairs = f"{sample['n']} pairs" if sample["n"] > 1 else "1 pair"
  lines.append(f"B - A     {100 * sample['mean']:+.2f} points{interval} ({pairs})")
  for name, seeds in zip("AB", difference.unpaired, strict=True):
    if seeds:
      lines.append(
        f"left out  {'seed' if len(seeds) == 1 else 'seeds'} {errors.list_some(seeds)}, "
        f"which {name} alone has"
      )
  lines.append(f"verdict   {difference.verdict}")
  return "\n".join([*lines, *(f"differs   {change}" for change in difference.changes)])


# ---- The table of a sweep


def group_runs(
  runs: Iterable[tuple[variants.Settings, finished.Run]],
) -> dict[str, list[finished.Run]]:
  """The runs that differ in their seed alone, under the settings they share.

  Args:
    runs: each after the keys that are swept and their values in it.

  Raises:
    UserError: runs of a group have trained for different numbers of epochs.
  """
  groups: dict[str, list[finished.Run]] = {}
  for settings, one in runs:
    shared = {key: value for key, value in settings.items() if key != SEED}
    groups.setdefault(variants.format_settings(shared) or "all seeds", []).append(one)
  for name, group in groups.items():
    epochs = sorted({len(one.records) for one in group})
    if len(epochs) > 1:
      raise errors.UserError(
        f"the seeds of {name!r} have {epochs} epochs; choose another --workdir."
      )
  return groups


def get_scores(
  result: finished.Record, records: Sequence[finished.Record]
) -> dict[str, list[float]]:
  """Accuracies in [0, 1] of a finished run, a list over its seeds for each name of SCORES.

  Those of validation are missing where the run had no validation images, that of test in a trial.
  """
  last = records[-1]
  scores = {"train_accuracy": metrics.get_per_seed(last, "train_accuracy")}
  if "test_accuracy" in result:
    scores["test_accuracy"] = metrics.get_per_seed(result, "test_accuracy")
  if "validation_accuracy" in last:
    scores["validation_accuracy"] = metrics.get_per_seed(last, "validation_accuracy")
    epochs = (metrics.get_per_seed(record, "validation_accuracy") for record in records)
    scores["best_validation_accuracy"] = [max(values) for values in zip(*epochs, strict=True)]
  return scores


def summarize(name: str, runs: Sequence[finished.Run]) -> Summary:
  """The row of a combination: accuracies as `metrics.describe_sample` gives them, mean seconds."""
  scores = [get_scores(one.result, one.records) for one in runs]
  return {
    "combination": name,
    "parameters": runs[0].result["parameters"],
    "protocol": runs[0].result["protocol"],
    **{
      key: metrics.describe_sample([value for score in scores for value in score.get(key, [])])
      for key in SCORES
    },
    "train_seconds": statistics.fmean(one.result["train_seconds"] for one in runs),
  }


def format_scores(row: Summary) -> list[str]:
  """A cell for each of SCORES; it says where a validation accuracy is one on the test split."""
  cells = []
  for key in SCORES:
    is_peeked = row[key] and row["protocol"] == "published" and "validation" in key
    cells.append(tables.format_percent(row[key]) + (tables.PEEKED if is_peeked else ""))
  return cells


def format_table(rows: Sequence[Summary]) -> str:
  """A table in Markdown, and what its columns mean."""
  header = ["combination", "parameters", *SCORES.values(), "seconds"]
  lines = []
  for row in rows:
    scores = (tables.format_percent(row[key]) for key in SCORES)
    seconds = f"{row['train_seconds']:,.0f}"
    lines.append([row["combination"], f"{row['parameters']:,}", *scores, seconds])
  text = tables.format_markdown(header, lines, [False] + [True] * (len(header) - 1))
  text += "\nAccuracies in percent, of the last epoch unless it says best; mean ± sample standard\n"
  text += "deviation over the seeds. Seconds of training, without evaluation, of one run.\n"
  if any(row["protocol"] == "published" for row in rows):
    text += "The protocol is `published`: validation is on the test split.\n"
  if any(row["protocol"] == "trial" for row in rows):
    text += "The protocol is `trial`: the test split was not looked at.\n"
  return text


@plots.warn_on_failure
def save_curves(path: pathlib.Path, groups: Mapping[str, Sequence[finished.Run]]) -> None:
  """Writes loss and accuracy by epoch."""
  plots.save_figure(draw_curves(groups), path)


def draw_curves(groups: Mapping[str, Sequence[finished.Run]]) -> "Figure":
  """Draws loss and accuracy by epoch: a color per combination, a band of ± sd over its seeds."""
  figure = plots.create_figure(11, 4.5)
  loss, accuracy = figure.subplots(1, 2)
  for axis, metric, scale in ((loss, "loss", 1), (accuracy, "accuracy", 100)):
    for color, (name, runs) in zip(_get_colors(len(groups)), groups.items(), strict=True):
      # Without the space matplotlib would leave out a name that starts with _.
      axis.plot([], [], color=color, label=f" {name}" if name.startswith("_") else name)
      _draw_metric(axis, runs, f"train_{metric}", scale, color=color, linestyle="--")
      _draw_metric(axis, runs, f"validation_{metric}", scale, color=color, linestyle="-")
    for split, style in (("train", "--"), ("validation", "-")):
      axis.plot([], [], color="grey", linestyle=style, label=split)
  plots.finish_axis(loss, "loss (nats)")
  plots.finish_axis(accuracy, "accuracy (%)")
  return figure


def _get_colors(count: int) -> list[Any]:
  from matplotlib import colormaps

  if count <= 10:
    return [f"C{number}" for number in range(count)]
  return [colormaps["turbo"](number / (count - 1)) for number in range(count)]


def _draw_metric(
  axis: "Axes", runs: Sequence[finished.Run], name: str, scale: float, *, color: Any, linestyle: str
) -> None:
  """Draws the mean over the seeds of `runs`, times `scale`; nothing where it was not measured."""
  records = [record for record in runs[0].records if name in record]
  if not records:
    return
  epochs = [record["epoch"] for record in records]
  curves = np.concatenate(
    [np.transpose([metrics.get_per_seed(r, name) for r in o.records]) for o in runs]
  )
  mean = scale * curves.mean(0)  # curves: (seeds, epochs), NaN for a loss that was not finite
  axis.plot(epochs, mean, color=color, linestyle=linestyle)
  if len(curves) > 1:
    sd = scale * curves.std(0, ddof=1)
    axis.fill_between(epochs, mean - sd, mean + sd, color=color, alpha=0.2, linewidth=0)


if __name__ == "__main__":
  environment.apply_settings()
  main()
