"""Evaluates saved weights, with nothing but their file and the data.

  python -m flax_cifar.tools.evaluate --weights=runs/NAME/weights.safetensors
  python -m flax_cifar.tools.evaluate --model=NAME --split=test

The file names its data set, protocol and normalization, so the images are those of the run. The
test split is to be read once, when all has been chosen: the run itself has done so, and this
program reads it only for --split=test, or where the run held no images out. With --data it scores
other data of the same classes: their test split, or all images where they have none. The
corruptions are those of flax_cifar/data/corruptions.py.
"""

import dataclasses
import json
import pathlib
import statistics
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from flax_cifar import environment, errors, zoo
from flax_cifar.data import dataset as dataset_lib
from flax_cifar.tools import command_line

if TYPE_CHECKING:
  from flax_cifar.run import classifier as classifier_lib
  from flax_cifar.run import weights as weights_lib

SPLITS = ("validation", "test", "all")


@dataclasses.dataclass(frozen=True)
class Options:
  """The options of the command line; None leaves the choice to the weights' config."""

  weights: pathlib.Path
  data: str | None = None
  data_dir: str | None = None
  split: str | None = None
  dtype: str | None = None
  flip: bool = False
  corruptions: bool = False
  json: bool = False


@dataclasses.dataclass(frozen=True)
class Score:
  """How well a network classifies `count` images of `split`.

  Attributes:
    split: its name.
    data: the name of the data set.
    count: the number of images.
    accuracy: in [0, 1].
    loss: the mean cross-entropy, or negative log-likelihood, in nats.
    calibration_error: in [0, 1], see `metrics.CalibrationBins`.
    peeked: whether the validation images were those of the test split, see `PROTOCOLS`.
    flipped_accuracy: with test-time augmentation: of the mean logits of each image and its mirror
      image; None unless it was asked for.
    corrupted: the accuracy at each severity of each corruption, where these were asked for.
  """

  split: str
  data: str
  count: int
  accuracy: float
  loss: float
  calibration_error: float
  peeked: bool
  flipped_accuracy: float | None
  corrupted: dict[str, list[float]]

  @property
  def corrupted_accuracy(self) -> float:
    """The mean over all corruptions and severities."""
    return statistics.fmean(a for accuracies in self.corrupted.values() for a in accuracies)


def main() -> None:
  with command_line.one_line_errors():
    options = parse(sys.argv[1:])
    environment.check_devices()
    score = evaluate_weights(options)
    print(json.dumps(dataclasses.asdict(score), indent=2) if options.json else format_score(score))


def create_parser() -> command_line.Parser:
  """The flags."""
  parser = command_line.create_parser("evaluate", __doc__)
  command_line.add_network(parser)
  parser.add_argument("--data", help="as the key data.name; default: the run's")
  command_line.add_data_dir(parser)
  parser.add_argument(
    "--split",
    choices=SPLITS,
    help="default: validation, where the run held images out, or test; with --data: test or all",
  )
  parser.add_argument(
    "--dtype", choices=["float32", "bfloat16"], help="default: the run's; with --model float32"
  )
  parser.add_argument(
    "--flip", action="store_true", help="score with test-time augmentation by mirror images too"
  )
  parser.add_argument(
    "--corruptions", action="store_true", help="score corrupted images too, 30 times as many"
  )
  parser.add_argument("--json", action="store_true", help="print JSON")
  return parser


def parse(arguments: Sequence[str]) -> Options:
  """The options of a command line.

  Raises:
    UserError: something is missing or unknown.
  """
  options = create_parser().parse_args(arguments)
  for flag in ("data", "data_dir"):
    errors.require(vars(options)[flag] != "", f"--{flag}", "", "a name, or leave the flag out")
  options.weights = command_line.find_network(options)
  if options.model and not options.dtype:
    options.dtype = zoo.DTYPE
  return Options(**{name: value for name, value in vars(options).items() if name != "model"})


def format_score(score: Score) -> str:
  """Lines for the screen."""
  from flax_cifar.run import tables

  peeked = tables.PEEKED if score.peeked else ""
  part = "" if score.split == "all" else f"{score.split} "
  lines = [
    f"data      {score.data}: {score.count:,} {part}images",
    f"{part}accuracy {score.accuracy:.2%}{peeked}, loss {score.loss:.4f}, "
    f"calibration error {score.calibration_error:.2%}",
  ]
  if score.flipped_accuracy is not None:
    lines.append(f"with mirror images {score.flipped_accuracy:.2%} (test-time augmentation)")
  if score.corrupted:
    rows = [["accuracy (%), severity", *"12345", "mean"]]
    for name, values in score.corrupted.items():
      rows.append([name, *(f"{100 * value:.2f}" for value in (*values, statistics.fmean(values)))])
    lines += tables.format_text(rows, [False] + [True] * 6)
    lines.append(f"corrupted accuracy {score.corrupted_accuracy:.2%}")
  return "\n".join(lines)


def evaluate_weights(options: Options) -> Score:
  """Rebuilds the network, loads its data and evaluates every image of the split once.

  Raises:
    UserError: weights or data are missing, damaged or do not belong together.
  """
  # Imported here: they bring JAX, for which a wrong flag need not wait.
  from flax_cifar import metrics
  from flax_cifar.run import classifier as classifier_lib
  from flax_cifar.run import weights as weights_lib

  weights = weights_lib.load_weights(options.weights)
  if options.data:
    name, split = _load_other_split(weights, options)
  else:
    name, split = load_own_split(weights, split=options.split, data_dir=options.data_dir)
  dtype = options.dtype or weights.config["compute_dtype"]
  classifier = classifier_lib.create_classifier(weights, dtype=dtype)
  logits, scores = classifier.score(split)
  return Score(
    split=name,
    data=options.data or weights.config["data"]["name"],
    count=len(split),
    accuracy=float(scores["accuracy"]),
    loss=float(scores["loss"]),
    calibration_error=metrics.compute_calibration(logits, split.labels).error,
    peeked=weights.config["protocol"] == "published" and name == "validation" and not options.data,
    flipped_accuracy=_score_flipped(classifier, split, logits) if options.flip else None,
    corrupted=_score_corruptions(classifier, split) if options.corruptions else {},
  )


def _score_flipped(
  classifier: "classifier_lib.Classifier", split: dataset_lib.Split, logits: np.ndarray
) -> float:
  mirrored, _ = classifier.score(dataclasses.replace(split, images=split.images[:, :, ::-1]))
  return float(((logits + mirrored).argmax(-1) == split.labels).mean())


def _score_corruptions(
  classifier: "classifier_lib.Classifier", split: dataset_lib.Split
) -> dict[str, list[float]]:
  """{name of a corruption: accuracy in [0, 1] at each severity}"""
  from flax_cifar.data import corruptions

  accuracies: dict[str, list[float]] = {}
  for name in corruptions.CORRUPTIONS:
    for severity in corruptions.SEVERITIES:
      images = corruptions.corrupt(split.images, name, severity)
      _, scores = classifier.score(dataclasses.replace(split, images=images))
      accuracies.setdefault(name, []).append(float(scores["accuracy"]))
  return accuracies


def load_own_split(
  weights: "weights_lib.Weights", *, split: str | None, data_dir: str | None
) -> tuple[str, dataset_lib.Split]:
  """A split of the data of the weights' run, and its name.

  Args:
    weights: of the run.
    split: its name; None is validation where the run held images out, and test otherwise.
    data_dir: where CIFAR-10 and other data of TFDS are; None is where the run found them.

  Raises:
    UserError: it is empty, the data are missing or damaged, or they are not those of the run.
  """
  from flax_cifar.data import splits as splits_lib

  data = dict(weights.config["data"])
  data["dir"] = data_dir or data["dir"]
  splits = splits_lib.load_splits(protocol=weights.config["protocol"], **data)
  name = split or ("validation" if len(splits.validation) else "test")
  if name == "all":
    raise errors.UserError("--split='all' needs --data: the run has trained on images of its own.")
  found = {"validation": splits.validation, "test": splits.test}[name]
  if not len(found):
    raise errors.UserError(
      "--split='validation' is empty: the run held no images out; try --split=test."
    )
  _check_classes(weights, splits.class_names, data["name"])
  here = {f"{name}_images": len(found), f"{name}_sha256": splits_lib.compute_digest(found)}
  changes = errors.list_differences(
    {key: weights.data[key] for key in here if key in weights.data},
    {key: value for key, value in here.items() if key in weights.data},
  )
  if changes:
    raise errors.UserError(
      f"the {name} images of {data['name']} are not those of the run: {'; '.join(changes)}. "
      "Restore them; or put images that the network has not seen into another place, and name "
      "that with --data of flax_cifar.tools.evaluate."
    )
  return name, found


def _load_other_split(
  weights: "weights_lib.Weights", options: Options
) -> tuple[str, dataset_lib.Split]:
  """The split of other data that is asked for, and its name."""
  from flax_cifar.data import load

  name, data = options.data or "", weights.config["data"]
  found = load.load_dataset(
    name=name, dir=options.data_dir or data["dir"], image_size=weights.image_shape[0]
  )
  _check_classes(weights, found.class_names, name)
  split_name, split = _choose_split(found, options)
  if seen := _describe_seen(weights, name, found, split_name, split):
    errors.warn(
      f"{seen} of these {len(split):,} images trained the network; the scores are not those of "
      "unseen images"
    )
  return split_name, split


def _choose_split(found: dataset_lib.Dataset, options: Options) -> tuple[str, dataset_lib.Split]:
  split_name = options.split or ("all" if found.test_is_held_out else "test")
  if split_name == "all":
    return split_name, _join(found)
  split = {"validation": found.validation, "test": found.test}[split_name]
  if split is None or found.test_is_held_out:
    raise errors.UserError(f"{options.data} has no {split_name} split of its own; try --split=all.")
  return split_name, split


def _describe_seen(
  weights: "weights_lib.Weights",
  name: str,
  found: dataset_lib.Dataset,
  split_name: str,
  split: dataset_lib.Split,
) -> str:
  """How many images of `split` trained the network, as far as that is known; "" for none.

  The weights hold a digest of their training images, which finds them under any name, if the same
  ones are there as in the run. Under the run's own name some may be there among others.

  Args:
    weights: of the network.
    name: of the data.
    found: the data.
    split_name: of the split that is scored.
    split: the images that are scored.
  """
  from flax_cifar.data import splits as splits_lib

  data, candidates = weights.config["data"], [split]
  if split_name == "all":
    candidates.append(found.train)
    if 0 < data["validation_size"] < len(found.train):
      size = data["validation_size"]
      candidates.append(splits_lib.split_validation(found.train, validation_size=size)[0])
  for images in candidates:
    if splits_lib.compute_digest(images) == weights.data.get("train_sha256"):
      return f"{len(images):,}"
  if split_name == "all" and _find_place(name) == _find_place(data["name"]):
    return f"up to {min(len(split), weights.data.get('train_images', len(split))):,}"
  return ""


def _find_place(name: str) -> tuple[str, pathlib.Path]:
  """The kind of the data set `name` and its path, which can be written in several ways."""
  kind, _, path = name.partition(":")
  return kind, errors.get_path("data.name", path or ".").resolve()


def _join(data: dataset_lib.Dataset) -> dataset_lib.Split:
  """All images of `data` as one split."""
  splits = [split for split in (data.train, data.validation, data.test) if split is not None]
  return dataset_lib.Split(
    np.concatenate([split.images for split in splits]),
    np.concatenate([split.labels for split in splits]),
  )


def _check_classes(weights: "weights_lib.Weights", class_names: Sequence[str], name: str) -> None:
  differences = errors.list_differences(
    {"class_names": weights.class_names}, {"class_names": class_names}
  )
  if differences:
    raise errors.UserError(f"the weights are of other classes than {name}: {differences[0]}.")


if __name__ == "__main__":
  environment.apply_settings()
  main()
