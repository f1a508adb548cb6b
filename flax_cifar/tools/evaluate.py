"""Evaluates saved weights, with nothing but their file and the data.

  python -m flax_cifar.tools.evaluate --weights=runs/NAME/weights.safetensors

The file names its data set, protocol and normalisation, so the images are those of the run. The
test split is to be read once, when all has been chosen: the run itself has done so, and this
program reads it only for --split=test, or where the run held no images out. With --data it scores
other data of the same classes: their test split, or all images where they have none.
"""

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from flax_cifar import environment, errors
from flax_cifar.data import dataset as dataset_lib
from flax_cifar.tools import command_line

if TYPE_CHECKING:
  from jax.sharding import Mesh

  from flax_cifar.run import weights as weights_lib

SPLITS = ("validation", "test", "all")


@dataclasses.dataclass(frozen=True)
class Options:
  """The options of the command line; None leaves the choice to the weights' config."""

  weights: pathlib.Path
  data: str | None = None
  data_dir: str | None = None
  split: str | None = None


@dataclasses.dataclass(frozen=True)
class Score:
  """Accuracy in [0, 1] and mean loss in nats of `count` images of `split`."""

  split: str
  data: str
  count: int
  accuracy: float
  loss: float
  peeked: bool  # the validation images were those of the test split, see `PROTOCOLS`


def main() -> None:
  with command_line.one_line_errors():
    options = parse(sys.argv[1:])
    environment.check_devices()
    score = evaluate_weights(options)
  print(f"data      {score.data}: {score.count:,} {score.split} images")
  peeked = " (on the test split)" if score.peeked else ""
  print(f"{score.split} accuracy {score.accuracy:.2%}{peeked}, loss {score.loss:.4f}")


def parse(arguments: Sequence[str]) -> Options:
  """The options of a command line.

  Raises:
    UserError: something is missing or unknown.
  """
  parser = command_line.Parser(
    "evaluate",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    allow_abbrev=False,
  )
  parser.add_argument("--weights", required=True, help="weights.safetensors")
  parser.add_argument("--data", help="cifar10, shapes, npz:PATH or folder:PATH; default: the run's")
  parser.add_argument("--data_dir", help="where CIFAR-10 is; default: the run's")
  parser.add_argument(
    "--split",
    choices=SPLITS,
    help="default: validation, where the run held images out, or test; with --data: test or all",
  )
  options = vars(parser.parse_args(arguments))
  weights = errors.get_path("--weights", options.pop("weights"))
  return Options(weights, **options)


def evaluate_weights(options: Options) -> Score:
  """Rebuilds the network, loads its data and evaluates every image of the split once.

  Raises:
    UserError: weights or data are missing, damaged or do not belong together.
  """
  # Imported here: they bring JAX, for which a wrong flag need not wait.
  import jax

  from flax_cifar import evaluate
  from flax_cifar.data.augment import normalize
  from flax_cifar.parallel import mesh as mesh_lib
  from flax_cifar.run import weights as weights_lib

  weights = weights_lib.load_weights(options.weights)
  model, config = weights_lib.create_network(weights), weights.config
  load = _load_other_split if options.data else _load_own_split
  name, split = load(weights, options)
  mesh = _create_mesh(config)
  eval_step = evaluate.create_eval_step(
    model=model,
    normalize=normalize.create_normalize(weights.mean, weights.std, dtype=config["compute_dtype"]),
    mesh=mesh,
    num_seeds=1,  # a file holds one network
  )
  variables = jax.device_put(weights.variables, mesh_lib.replicated(mesh))
  scores = evaluate.evaluate(eval_step, variables, split, config["eval_batch_size"])
  return Score(
    split=name,
    data=options.data or config["data"]["name"],
    count=len(split),
    accuracy=float(scores["accuracy"]),
    loss=float(scores["loss"]),
    peeked=config["protocol"] == "published" and name == "validation",
  )


def _load_own_split(
  weights: "weights_lib.Weights", options: Options
) -> tuple[str, dataset_lib.Split]:
  """The split of the run's data that is asked for, and its name."""
  from flax_cifar.data import splits as splits_lib

  data = dict(weights.config["data"])
  data["dir"] = options.data_dir or data["dir"]
  splits = splits_lib.load_splits(protocol=weights.config["protocol"], **data)
  name = options.split or ("validation" if len(splits.validation) else "test")
  if name == "all":
    raise errors.UserError("--split='all' needs --data: the run has trained on images of its own.")
  split = {"validation": splits.validation, "test": splits.test}[name]
  if not len(split):
    raise errors.UserError(
      "--split='validation' is empty: the run held no images out; try --split=test."
    )
  _check_classes(weights, splits.class_names, data["name"])
  keys = (f"{name}_images", f"{name}_sha256")
  changes = errors.list_differences(
    {key: weights.data[key] for key in keys if key in weights.data},
    {key: splits.fingerprint[key] for key in keys if key in weights.data},
  )
  if changes:
    raise errors.UserError(
      f"the {name} images of {data['name']} are not those of the run: {'; '.join(changes)}. "
      f"Restore them, or evaluate other data with --data={data['name']}."
    )
  return name, split


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
  split_name = options.split or ("all" if found.test_is_held_out else "test")
  if split_name == "all":
    return split_name, _join(found)
  split = {"validation": found.validation, "test": found.test}[split_name]
  if split is None or found.test_is_held_out:
    raise errors.UserError(f"{name} has no {split_name} split of its own; try --split=all.")
  return split_name, split


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


def _create_mesh(config: Mapping[str, Any]) -> "Mesh":
  """The run's number of devices if this machine has as many, for equal results; otherwise one."""
  import jax

  from flax_cifar.parallel import mesh as mesh_lib

  available = jax.local_device_count()
  wanted = config["num_devices"] or available
  fits = wanted <= available and config["eval_batch_size"] % wanted == 0
  return mesh_lib.create_mesh(wanted if fits else 1)


if __name__ == "__main__":
  environment.apply_settings()
  main()
