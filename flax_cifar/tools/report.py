"""Writes a report of finished runs: one HTML file with all its pictures in it.

  python -m flax_cifar.tools.report runs/NAME
  python -m flax_cifar.tools.report runs/A runs/B runs/C --out=comparison.html
  python -m flax_cifar.tools.report runs/SWEEP

The report of one run has its accuracy, curves, network, confusion matrix, mistakes with Grad-CAM,
calibration, receptive field, config and the command that repeats it. It scores the images on which
the run was scored at its end, with the weights of its first seed. Several folders, or one that
holds several runs, such as that of a sweep, give a page that puts the recipes side by side, each
with all its seeds. SWEEP/norm=batch names the runs of a sweep that have this setting.
"""

import argparse
import base64
import dataclasses
import importlib
import importlib.resources
import io
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from flax_cifar import environment, errors, files
from flax_cifar.tools import command_line

if TYPE_CHECKING:
  from matplotlib.figure import Figure

  from flax_cifar.data import dataset as dataset_lib
  from flax_cifar.models import layer_table
  from flax_cifar.run import classifier as classifier_lib
  from flax_cifar.run import finished

TEMPLATE = "report.html"
COMPARISON = "comparison.html"
FOLDER_HELP = "of a run, or of several, or settings in a sweep: SWEEP/norm=batch"
OUT_HELP = f"default: {TEMPLATE} in the folder of a run, {COMPARISON} in that of several, or here"
MISTAKES = 20  # shown, the most confident first
MATRIX_CLASSES = 20  # of a confusion matrix that a page has room for
PAIRS = 10  # of classes that are most often confused
EXPLAINED = 64  # images over which the effective receptive field is averaged
ZOOM = 4  # screen pixels to a pixel of an image, in a picture of its own


@dataclasses.dataclass(frozen=True)
class Mistake:
  """A misclassified image, as a PNG beside its Grad-CAM for the predicted class."""

  picture: str
  predicted: str
  actual: str
  confidence: float


def main() -> None:
  with command_line.one_line_errors():
    options = parse(sys.argv[1:])
    environment.check_devices()
    write(options.out, create_page(options))
    print(f"report    {options.out}")


def create_parser() -> command_line.Parser:
  """The flags."""
  parser = command_line.create_parser("report", __doc__)
  parser.add_argument("folders", nargs="+", metavar="FOLDER", help=FOLDER_HELP)
  parser.add_argument("--out", help=OUT_HELP)
  command_line.add_data_dir(parser)
  return parser


def parse(arguments: Sequence[str]) -> argparse.Namespace:
  """The options of a command line.

  Raises:
    UserError: something is missing or unknown.
  """
  options = create_parser().parse_args(arguments)
  options.folders = [errors.get_path("FOLDER", name) for name in options.folders]
  for folder in options.folders:
    is_folder = folder.is_dir() or not folder.exists()
    errors.require(is_folder, "FOLDER", str(folder), "a folder, and not a file")
  out = options.out or str(get_default_out(options.folders))
  options.out = command_line.get_out("--out", out)
  return options


def get_default_out(folders: Sequence[pathlib.Path]) -> pathlib.Path:
  """In the folder of a run or of several; here for several folders or settings in a sweep."""
  if len(folders) > 1 or not folders[0].exists():
    return pathlib.Path(COMPARISON)
  return folders[0] / (TEMPLATE if (folders[0] / "result.json").exists() else COMPARISON)


def create_page(options: argparse.Namespace) -> str:
  """The HTML of one run or of several; raises what `report_run` and `compare_runs` raise."""
  from flax_cifar.run import plots  # here: it brings JAX, for which a wrong flag need not wait

  create = compare_runs if names_several(options.folders) else report_run
  with plots.default_style():
    return create(options)


def names_several(folders: Sequence[pathlib.Path]) -> bool:
  """Whether `folders` are more than the folder of one run, be it finished or not."""
  from flax_cifar.tools import compare

  (first, *others) = folders
  return bool(others) or not first.exists() or compare.list_folders(first) not in ([first], [])


def write(path: pathlib.Path, page: str) -> None:
  """Writes the page whole or not at all; a UserError where that is not possible."""
  try:
    files.write_bytes(path, page.encode(errors="replace"))  # a path may be no UTF-8
  except OSError as error:
    raise errors.UserError(
      f"--out={str(path)!r} cannot be written ({error.strerror}); choose another file."
    ) from error


# ---- One run


def report_run(options: argparse.Namespace) -> str:
  """The page of the run in `options.folders[0]`.

  Raises:
    UserError: the folder has no finished run, or its weights or data are missing or damaged, or the
      weights are those of another run.
  """
  from flax_cifar import metrics
  from flax_cifar.models import layer_table
  from flax_cifar.run import classifier as classifier_lib
  from flax_cifar.run import finished, plots, result
  from flax_cifar.tools import evaluate

  (folder,) = options.folders
  run = finished.read_run(folder)
  weights = finished.load_weights(folder, run.result)
  network = classifier_lib.create_classifier(weights, dtype=weights.config["compute_dtype"])
  scored = result.get_final_split_name(run.result)
  _, split = evaluate.load_own_split(weights, split=scored, data_dir=options.data_dir)
  logits, _ = network.score(split)
  bins = metrics.compute_calibration(logits, split.labels)
  rows = layer_table.get_layer_table(network.model, weights.image_shape)
  return render(
    "run",
    title=run.result["config"]["name"],
    split=scored,
    seeds=run.result["num_seeds"],
    accuracy=result.format_score(run.result, "accuracy", ".2%"),
    loss=result.format_score(run.result, "loss", ".4f"),
    result=run.result,
    about=describe_config(run.result["config"]),
    curves=embed_figure(plots.draw_curves(run.records)),
    learning_rate=embed_figure(plots.draw_learning_rate(run.records, run.result["config"])),
    augmented=embed_file(folder / "augmented.png"),
    calibration=embed_figure(plots.draw_calibration(bins)),
    calibration_error=bins.error,
    settings=list_settings(run.result["config"]),
    **describe_network(rows),
    **describe_errors(logits, split.labels, network.class_names),
    mistakes=list_mistakes(network, split, logits),
    fields=embed_image(draw_fields(network, split.images, rows)),
  )


def describe_config(config: Mapping[str, Any]) -> str:
  """What the config file of a run says of itself: its source and recipes.

  It is the file of ours after which the run is named; "" where there is none, or where its network
  is another one, as the user may choose any name.
  """
  name = config["name"].partition("-")[0]
  if name not in command_line.list_configs():
    return ""
  module = importlib.import_module(f"flax_cifar.configs.{name}")
  is_same = module.get_config().model.name == config["model"]["name"]
  return (module.__doc__ or "") if is_same else ""


def describe_network(rows: "Sequence[layer_table.Row]") -> dict[str, Any]:
  """The rows of the layer table, their sums, and how to show a receptive field."""
  from flax_cifar.models import layer_table
  from flax_cifar.run import tables

  return {
    "layers": rows,
    "format_field": tables.format_field,
    **layer_table.summarize(rows),
  }


def describe_errors(
  logits: np.ndarray, labels: np.ndarray, class_names: Sequence[str]
) -> dict[str, Any]:
  """The confusion matrix, the accuracy of each class, and the pairs most often confused."""
  number = len(class_names)
  matrix = np.zeros((number, number), int)
  np.add.at(matrix, (labels, logits.argmax(-1)), 1)  # rows: actual
  counts = matrix.sum(1)
  wrong = matrix - np.diag(np.diag(matrix))
  order = np.argsort(-wrong, axis=None, kind="stable")[:PAIRS]
  pairs = [divmod(int(place), number) for place in order]
  return {
    "class_names": class_names,
    "matrix": matrix.tolist() if number <= MATRIX_CLASSES else None,
    "class_scores": [
      (name, int(count), float(right / count) if count else None)
      for name, count, right in zip(class_names, counts, np.diag(matrix), strict=True)
    ],
    "pairs": [(class_names[a], class_names[b], int(wrong[a, b])) for a, b in pairs if wrong[a, b]],
  }


def list_mistakes(
  network: "classifier_lib.Classifier", split: "dataset_lib.Split", logits: np.ndarray
) -> list[Mistake]:
  """The wrong predictions with the highest probability, with what spoke for them."""
  import jax

  from flax_cifar import explain

  probabilities = np.asarray(jax.nn.softmax(logits))
  predictions = probabilities.argmax(-1)
  confidence = probabilities.max(-1)
  wrong = np.flatnonzero(predictions != split.labels)
  chosen = wrong[np.argsort(-confidence[wrong], kind="stable")][:MISTAKES]
  if not len(chosen):
    return []
  heat = jax.jit(explain.compute_grad_cam, static_argnums=0)(
    network.model,
    network.weights.variables,
    normalize(network, split.images[chosen]),
    predictions[chosen],
  )
  names = network.class_names
  return [
    Mistake(
      picture=embed_image(np.concatenate([image, overlay(image, np.asarray(one))], 1)),
      predicted=names[predictions[i]],
      actual=names[split.labels[i]],
      confidence=float(confidence[i]),
    )
    for i, image, one in zip(chosen, split.images[chosen], heat, strict=True)
  ]


def draw_fields(
  network: "classifier_lib.Classifier", images: np.ndarray, rows: "Sequence[layer_table.Row]"
) -> np.ndarray:
  """The first image, with the theoretical receptive field as a frame and the effective as light."""
  import jax

  from flax_cifar import explain
  from flax_cifar.models import layer_table

  field = jax.jit(explain.compute_effective_receptive_field, static_argnums=0)(
    network.model, network.weights.variables, normalize(network, images[:EXPLAINED])
  )
  lit = overlay(images[0], np.sqrt(np.asarray(field)))  # the root shows the weak outskirts
  return frame(lit, layer_table.get_receptive_field(rows) or images.shape[1:3])


def normalize(network: "classifier_lib.Classifier", images: np.ndarray) -> Any:
  """The images as the network takes them, in float32."""
  from flax_cifar.data.augment import normalize as normalize_lib

  weights = network.weights
  return normalize_lib.create_normalize(weights.mean, weights.std, dtype="float32")(images)


def list_settings(config: Mapping[str, Any]) -> list[tuple[str, str, bool]]:
  """(key, value, whether it differs from the default) for each key of the config."""
  from flax_cifar.configs import common
  from flax_cifar.run import config as config_lib

  defaults = config_lib.flatten(common.get_config().to_dict())
  flat = config_lib.flatten(config)
  return [(key, str(value), value != defaults.get(key)) for key, value in flat.items()]


# ---- Several runs


def compare_runs(options: argparse.Namespace) -> str:
  """The page of all recipes in `options.folders`, one row and one color each.

  Raises:
    UserError: a folder has no finished run.
  """
  from flax_cifar.tools import compare

  groups = find_groups(options.folders)
  recipes = {name: compare.get_recipe(runs[0]) for name, runs in groups.items()}
  keys = {key for recipe in recipes.values() for key in recipe}
  missing = object()
  varied = sorted(
    key for key in keys if len({str(r.get(key, missing)) for r in recipes.values()}) > 1
  )
  return render(
    "comparison",
    title="Comparison of runs",
    header=list(compare.SCORES.values()),
    rows=[describe_group(name, runs) for name, runs in groups.items()],
    curves=embed_figure(compare.draw_curves(groups)),
    varied=[(key, [str(recipe.get(key, "")) for recipe in recipes.values()]) for key in varied],
    names=list(groups),
  )


def find_groups(folders: Sequence[pathlib.Path]) -> "dict[str, list[finished.Run]]":
  """The runs of each recipe in each folder, under a name for it; raises as `compare_runs` does."""
  from flax_cifar.tools import compare

  groups: dict[str, list[finished.Run]] = {}
  for folder in folders:
    for path, runs in compare.find_groups(folder).items():
      *_, parent, name = path.resolve().parts
      names = (name, f"{parent}/{name}", str(path))  # the first that no other group has
      groups[next(text for text in names if text not in groups or text == names[-1])] = runs
  return groups


def describe_group(name: str, runs: "Sequence[finished.Run]") -> dict[str, Any]:
  """A row of the comparison."""
  from flax_cifar.tools import compare

  row = compare.summarize(name, runs)
  return {
    "name": name,
    "parameters": row["parameters"],
    "scores": compare.format_scores(row),
    "seconds": row["train_seconds"],
    "protocol": row["protocol"],
    "hardware": runs[0].result["hardware"],
  }


# ---- Pictures


def overlay(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
  """The image uint8 (H, W, 3) in grey under the colors of `heat` (h, w), which is in [0, 1]."""
  import PIL.Image
  from matplotlib import colormaps

  height, width = image.shape[:2]
  scaled = PIL.Image.fromarray(np.float32(heat)).resize(
    (width, height), PIL.Image.Resampling.BICUBIC
  )
  light = np.clip(np.asarray(scaled), 0, 1)[..., None]
  colors = colormaps["inferno"](light[..., 0])[..., :3]
  grey = image.mean(-1, keepdims=True) / 255
  mixed = (1 - 0.6 * light) * grey + 0.6 * light * colors
  return np.round(255 * mixed).astype(np.uint8)


def frame(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
  """The image in the middle of a field of `size` pixels, whose border is drawn; both are seen."""
  height, width = (max(a, b) + 2 for a, b in zip(image.shape[:2], size, strict=True))
  canvas = np.full((height, width, 3), 255, np.uint8)
  top, left = (height - image.shape[0]) // 2, (width - image.shape[1]) // 2
  canvas[top : top + image.shape[0], left : left + image.shape[1]] = image
  top, left = (height - size[0]) // 2 - 1, (width - size[1]) // 2 - 1
  bottom, right = top + size[0] + 1, left + size[1] + 1
  canvas[[top, bottom], left : right + 1] = canvas[top : bottom + 1, [left, right]] = (200, 30, 30)
  return canvas


def embed_image(image: np.ndarray) -> str:
  """uint8 (H, W, 3) as the address of a PNG that holds it, enlarged."""
  import PIL.Image

  content = io.BytesIO()
  enlarged = image.repeat(ZOOM, 0).repeat(ZOOM, 1)
  PIL.Image.fromarray(enlarged).save(content, "PNG", optimize=True)
  return embed(content.getvalue(), "image/png")


def embed_file(path: pathlib.Path) -> str:
  """A PNG file as an address that holds it; "" where there is none."""
  return embed(path.read_bytes(), "image/png") if path.exists() else ""


def embed_figure(figure: "Figure") -> str:
  """A figure as the address of an SVG that holds it."""
  from flax_cifar.run import plots

  return embed(plots.format_svg(figure).encode(), "image/svg+xml")


def embed(content: bytes, kind: str) -> str:
  return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def render(page: str, **content: Any) -> str:
  """The HTML of the `page`, "run" or "comparison"; all text is escaped.

  Raises:
    UserError: jinja2 is not installed.
  """
  try:
    import jinja2
  except ImportError as error:
    raise errors.UserError("a report needs jinja2: pip install jinja2") from error
  text = importlib.resources.files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8")
  template = jinja2.Environment(
    autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
  ).from_string(text)
  return template.render(page=page, versions=environment.get_versions(), **content)


if __name__ == "__main__":
  environment.apply_settings()
  main()
