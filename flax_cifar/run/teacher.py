"""A trained network as the teacher of another one: distillation.

Source: Hinton, Vinyals and Dean 2015, arXiv:1503.02531.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from flax_cifar import errors, files, metrics, zoo
from flax_cifar.data import dataset, splits
from flax_cifar.run import weights as weights_lib

KEY = "loss.distillation.teacher"

# (losses (N,), logits (N, classes), images as the student gets them) -> losses (N,)
Distillation = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def get_fingerprint(config: ConfigDict) -> dict[str, str]:
  """The digest of the teacher's file, which a resumed run needs unchanged; {} without a teacher.

  Raises:
    UserError: there is no such file or network.
  """
  if not config.loss.distillation.teacher:
    return {}
  path = find_teacher(config.loss.distillation.teacher)
  try:
    digest = files.digest(path)
  except OSError as error:
    raise errors.UserError(
      f"{KEY}={str(path)!r} cannot be read ({error.strerror}); name the weights of a run."
    ) from error
  return {"teacher_sha256": digest[: splits.DIGEST_DIGITS]}


def find_teacher(name: str) -> pathlib.Path:
  """The weights file that `name` is, or that of a run's folder, or of a network of the package."""
  path = errors.get_path(KEY, name)
  path = path / zoo.WEIGHTS if path.is_dir() else path
  return path if path.is_file() else zoo.find_weights(name, KEY)


def create_distillation(
  config: ConfigDict,
  train: dataset.Split,
  *,
  class_names: tuple[str, ...],
  mean: Sequence[float],
  std: Sequence[float],
) -> Distillation | None:
  """The teacher that `config` names, ready for the steps of its student; None without one.

  The teacher is evaluated on the images of the step, augmented and mixed as its student gets them.

  Args:
    config: of the student's run.
    train: its training images; a warning tells where the teacher may have seen the validation
      images.
    class_names: of the student; a warning tells where the teacher's have other names.
    mean: that the student's normalization subtracts, per channel in [0, 1].
    std: that it divides by.

  Raises:
    UserError: the teacher is missing or damaged, or has another number of classes or images of
      another size; or a number is out of range.
  """
  options = config.loss.distillation
  weight, temperature = options.weight, options.temperature
  _check_numbers(weight, temperature)
  if not options.teacher:
    return None
  weights = weights_lib.load_weights(find_teacher(options.teacher))
  _check_fits(weights, class_names, config.data.image_size)
  _warn_of_leak(weights, config, train)
  predict = _create_predict(weights, mean=mean, std=std, dtype=config.compute_dtype)

  def add_teacher(losses: jax.Array, logits: jax.Array, images: jax.Array) -> jax.Array:
    return metrics.distill(losses, logits, predict(images), weight=weight, temperature=temperature)

  return add_teacher


def check_options(config: ConfigDict) -> None:
  """Raises a UserError for a weight or temperature out of range, or a teacher that is not there."""
  options = config.loss.distillation
  if options.teacher:
    find_teacher(options.teacher)
  _check_numbers(options.weight, options.temperature)


def _check_numbers(weight: float, temperature: float) -> None:
  errors.require(0 < weight <= 1, "loss.distillation.weight", weight, "above 0 and at most 1")
  # Above, the differences of the classes would vanish in float32.
  fits = 1e-2 <= temperature <= 100
  errors.require(fits, "loss.distillation.temperature", temperature, "from 0.01 to 100")


def _check_fits(
  weights: weights_lib.Weights, class_names: tuple[str, ...], image_size: int
) -> None:
  height, width, _ = weights.image_shape
  theirs = weights.class_names
  errors.require(
    (len(theirs), height, width) == (len(class_names), image_size, image_size),
    KEY,
    f"a network of {len(theirs)} classes and {height}x{width} pixels",
    f"one of {len(class_names)} classes and {image_size}x{image_size} pixels",
  )
  if theirs != class_names:
    errors.warn(
      f"{KEY}: its classes are called {errors.list_some(theirs)}, and those of this run "
      f"{errors.list_some(class_names)}; both must have the same order"
    )


def _warn_of_leak(teacher: weights_lib.Weights, student: ConfigDict, train: dataset.Split) -> None:
  """Warns if the teacher was trained on images on which its student is validated."""
  if student.protocol == "published":  # it validates on the test split
    return
  theirs, own = teacher.config["data"], student.data
  held_out = 0 if teacher.config["protocol"] == "published" else theirs["validation_size"]
  if theirs["name"] != own.name or held_out >= own.validation_size:
    return
  # The same images trained both where the data set has validation images of its own.
  if teacher.data.get("train_sha256") != splits.compute_digest(train):
    errors.warn(
      f"{KEY}={student.loss.distillation.teacher!r} was trained on images of this run's validation "
      "split, so its validation accuracy is too high; choose nothing by it"
    )


def _create_predict(
  weights: weights_lib.Weights, *, mean: Sequence[float], std: Sequence[float], dtype: str
) -> Callable[[jax.Array], jax.Array]:
  """The network of `weights`, computed in `dtype`, for images normalized by `mean` and `std`."""
  weights = dataclasses.replace(weights, config={**weights.config, "compute_dtype": dtype})
  model = weights_lib.create_network(weights)
  pairs = list(zip(mean, std, weights.mean, weights.std, strict=True))
  # NumPy's numbers become part of the program; arrays on a device would be copied at each step.
  scale = np.array([own / its for _, own, _, its in pairs])
  shift = np.array([(own - its) / deviation for own, _, its, deviation in pairs])

  def predict(images: jax.Array) -> jax.Array:
    moved = images * scale.astype(images.dtype) + shift.astype(images.dtype)
    variables = jax.tree.map(jnp.asarray, weights.variables)
    logits: Any = model.apply(variables, moved, train=False)
    return jax.lax.stop_gradient(logits)

  return predict
