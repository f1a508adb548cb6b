"""The comparison of finished runs: a row per combination of settings, averaged over seeds."""

import dataclasses
import json
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from flax_cifar import errors, metrics
from flax_cifar.configs import variants
from flax_cifar.run import plots, tables
from flax_cifar.run import workdir as workdir_lib

if TYPE_CHECKING:
  from matplotlib.axes import Axes

Record = Mapping[str, Any]
Summary = dict[str, Any]  # a row of the table

SEED = "seed"
SCORES = {  # name in table.json -> header in table.md
  "validation_accuracy": "validation",
  "best_validation_accuracy": "best validation",
  "test_accuracy": "test",
  "train_accuracy": "train",
}


@dataclasses.dataclass(frozen=True)
class Run:
  """A finished run: what result.json and metrics.jsonl hold."""

  settings: variants.Settings
  result: Record
  records: list[Record]


# ---- Reading


def read_run(workdir: pathlib.Path, settings: variants.Settings) -> Run:
  """Reads the files of a finished run.

  Args:
    workdir: of the run.
    settings: the swept keys and their values in it.

  Raises:
    UserError: its folder holds no result or no records.
  """
  result = workdir_lib.read_result(workdir)
  if result is None:
    raise errors.UserError(f"{str(workdir)!r} holds no result.json; run the sweep again.")
  return Run(settings, result, read_records(workdir))


def read_records(workdir: pathlib.Path) -> list[Record]:
  """The epochs of a finished run.

  Raises:
    UserError: metrics.jsonl is missing or damaged.
  """
  path = workdir / "metrics.jsonl"
  try:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
  except (OSError, ValueError) as error:
    raise errors.UserError(
      f"{str(path)!r} cannot be read ({errors.shorten(error)}); delete result.json beside it, "
      "and the same command writes both again from the last checkpoint."
    ) from error


# ---- Comparing


def group_runs(runs: Sequence[Run]) -> dict[str, list[Run]]:
  """The runs that differ in their seed alone, under the settings they share.

  Raises:
    UserError: runs of a group have trained for different numbers of epochs.
  """
  groups: dict[str, list[Run]] = {}
  for one in runs:
    shared = {key: value for key, value in one.settings.items() if key != SEED}
    groups.setdefault(variants.format_settings(shared) or "all seeds", []).append(one)
  for name, group in groups.items():
    epochs = sorted({len(one.records) for one in group})
    if len(epochs) > 1:
      raise errors.UserError(
        f"the seeds of {name!r} have {epochs} epochs; choose another --workdir."
      )
  return groups


def get_scores(result: Record, records: Sequence[Record]) -> dict[str, list[float]]:
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


def summarize(name: str, runs: Sequence[Run]) -> Summary:
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
def save_curves(path: pathlib.Path, groups: Mapping[str, Sequence[Run]]) -> None:
  """Writes loss and accuracy by epoch: a color per combination, a band of ± sd over its seeds."""
  figure = plots.create_figure(11, 4.5)
  loss, accuracy = figure.subplots(1, 2)
  for axis, metric, scale in ((loss, "loss", 1), (accuracy, "accuracy", 100)):
    for color, (name, runs) in zip(_get_colors(len(groups)), groups.items(), strict=True):
      axis.plot([], [], color=color, label=name)
      _draw_metric(axis, runs, f"train_{metric}", scale, color=color, linestyle="--")
      _draw_metric(axis, runs, f"validation_{metric}", scale, color=color, linestyle="-")
    for split, style in (("train", "--"), ("validation", "-")):
      axis.plot([], [], color="grey", linestyle=style, label=split)
  plots.finish_axis(loss, "loss (nats)")
  plots.finish_axis(accuracy, "accuracy (%)")
  plots.save_figure(figure, path)


def _get_colors(count: int) -> list[Any]:
  from matplotlib import colormaps

  if count <= 10:
    return [f"C{number}" for number in range(count)]
  return [colormaps["turbo"](number / (count - 1)) for number in range(count)]


def _draw_metric(
  axis: "Axes", runs: Sequence[Run], name: str, scale: float, *, color: Any, linestyle: str
) -> None:
  """Draws the mean over the seeds of `runs`, times `scale`; nothing where it was not measured."""
  records = [record for record in runs[0].records if name in record]
  if not records:
    return
  epochs = [record["epoch"] for record in records]
  curves = np.concatenate(
    [np.transpose([metrics.get_per_seed(r, name) for r in o.records]) for o in runs]
  )
  mean = scale * curves.mean(0)  # curves: (seeds, epochs)
  axis.plot(epochs, mean, color=color, linestyle=linestyle)
  if len(curves) > 1:
    sd = scale * curves.std(0, ddof=1)
    axis.fill_between(epochs, mean - sd, mean + sd, color=color, alpha=0.2, linewidth=0)
