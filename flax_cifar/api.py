"""The functions for notebooks and scripts; `import flax_cifar` has them all.

    run = flax_cifar.train_network("s9:smoke", seed=1, optimizer__learning_rate=0.02)
    run.accuracy  # of the test images, in [0, 1]; in a notebook, `run` shows a summary
    run.load().predict(images)  # uint8 (N, H, W, 3) -> probabilities (N, classes)
    run.write_report()  # report.html in the folder of the run

JAX is imported by the first call that needs it.
"""

import dataclasses
import html
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flax_cifar import environment, errors, zoo

if TYPE_CHECKING:
  import flax.linen as nn
  from matplotlib.figure import Figure
  from ml_collections import ConfigDict

  from flax_cifar.data import dataset
  from flax_cifar.run import classifier

SEPARATOR = "__"  # stands for the dot of a config key, which a keyword argument cannot have


@dataclasses.dataclass(frozen=True)
class Run:
  """A finished run.

  Attributes:
    workdir: its folder.
    result: the content of result.json.
    records: of the epochs, as in metrics.jsonl.
  """

  workdir: pathlib.Path
  result: Mapping[str, Any] = dataclasses.field(repr=False)
  records: Sequence[Mapping[str, Any]] = dataclasses.field(repr=False)

  @property
  def accuracy(self) -> float:
    """In [0, 1], of the images on which the run was scored at its end; of several seeds the mean.

    These are the test images, or those of validation for the protocol `trial`.
    """
    from flax_cifar.run import result

    return float(self.result[f"{result.get_final_split_name(self.result)}_accuracy"])

  def load(self) -> "classifier.Classifier":
    """Loads the network, of several seeds the first; see `Classifier.predict`.

    Raises:
      UserError: its weights are missing or damaged, or those of another run.
    """
    from flax_cifar.run import classifier, finished

    environment.check_settings_of_jax()
    weights = finished.load_weights(self.workdir, self.result)
    return classifier.create_classifier(weights, dtype=weights.config["compute_dtype"])

  def plot_curves(self) -> "Figure":
    """Draws loss and accuracy by epoch."""
    from flax_cifar.run import plots

    return plots.draw_curves(self.records)

  def write_report(self, path: str | os.PathLike[str] = "") -> pathlib.Path:
    """Writes the report, by default into the run's folder, and returns its path."""
    from flax_cifar.tools import report

    out = pathlib.Path(path) if path else self.workdir / report.TEMPLATE
    options = report.parse([str(self.workdir), f"--out={out}"])
    report.write(options.out, report.create_page(options))
    return pathlib.Path(options.out)

  def _repr_html_(self) -> str:
    """The summary that a notebook shows."""
    from flax_cifar.run import plots, result
    from flax_cifar.tools import report

    facts = {
      f"{result.get_final_split_name(self.result)} accuracy": result.format_score(
        self.result, "accuracy", ".2%"
      ),
      "parameters": f"{self.result['parameters']:,}",
      "epochs": str(self.result["epochs"]),
      "training": f"{self.result['train_seconds']:,.0f} s",
      "folder": str(self.workdir),
    }
    rows = "".join(f"<tr><th>{k}</th><td>{html.escape(v)}</td></tr>" for k, v in facts.items())
    with plots.default_style():
      curves = report.embed_figure(self.plot_curves())
    name = html.escape(self.result["config"]["name"])
    return (
      f"<h3>{name}</h3><table>{rows}</table>"
      f'<img src="{curves}" alt="Loss and accuracy by epoch" style="background: #fff">'
    )


def create_config(config: str | os.PathLike[str] = "quickstart", **changes: Any) -> "ConfigDict":
  """Creates the config of `configs/NAME.py`, or of a file, with `changes`.

  Args:
    config: NAME or FILE, with variants after a colon, as for --config.
    **changes: config keys; two underscores stand for a dot: `optimizer__learning_rate=0.1`. Or a
      short key, as in a variant: `norm`, `seed`, `epochs`, `lr`.

  Raises:
    UserError: no such config, variant or key, a value of another type, or a key that is set twice.
  """
  from flax_cifar.configs import variants
  from flax_cifar.tools import command_line

  found = command_line.load_config(os.fspath(config), "config")
  keys = {}
  for keyword, value in changes.items():
    is_short = keyword in variants.SHORT_KEYS and not isinstance(value, Mapping)
    key = variants.SHORT_KEYS[keyword] if is_short else keyword.replace(SEPARATOR, ".")
    command_line.get_value(found, key)  # its errors
    value = value.item() if getattr(value, "ndim", None) == 0 else value  # a number of NumPy
    if key in keys:
      raise errors.UserError(
        f"{key} is set twice, the second time by {keyword}={value!r}; set one."
      )
    keys[key] = value
  try:
    found.update_from_flattened_dict(keys)
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise errors.UserError(f"config {config!r} with {keys}: {errors.shorten(error)}") from error
  return found


def train_network(
  config: str = "quickstart", *, workdir: str | os.PathLike[str] = "", **changes: Any
) -> Run:
  """Trains like main.py, and returns the finished run; the same call again returns it at once.

  It sets the variables of XLA and JAX that main.py sets, for this process. A script that sets
  `augment__workers` needs `if __name__ == "__main__":` around the call, because each worker imports
  the script.

  Args:
    config: see `create_config`.
    workdir: the folder of the run; "" is runs/NAME-HASH.
    **changes: see `create_config`.

  Raises:
    UserError: a wrong config, missing data, or a folder that holds another run.
    Interrupted: the run was stopped, and has saved its state; the same call goes on. A second
      interruption is a KeyboardInterrupt, after which it goes on from the last checkpoint.
  """
  environment.apply_settings(restart=False)  # a notebook's process cannot start again
  environment.check_settings_of_jax()
  settings = create_config(config, **changes)
  from flax_cifar import train as train_lib
  from flax_cifar.run import workdir as workdir_lib

  folder = workdir_lib.choose(settings, workdir, "workdir")
  train_lib.train_and_evaluate(settings, folder)
  return load_run(folder)


def load_run(workdir: str | os.PathLike[str]) -> Run:
  """Loads a finished run; a UserError if there is none in `workdir`."""
  from flax_cifar.run import finished

  folder = errors.get_path("workdir", workdir)
  found = finished.read_run(folder)
  return Run(folder, found.result, found.records)


def load_data(
  name: str = "cifar10", *, dir: str | os.PathLike[str] = "", image_size: int = 32
) -> "dataset.Dataset":
  """Loads a data set: `train` and `test` with `images` and `labels`, and `class_names`.

  >>> data = load_data("shapes")
  >>> data.train.images.shape, data.train.images.dtype, data.train.labels.shape
  ((10000, 32, 32, 3), dtype('uint8'), (10000,))

  Args:
    name: cifar10, shapes, tfds:NAME, npz:PATH or folder:PATH.
    dir: where CIFAR-10 and tfds:NAME are, or are downloaded to; "" is TFDS_DATA_DIR or
      ~/tensorflow_datasets.
    image_size: height and width in pixels, of shapes and folders.

  Raises:
    UserError: there is no such data set, or it is damaged.
  """
  from flax_cifar.data import load

  return load.load_dataset(name=name, dir=str(dir), image_size=image_size)


def create_model(config: str = "s9", *, num_classes: int = 10, **changes: Any) -> "nn.Module":
  """Creates the untrained network of a config, a Linen module.

  >>> import jax
  >>> model = create_model("pyramid", num_classes=3, model__norm="layer")
  >>> images = jax.ShapeDtypeStruct((5, 32, 32, 3), "float32")
  >>> init = lambda images: model.init_with_output(jax.random.key(0), images, train=False)
  >>> logits, variables = jax.eval_shape(init, images)
  >>> logits.shape
  (5, 3)

  Args:
    config: see `create_config`.
    num_classes: the number of logits.
    **changes: see `create_config`.
  """
  errors.require(num_classes > 0, "num_classes", num_classes, "1 or more")
  settings = create_config(config, **changes)
  from flax_cifar.run import config as config_lib

  return config_lib.create_model(settings, num_classes=num_classes)


def load_pretrained(name: str) -> "classifier.Classifier":
  """Loads the trained network `name`, one of `list_models` or `hf:USER/NAME`.

  Raises:
    UserError: there is none of this name; the message lists them.
  """
  from flax_cifar.run import classifier
  from flax_cifar.run import weights as weights_lib

  environment.check_settings_of_jax()
  weights = weights_lib.load_weights(zoo.find_weights(name))
  return classifier.create_classifier(weights, dtype=zoo.DTYPE)
