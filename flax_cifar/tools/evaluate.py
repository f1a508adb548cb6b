"""Evaluates saved weights, with nothing but their file and the data.

  python -m flax_cifar.tools.evaluate --weights=runs/NAME/weights.safetensors

The file names its data set, protocol and normalisation, so the images are those of the run. The
test split is to be read once, when all has been chosen: the run itself has done so, and this
program reads it only for --split=test, or where the run held no images out.
"""

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flax_cifar import environment, errors
from flax_cifar.tools import command_line

if TYPE_CHECKING:
  from jax.sharding import Mesh

  from flax_cifar.data import splits as splits_lib
  from flax_cifar.run import weights as weights_lib

SPLITS = ("validation", "test")


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
  try:
    score = evaluate_weights(parse(sys.argv[1:]))
  except errors.UserError as error:
    command_line.leave(f"error: {error}", 2)
  except KeyboardInterrupt:
    command_line.leave("stopped", 130)
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
  parser.add_argument("--weights", type=pathlib.Path, required=True, help="weights.safetensors")
  parser.add_argument("--data", help="cifar10, shapes, npz:PATH or folder:PATH; default: the run's")
  parser.add_argument("--data_dir", help="where CIFAR-10 is; default: the run's")
  parser.add_argument(
    "--split",
    choices=SPLITS,
    help="default: validation, where the run held images out; the test split is to be read once",
  )
  return Options(**vars(parser.parse_args(arguments)))


def evaluate_weights(options: Options) -> Score:
  """Rebuilds the network, loads its data and evaluates every image of the split once.

  Raises:
    UserError: weights or data are missing, damaged or do not belong together.
  """
  # Imported here: they bring JAX, for which a wrong flag need not wait.
  import jax

  from flax_cifar import evaluate, parallel
  from flax_cifar.data.augment import normalize
  from flax_cifar.run import weights as weights_lib

  weights = weights_lib.load_weights(options.weights)
  model, config = weights_lib.create_network(weights), weights.config
  splits = _load_splits(weights, options)
  name = options.split or ("validation" if len(splits.validation) else "test")
  split = {"validation": splits.validation, "test": splits.test}[name]
  if not len(split):
    raise errors.UserError(
      "--split='validation' is empty: the run held no images out; try --split=test."
    )
  mesh = _create_mesh(config)
  eval_step = evaluate.create_eval_step(
    model=model,
    normalize=normalize.create_normalize(weights.mean, weights.std, dtype=config["compute_dtype"]),
    mesh=mesh,
    num_seeds=1,  # a file holds one network
  )
  variables = jax.device_put(weights.variables, parallel.replicated(mesh))
  scores = evaluate.evaluate(eval_step, variables, split, config["eval_batch_size"])
  return Score(
    split=name,
    data=options.data or config["data"]["name"],
    count=len(split),
    accuracy=float(scores["accuracy"]),
    loss=float(scores["loss"]),
    peeked=config["protocol"] == "published" and name == "validation",
  )


def _load_splits(weights: "weights_lib.Weights", options: Options) -> "splits_lib.Splits":
  """The splits of the run, or of the data set asked for, which must have the same classes."""
  from flax_cifar.data import splits as splits_lib

  data = dict(weights.config["data"])
  data |= {"name": options.data or data["name"], "dir": options.data_dir or data["dir"]}
  protocol = weights.config["protocol"]
  if options.split == "test":
    # The run's validation size may exceed a small data set.
    protocol, data["validation_size"] = "honest", 0
  splits = splits_lib.load_splits(protocol=protocol, **data)
  differences = errors.list_differences(
    {"class_names": weights.class_names, "image_shape": weights.image_shape},
    {"class_names": splits.class_names, "image_shape": splits.image_shape},
  )
  if differences:
    raise errors.UserError(
      f"the weights are of other data than {data['name']}: {'; '.join(differences)}."
    )
  return splits


def _create_mesh(config: Mapping[str, Any]) -> "Mesh":
  """The run's number of devices if this machine has as many, for equal results; otherwise one."""
  import jax

  from flax_cifar import parallel

  available = jax.local_device_count()
  wanted = config["num_devices"] or available
  fits = wanted <= available and config["eval_batch_size"] % wanted == 0
  return parallel.create_mesh(wanted if fits else 1)


if __name__ == "__main__":
  environment.apply_settings()
  main()
