"""The trained network in one file that runs no code: safetensors, with all it takes to use it.

The file's string metadata has one entry, `flax_cifar`: a JSON object with the version of this
format, the fields of `Weights` and the SHA-256 of the file. One entry, because safetensors writes
several in random order, and the same network should be the same bytes.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import traverse_util

from flax_cifar import errors, files
from flax_cifar import state as state_lib
from flax_cifar.run import config as config_lib

KEY = "flax_cifar"
VERSION = 1
NO_DIGEST = "0" * 64  # stands for the SHA-256 while it is taken


@dataclasses.dataclass(frozen=True)
class Weights:
  """The content of a file: a network and how to use it.

  Attributes:
    variables: nested dicts of numpy arrays: `params` and, unless empty, `batch_stats`.
    config: every key of the run; tuples have become lists.
    class_names: by label.
    image_shape: (H, W, C).
    mean: per channel; the network takes (uint8 / 255 - mean) / std.
    std: per channel, in the same units of [0, 1].
    data: fingerprint of the data, see `splits.Splits.fingerprint`; empty in older files.
  """

  variables: dict[str, Any] = dataclasses.field(repr=False)
  config: dict[str, Any] = dataclasses.field(repr=False)
  class_names: tuple[str, ...]
  image_shape: tuple[int, int, int]
  mean: tuple[float, ...]
  std: tuple[float, ...]
  data: dict[str, Any] = dataclasses.field(default_factory=dict)


def save_weights(
  path: pathlib.Path,
  variables: Mapping[str, Any],
  *,
  config: Mapping[str, Any],
  class_names: Sequence[str],
  image_shape: tuple[int, int, int],
  mean: Sequence[float],
  std: Sequence[float],
  data: Mapping[str, Any],
) -> None:
  """Writes one network to `path`, whole or not at all; see `Weights` for the arguments.

  Args:
    variables: of one seed; on any device.

  Raises:
    UserError: a variable is not finite, or the file cannot be written.
  """
  leaves = state_lib.name_leaves(jax.device_get(variables))
  # In C order: safetensors writes the memory of an array, whatever its strides.
  tensors = {name: np.asarray(array, order="C") for name, array in leaves.items()}
  _check_finite(tensors, where="the network")
  content = {
    "sha256": NO_DIGEST,  # first, so that nothing like it can precede it
    "format_version": VERSION,
    "config": config,
    "class_names": class_names,
    "image_shape": image_shape,
    "mean": mean,
    "std": std,
    "data": data,
  }
  blob = safetensors.numpy.save(tensors, metadata={KEY: json.dumps(content)})
  try:
    files.write_bytes(path, blob.replace(NO_DIGEST.encode(), _digest(blob).encode(), 1))
  except OSError as error:
    raise errors.UserError(
      f"{str(path)!r} cannot be written ({error.strerror}); make room, or the folder writable."
    ) from error


def load_weights(path: pathlib.Path) -> Weights:
  """Reads what `save_weights` wrote.

  Raises:
    UserError: missing, damaged (a single byte is noticed), from another program or another version
      of this one, or not finite.
  """
  blob = _read(path)
  try:
    tensors = safetensors.numpy.load(blob)
    length = int.from_bytes(blob[:8], "little")  # of the header, which is JSON
    metadata = json.loads(blob[8 : 8 + length]).get("__metadata__", {})
  except Exception as error:  # damaged bytes may raise anything
    raise _damaged(path, error) from error
  if KEY not in metadata:
    raise errors.UserError(
      f"{str(path)!r} was written by another program: it lacks metadata {KEY!r}."
    )
  try:
    content = json.loads(metadata[KEY])
    version, digest = content["format_version"], content["sha256"]
    whole = _digest(blob.replace(digest.encode(), NO_DIGEST.encode(), 1)) == digest
  except Exception as error:
    raise _damaged(path, f"{type(error).__name__}: {error}") from error
  if version != VERSION:
    raise errors.UserError(
      f"{str(path)!r} has format version {version!r}, this program reads version {VERSION}; use "
      "the commit that wrote it."
    )
  if not whole:
    raise _damaged(path, "its SHA-256 is not what it was")
  _check_finite(tensors, where=repr(str(path)))
  try:
    return _create(tensors, content)
  except Exception as error:  # a file made by hand may hold anything
    raise _damaged(path, f"{type(error).__name__}: {error}") from error


def _create(tensors: dict[str, np.ndarray], content: dict[str, Any]) -> Weights:
  height, width, channels = (int(size) for size in content["image_shape"])
  return Weights(
    variables=traverse_util.unflatten_dict(tensors, sep="/"),
    config=config_lib.complete(content["config"]),
    class_names=tuple(str(name) for name in content["class_names"]),
    image_shape=(height, width, channels),
    mean=tuple(float(value) for value in content["mean"]),
    std=tuple(float(value) for value in content["std"]),
    data=dict(content.get("data", {})),
  )


def create_network(weights: Weights) -> nn.Module:
  """The network that `weights` are of, built by their config.

  Raises:
    UserError: the config is of no network of this program, or of another than the variables.
  """
  config = weights.config
  try:
    model = config_lib.create_model(config, num_classes=len(weights.class_names))
    check_network(weights.variables, model, weights.image_shape)
  except errors.UserError:
    raise
  except Exception as error:  # Flax and JAX raise what arguments of a wrong type lead to
    raise errors.UserError(
      f"the config in the weights builds no network here ({type(error).__name__}: {error}); use "
      "the commit that wrote them."
    ) from error
  return model


def check_network(
  variables: Mapping[str, Any], model: nn.Module, image_shape: tuple[int, int, int]
) -> None:
  """Raises a UserError that names what differs unless `variables` are those of `model`."""
  init = functools.partial(model.init, train=False)
  images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
  expected = jax.eval_shape(init, jax.random.key(0), images)
  mismatches = errors.list_differences(_describe(variables), _describe(expected))
  if mismatches:
    raise errors.UserError(
      f"the weights are of another network: {'; '.join(mismatches[:3])} ({len(mismatches)} differ)."
    )


def _describe(variables: Mapping[str, Any]) -> dict[str, str]:
  """{"params/head/conv/kernel": "float32 (1, 1, 6, 3)", ...}"""
  leaves = state_lib.name_leaves(variables)
  return {name: f"{array.dtype} {array.shape}" for name, array in leaves.items()}


def _check_finite(tensors: Mapping[str, np.ndarray], *, where: str) -> None:
  bad = [name for name, array in tensors.items() if not np.isfinite(array).all()]
  if bad:
    raise errors.UserError(
      f"{where} has values that are not finite, first in {bad[0]!r} ({len(bad)} of {len(tensors)} "
      "variables); its training has diverged."
    )


def _digest(blob: bytes) -> str:
  return hashlib.sha256(blob).hexdigest()


def _read(path: pathlib.Path) -> bytes:
  try:
    return path.read_bytes()
  except FileNotFoundError as error:
    raise errors.UserError(
      f"{str(path)!r} does not exist; a finished run has weights.safetensors in its folder."
    ) from error
  except OSError as error:
    raise errors.UserError(f"{str(path)!r} cannot be read ({error.strerror}).") from error


def _damaged(path: pathlib.Path, reason: object) -> errors.UserError:
  short = errors.shorten(reason)
  return errors.UserError(f"{str(path)!r} is damaged or no weights file ({short}); copy it again.")
