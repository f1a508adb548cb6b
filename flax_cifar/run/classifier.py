"""A trained network with all it takes to classify images."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import Float, UInt8

from flax_cifar import errors, evaluate
from flax_cifar.data import dataset
from flax_cifar.data.augment import normalize
from flax_cifar.parallel import mesh as mesh_lib
from flax_cifar.run import config as config_lib
from flax_cifar.run import weights as weights_lib


@dataclasses.dataclass(frozen=True, repr=False)
class Classifier:
  """A trained network, compiled, with its variables on the devices.

  Attributes:
    weights: the file's content: the config of its run, class names, shape of the images.
    model: the network; `model.apply(weights.variables, images, train=False)` takes normalized
      images.
    mesh: the devices.
    variables: `weights.variables` on the devices.
    eval_step: see `evaluate.create_eval_step`; it normalizes.
  """

  weights: weights_lib.Weights
  model: nn.Module
  mesh: jax.sharding.Mesh
  variables: Any
  eval_step: evaluate.EvalStep

  def __repr__(self) -> str:
    config, (height, width, _) = self.weights.config, self.weights.image_shape
    network = f"{config['model']['name']}, {height}x{width} pixels, {len(self.class_names)} classes"
    return f"Classifier({config['name']!r}: {network})"

  @property
  def class_names(self) -> tuple[str, ...]:
    return self.weights.class_names

  def predict(self, images: UInt8[np.ndarray, "n h w 3"]) -> Float[np.ndarray, "n classes"]:
    """The probability of each class, float32 (N, classes).

    Args:
      images: uint8 (N, H, W, 3), RGB, of the size of `weights.image_shape`.

    Raises:
      UserError: the images have another type or shape.
    """
    shape, images = self.weights.image_shape, np.asarray(images)
    if images.dtype != np.uint8 or images.shape[1:] != shape:
      raise errors.UserError(
        f"images are {images.dtype} {images.shape}; this network takes uint8 (N, "
        f"{', '.join(map(str, shape))}): RGB in 0..255, channels last."
      )
    if not len(images):
      return np.zeros((0, len(self.class_names)), np.float32)
    split = dataset.Split(images, np.zeros(len(images), np.int32))
    # On all devices, and of few sizes, because each size is compiled.
    shared = self.mesh.size * 2 ** math.ceil(math.log2(-(-len(images) // self.mesh.size)))
    batch_size = min(self.weights.config["eval_batch_size"], shared)
    logits = evaluate.predict(self.eval_step, self.variables, split, batch_size)
    return np.asarray(jax.nn.softmax(logits))

  def score(self, split: dataset.Split) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Logits float32 (N, classes), and mean `loss` in nats and `accuracy` in [0, 1].

    Raises:
      UserError: there are no images; or a logit is not finite: the weights are those of a run that
        failed.
    """
    errors.require(len(split) > 0, "split", "no images", "one image or more")
    batch_size = self.weights.config["eval_batch_size"]
    logits, scores = evaluate.predict_and_score(self.eval_step, self.variables, split, batch_size)
    if not np.isfinite(logits).all():
      name = self.weights.config["name"]
      raise errors.UserError(f"the outputs of {name!r} are not all finite; train it again.")
    return logits, scores


def create_classifier(weights: weights_lib.Weights, *, dtype: str) -> Classifier:
  """Builds the network of `weights` for the devices that are here.

  Args:
    weights: of a run.
    dtype: a value of the config key `compute_dtype`. On CPUs float32 gives nearly the same
      probabilities everywhere, bfloat16 other last digits with other kernels; docs/gpu.md tells how
      accelerators multiply float32.

  Raises:
    UserError: the weights are of another network than their config.
  """
  dtype = config_lib.settle_dtype(dtype)
  weights = dataclasses.replace(weights, config={**weights.config, "compute_dtype": dtype})
  model, config = weights_lib.create_network(weights), weights.config
  mesh = _create_mesh(config)
  eval_step = evaluate.create_eval_step(
    model=model,
    normalize=normalize.create_normalize(weights.mean, weights.std, dtype=dtype),
    mesh=mesh,
    num_seeds=1,  # a file holds one network
  )
  variables = jax.device_put(weights.variables, mesh_lib.replicated(mesh))
  return Classifier(weights, model, mesh, variables, eval_step)


def _create_mesh(config: Mapping[str, Any]) -> jax.sharding.Mesh:
  """The run's number of devices if this machine has as many, for equal results; otherwise one."""
  available = jax.local_device_count()
  wanted = config["num_devices"] or available
  fits = wanted <= available and config["eval_batch_size"] % wanted == 0
  return mesh_lib.create_mesh(wanted if fits else 1)
