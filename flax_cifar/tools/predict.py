"""Says what pictures show: files of any size, or folders of them.

  python -m flax_cifar.tools.predict PICTURE_OR_FOLDER ... --model=tiny50k --picture=seen.png

The network is one of the package (--model) or of a run (--weights=runs/NAME/weights.safetensors).
It sees each picture shrunk or enlarged to the size of its training images, whatever its sides;
--picture shows what it saw. It knows no other classes than those of its training, so to a picture
of anything else it gives one of them too.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from flax_cifar import environment, errors, zoo
from flax_cifar.tools import command_line

SHOWN = 200  # pictures at most, because all of them are drawn in memory


@dataclasses.dataclass(frozen=True)
class Prediction:
  """What a network says of a picture: its likeliest classes, first the likeliest.

  Attributes:
    file: of the picture.
    classes: their names.
    probabilities: of these classes, in [0, 1].
  """

  file: str
  classes: list[str]
  probabilities: list[float]


def main() -> None:
  with command_line.one_line_errors():
    options = parse(sys.argv[1:])
    environment.check_devices()
    predictions = predict(options)
    if options.json:
      print(json.dumps([dataclasses.asdict(prediction) for prediction in predictions], indent=2))
    else:
      print(format_predictions(predictions))


def create_parser() -> command_line.Parser:
  """The flags."""
  parser = command_line.create_parser("predict", __doc__)
  parser.add_argument("pictures", nargs="+", metavar="PICTURE_OR_FOLDER")
  command_line.add_network(parser)
  parser.add_argument("--top", type=int, default=3, help="classes to name for each, default: 3")
  parser.add_argument("--picture", help="a PNG to write: each picture as the network sees it")
  parser.add_argument("--json", action="store_true", help="print JSON")
  return parser


def parse(arguments: Sequence[str]) -> argparse.Namespace:
  """The options of a command line.

  Raises:
    UserError: something is missing or unknown.
  """
  options = create_parser().parse_args(arguments)
  errors.require(options.top > 0, "--top", options.top, "1 or more")
  options.pictures = [errors.get_path("PICTURE", name) for name in options.pictures]
  if options.picture:
    options.picture = command_line.get_out("--picture", options.picture, ".png")
  options.weights = command_line.find_network(options)
  return options


def predict(options: argparse.Namespace) -> list[Prediction]:
  """Reads the pictures, classifies them, and draws --picture.

  Raises:
    UserError: weights or pictures are missing or damaged, or --picture cannot be written.
  """
  # Imported here: they bring JAX, for which a wrong flag need not wait.
  from flax_cifar.data.sources import folder
  from flax_cifar.run import classifier
  from flax_cifar.run import weights as weights_lib

  weights = weights_lib.load_weights(options.weights)
  paths = [path for name in options.pictures for path in folder.list_images(name)]
  if options.picture and options.picture.resolve() in {path.resolve() for path in paths}:
    raise errors.UserError(
      f"--picture={str(options.picture)!r} is one of the pictures to look at; choose another file."
    )
  images = folder.read_images(paths, weights.image_shape[0])
  network = classifier.create_classifier(weights, dtype=zoo.DTYPE)
  probabilities = network.predict(images)
  order = (-probabilities).argsort(-1)[:, : options.top]
  predictions = [
    Prediction(str(path), [network.class_names[i] for i in row], [float(shares[i]) for i in row])
    for path, row, shares in zip(paths, order, probabilities, strict=True)
  ]
  if options.picture:
    if len(images) > SHOWN:
      errors.warn(f"--picture shows the first {SHOWN} of {len(images):,} pictures")
    save_picture(options.picture, images[:SHOWN], predictions[:SHOWN])
  return predictions


def save_picture(path: pathlib.Path, images: Any, predictions: Sequence[Prediction]) -> None:
  """Writes the images with what they show; a UserError where that is not possible."""
  from flax_cifar.run import plots

  titles = [f"{one.classes[0]}\n{one.probabilities[0]:.0%}" for one in predictions]
  try:
    plots.save_images(path, images, titles)
  except OSError as error:
    raise errors.UserError(
      f"--picture={str(path)!r} cannot be written ({error.strerror}); choose another file."
    ) from error


def format_predictions(predictions: Sequence[Prediction]) -> str:
  """A line for each picture."""
  from flax_cifar.run import tables

  rows = [
    [
      one.file,
      *(f"{n} {p:.1%}" for n, p in zip(one.classes, one.probabilities, strict=True)),
    ]
    for one in predictions
  ]
  return "\n".join(tables.format_text(rows, [False] * len(rows[0])))


if __name__ == "__main__":
  environment.apply_settings()
  main()
