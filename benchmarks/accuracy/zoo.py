"""Adds trained networks to the package, and describes those that it has.

Command     python -m benchmarks.accuracy.zoo add RUN_FOLDER ... [--force]
                copies the weights of finished runs to flax_cifar/zoo/
            python -m benchmarks.accuracy.zoo
                scores every network that is there on the test images, as they are and corrupted,
                and writes their cards, docs/zoo.json, docs/zoo.md and docs/images/zoo.png
            python -m benchmarks.accuracy.zoo score NAME ...
                the same, but scores these alone and keeps the rows of the others
            python -m benchmarks.accuracy.zoo page
                writes the cards, the page and the picture again, from docs/zoo.json
"""

import json
import math
import pathlib
import shutil
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import common
from benchmarks.accuracy import published, results
from flax_cifar import errors, files, zoo
from flax_cifar.models import layer_table
from flax_cifar.run import plots, tables
from flax_cifar.run import result as result_lib
from flax_cifar.run import weights as weights_lib
from flax_cifar.tools import command_line, evaluate

RECORD = "zoo.json"
NEAR = 0.001  # of an accuracy: ten images of 10,000, of which bfloat16 switches two or three
TICKS: dict[str, dict[float, str]] = {
  "parameters": {1e4: "10k", 3e4: "30k", 1e5: "100k", 3e5: "300k", 1e6: "1M", 3e6: "3M"},
  "multiply_adds": {3e6: "3M", 1e7: "10M", 3e7: "30M", 1e8: "100M", 3e8: "300M", 1e9: "1G"},
}
# Of the picture: the x at which names stand to the left; when those of neighbors stand in lines.
Ranges = Sequence[tuple[float, float]]
OTHERS_LEFT: Ranges = [(0, 4e4)]
OURS_LEFT: Ranges = [(0, 48_200), (6e4, 1e8)]  # of networks with 48,500 parameters to the right
NO_NAMES: Ranges = []
NEAR_FACTOR, NEAR_PERCENT = 0.4, 0.7  # in the logarithm of parameters, and in accuracy
LINE_POINTS = 9
_REVISED = "no trial chose the recipe, which followed test scores of earlier ones: docs/recipes.md"
_BY_FLAGS = (
  f"{_REVISED}. The run set the keys of `long`, which was another recipe at its commit, by flags, "
  "and read the images from an npz file: the command sets the same keys, and draws other batches"
)
NOTES = {  # of cards
  "skip-long": "the recipe was revised after a test score, by validation images: docs/recipes.md",
  "tiny50k-cpu": _REVISED,
  "tiny100k-full-long": _BY_FLAGS,
  "tiny200k-full-long": _BY_FLAGS,
}
MAX_BYTES = 3_000_000  # of the weights of a network, as they are part of the package
INTRODUCTION = """\
# Trained networks

Written by `python -m benchmarks.accuracy.zoo`, which scores the weights that come with the package
on the 10,000 test images of CIFAR-10, each once, without test-time augmentation. Each network is a
single run (n = 1); its card has the hardware and the commit of the training, and `zoo.json` those
of the last scoring, which may have been of some rows alone. All are scored in float32. Those that
were trained in bfloat16 were scored in it at the end of their run, where a few images get another
class, and [results.md](results.md) has that accuracy. [recipes.md](recipes.md) describes how the
recipes were chosen, and names those that were revised after a test score.

    python -m flax_cifar.tools.evaluate --model=NAME --split=test

repeats a row, and `--corruptions` adds its last column. In Python,
`flax_cifar.load_pretrained(NAME).predict(images)` gives the probability of each class. NLL is the
negative log-likelihood in nats. ECE is the expected calibration error in percent, in 15 bins.
Corrupted is the mean accuracy over six common corruptions in five severities each, made on the fly:
see `flax_cifar/data/corruptions.py`.

"""


def main() -> None:
  parser = common.create_parser(__doc__)
  commands = parser.add_subparsers(dest="command")
  adder = commands.add_parser("add", help="copy the weights of finished runs to flax_cifar/zoo/")
  adder.add_argument("folders", nargs="+", type=pathlib.Path, metavar="RUN_FOLDER")
  adder.add_argument("--force", action="store_true", help="replace; take any commit")
  scorer = commands.add_parser("score", help="score these networks alone")
  scorer.add_argument("names", nargs="+", choices=zoo.list_models(), metavar="NAME")
  commands.add_parser("page", help="write the cards, the page and the picture again")
  options = parser.parse_args()
  with command_line.one_line_errors():
    if options.command == "add":
      paths = [add(folder, zoo.FOLDER, force=options.force) for folder in options.folders]
    else:
      if options.command != "page":
        score(results.DOCS, options.names if options.command else zoo.list_models())
      paths = write_page(results.DOCS)
  for path in paths:
    print(f"written   {path}")


# ---- Add


def add(folder: pathlib.Path, target: pathlib.Path, *, force: bool) -> pathlib.Path:
  """Copies the weights of a finished run to a folder of its name in `target`.

  Raises:
    UserError: see `results.check_content` and `results.check_name`; or the weights are too large,
      or those of another network than the run, or there is one of this name.
  """
  run = results.read_run(folder)
  results.check_content(folder, run.content, force=force)
  results.check_name(folder, run.content, force=force)
  path, source = target / run.name, folder / zoo.WEIGHTS
  if path.exists() and not force:
    raise errors.UserError(f"{run.name!r} is in {str(target)!r} already; --force replaces it.")
  weights = weights_lib.load_weights(source)
  errors.require(
    source.stat().st_size <= MAX_BYTES, "bytes", source.stat().st_size, f"up to {MAX_BYTES:,}"
  )
  rows = layer_table.get_layer_table(weights_lib.create_network(weights), weights.image_shape)
  path.mkdir(parents=True, exist_ok=True)
  (path / "run.json").write_text(results.encode(run.content), encoding="utf-8")
  (path / "layers.txt").write_text(tables.format_layer_table(rows), encoding="utf-8")
  shutil.copyfile(source, path / zoo.WEIGHTS)  # last: a folder with it is in the list
  return path


# ---- Describe


def score(docs: pathlib.Path, names: Sequence[str]) -> None:
  """Scores the networks `names`; zoo.json keeps the rows of the others."""
  path = docs / RECORD
  old = json.loads(path.read_text("utf-8"))["rows"] if path.exists() else []
  rows = {row["model"]: row for row in old}
  if missing := set(zoo.list_models()) - rows.keys() - set(names):
    errors.warn(f"the table will lack networks without scores: {errors.list_some(sorted(missing))}")
  for name in names:
    options = evaluate.Options(
      zoo.find_weights(name), split="test", dtype=zoo.DTYPE, corruptions=True
    )
    rows[name] = describe(name, evaluate.evaluate_weights(options))
    print(f"{name}: {rows[name]['accuracy']:.2%}", flush=True)
  common.write_record(path, [rows[name] for name in zoo.list_models() if name in rows])


def write_page(docs: pathlib.Path) -> list[pathlib.Path]:
  """Writes the cards, zoo.md and its picture from zoo.json."""
  page, picture = docs / "zoo.md", docs / "images" / "zoo.png"
  rows = json.loads((docs / RECORD).read_text("utf-8"))["rows"]
  for row in rows:
    write_card(row)
  page.write_text(format_page(rows), encoding="utf-8")
  save_picture(picture, rows)
  return [page, picture]


def describe(name: str, score: evaluate.Score) -> dict[str, Any]:
  """The row of a network, which its scores.json and its card show too.

  Raises:
    UserError: the score is not that of its run, but for what another type of numbers may change.
  """
  folder = zoo.FOLDER / name
  run = json.loads((folder / "run.json").read_text("utf-8"))
  weights = weights_lib.load_weights(zoo.find_weights(name))
  layers = layer_table.get_layer_table(weights_lib.create_network(weights), weights.image_shape)
  expected = f"that of its run, {run['test_accuracy']}"
  near = abs(score.accuracy - run["test_accuracy"]) <= NEAR
  errors.require(near, f"test accuracy of {name}", score.accuracy, expected)
  row = {
    "model": name,
    "network": run["config"]["model"]["name"],
    "parameters": run["parameters"],
    "multiply_adds": sum(layer.multiply_adds for layer in layers),
    "bytes": zoo.find_weights(name).stat().st_size,
    "epochs": run["epochs"],
    "accuracy": score.accuracy,
    "loss": score.loss,
    "calibration_error": score.calibration_error,
    "corrupted_accuracy": score.corrupted_accuracy,
    "corrupted": score.corrupted,
  }
  files.write_json(folder / "scores.json", row)
  return row


def write_card(row: Mapping[str, Any]) -> None:
  """Writes the card of a network, README.md in its folder, from its row and its run."""
  folder = zoo.FOLDER / row["model"]
  run = json.loads((folder / "run.json").read_text("utf-8"))
  weights = weights_lib.load_weights(zoo.find_weights(row["model"]))
  layers = layer_table.get_layer_table(weights_lib.create_network(weights), weights.image_shape)
  sides = layer_table.get_receptive_field(layers) or weights.image_shape[:2]
  card = format_card(row, run, "{} x {} pixels".format(*sides))
  (folder / "README.md").write_text(card, encoding="utf-8")


def format_card(row: Mapping[str, Any], content: Mapping[str, Any], field: str) -> str:
  """The model card, in Markdown.

  Args:
    row: of `describe`.
    content: of the run, as run.json has it.
    field: the receptive field, in words.
  """
  name, config = row["model"], content["config"]
  commits = ", ".join(f"`{commit[:7]}`" for commit in result_lib.list_commits(content))
  facts = {
    "network": f"`{config['model']['name']}`, {config['model']['norm']} norm; layers.txt has its "
    f"layers, and its receptive field is {field}",
    "parameters": f"{content['parameters']:,}",
    "multiply-adds": f"{row['multiply_adds']:,} for an image",
    "test accuracy": f"{row['accuracy']:.2%}, computed in {zoo.DTYPE}, without test-time "
    f"augmentation ({content['test_accuracy']:.2%} at the end of its run)",
    "weights": f"{content['scored_weights']}, of a single run, seed {content['seed']}",
    "calibration error": f"{row['calibration_error']:.2%}, in 15 bins; negative log-likelihood "
    f"{row['loss']:.4f} nats",
    "corrupted images": f"{row['corrupted_accuracy']:.2%}, the mean over six corruptions in five "
    "severities",
    "trained on": f"the training images of CIFAR-10, {config['data']['validation_size']:,} held "
    f"out; {content['epochs']} epochs, computed in {config['compute_dtype']}",
    "training took": f"{content['train_seconds'] / 60:.0f} minutes on {content['hardware']}",
    "command": f"`{content['command']}`",
    "commit": f"{commits}, JAX {content['versions']['jax']}",
  }
  if name in NOTES:
    facts["note"] = NOTES[name]
  lines = "".join(f"| {key} | {value} |\n" for key, value in facts.items())
  return f"""\
# {name}

| | |
| --- | --- |
{lines}
Use it from Python, on uint8 images (N, 32, 32, 3) in RGB:

    import flax_cifar
    network = flax_cifar.load_pretrained("{name}")
    probabilities = network.predict(images)  # (N, 10), in the order of network.class_names

or score it: `python -m flax_cifar.tools.evaluate --model={name} --split=test`.

It knows ten classes and images of 32 x 32 pixels; its predictions on other images were not
evaluated.
The weights have the license of the package; the training images are those of Krizhevsky 2009.
"""


def format_page(rows: Sequence[Mapping[str, Any]]) -> str:
  """zoo.md."""
  return "".join(
    [
      *(INTRODUCTION, format_scores(rows)),
      "\n![Accuracy against parameters and multiply-adds](images/zoo.png)\n",
      "\n## Corrupted images\n\nAccuracy in percent, the mean over five severities.\n\n",
      format_corrupted(rows),
      "\n## Others\n\nThe networks of others in the picture, as their authors report them.\n\n",
      format_frontier(),
    ]
  )


def format_scores(rows: Sequence[Mapping[str, Any]]) -> str:
  """The table of all networks."""
  header = ["model", "parameters", "multiply-adds", "kB", "epochs"]
  header += ["test accuracy (%)", "NLL", "ECE (%)", "corrupted (%)"]
  cells = [
    [
      f"[`{row['model']}`](../flax_cifar/zoo/{row['model']}/README.md)",
      f"{row['parameters']:,}",
      f"{row['multiply_adds'] / 1e6:,.1f} M",
      f"{row['bytes'] / 1e3:,.0f}",
      f"{row['epochs']}",
      f"{100 * row['accuracy']:.2f}",
      f"{row['loss']:.4f}",
      f"{100 * row['calibration_error']:.2f}",
      f"{100 * row['corrupted_accuracy']:.2f}",
    ]
    for row in rows
  ]
  return tables.format_markdown(header, cells, [False] + [True] * 8)


def format_corrupted(rows: Sequence[Mapping[str, Any]]) -> str:
  """The table of the mean accuracy under each corruption."""
  cells = []
  for row in rows:
    means = (statistics.fmean(values) for values in row["corrupted"].values())
    cells.append([f"`{row['model']}`", *(f"{100 * mean:.2f}" for mean in means)])
  names = list(rows[0]["corrupted"]) if rows else []
  return tables.format_markdown(["model", *names], cells, [False] + [True] * len(names))


def format_frontier() -> str:
  """The table of the networks of others."""
  header = ["network", "parameters", "test accuracy (%)", "what it is", "source"]
  cells = [
    [row.name, f"{row.parameters:,}", f"{row.accuracy:.2f}", row.protocol, row.source]
    for row in published.FRONTIER
  ]
  return tables.format_markdown(header, cells, [False, True, True, False, False])


@plots.warn_on_failure
def save_picture(path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
  """Draws accuracy against parameters and against multiply-adds."""
  figure = plots.create_figure(11, 4.8)
  left, right = figure.subplots(1, 2, sharey=True)
  systems = [(row.parameters, row.reported_accuracy) for row in published.ROWS]
  known = [(x, y, "") for x, y in dict.fromkeys(systems) if x and y]
  draw_points(left, known, NO_NAMES, color="grey", marker="x", label="course projects")
  for axis, key in ((left, "parameters"), (right, "multiply_adds")):
    others = [(getattr(row, key), row.accuracy, row.name) for row in published.FRONTIER]
    others = [point for point in others if point[0]]
    draw_points(axis, others, OTHERS_LEFT, color="C0", label="others")
    ours = [(row[key], 100 * row["accuracy"], row["model"]) for row in rows]
    draw_points(axis, ours, OURS_LEFT, color="C3", label="ours")
    axis.set_xlabel(key.replace("_", "-"))
    axis.grid(alpha=0.3)
  scale_axis(left, TICKS["parameters"])
  scale_axis(right, TICKS["multiply_adds"])
  left.set_ylabel("test accuracy (%)")
  left.legend(loc="lower right")
  plots.save_figure(figure, path)


def draw_points(
  axis: Any,
  points: Sequence[tuple[float, float, str]],
  names_left: Ranges,
  **style: Any,
) -> None:
  """Draws points (x, y, name) with their names to the right, or lower where another one is near.

  Within one of the ranges of x in `names_left` they stand to the left.
  """
  axis.scatter([x for x, _, _ in points], [y for _, y, _ in points], **style)
  above, lines = (1.0, 0.0), 0
  for x, y, name in sorted(points, key=lambda point: -point[1]):
    is_near = abs(math.log(x / above[0])) < NEAR_FACTOR and above[1] - y < NEAR_PERCENT
    above, lines = (x, y), lines + 1 if is_near else 0
    side = -1 if any(low <= x < high for low, high in names_left) else 1
    axis.annotate(
      name,
      (x, y),
      xytext=(6 * side, -3 - LINE_POINTS * lines),
      textcoords="offset points",
      ha="left" if side > 0 else "right",
      fontsize=7,
    )


def scale_axis(axis: Any, ticks: Mapping[float, str]) -> None:
  """Makes the horizontal axis logarithmic, from the first to the last of the labeled ticks."""
  axis.set_xscale("log")
  axis.set_xticks(list(ticks), labels=ticks.values())
  axis.set_xticks([], minor=True)
  axis.set_xlim(min(ticks), max(ticks))


if __name__ == "__main__":
  main()
