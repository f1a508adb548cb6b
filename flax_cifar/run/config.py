"""The config of a run: checks before it starts, and the keys that a resumed run may change."""

import contextlib
import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
from ml_collections import ConfigDict

from flax_cifar import errors, models
from flax_cifar import state as state_lib
from flax_cifar.configs import common
from flax_cifar.data import splits as splits_lib
from flax_cifar.data.augment import arguments
from flax_cifar.kernels import backend
from flax_cifar.parallel import mesh as mesh_lib
from flax_cifar.run import tracker

# A resumed run may change these: its results stay the same.
FREE_KEYS = (
  *("log", "checkpoint", "data.dir"),
  *("augment.workers", "steps_per_call", "num_devices", "eval_batch_size"),
)
# A longer run also goes on where the shorter one ended; its name may say how long it is.
RESUME_KEYS = (*FREE_KEYS, "total_epochs", "name")
# Keys that version 0.1.0 lacked, with the values that mean what it did. A config without them is of
# an older run; at these values they do not count in the name of a default folder.
LATER_KEYS: dict[str, Any] = {
  "augment.trivial_augment.strength": 1.0,
  "augment.trivial_augment.interpolation": "nearest",
  "augment.trivial_augment.border": "fill",
  "augment.trivial_augment.fill": "mean",
  "augment.trivial_augment.p": 1.0,
  "model.residual.activation": "relu",
  "model.residual.squeeze_excite": 0.0,
  "model.residual.drop_path": 0.0,
  "loss.distillation.teacher": "",
  "loss.distillation.weight": 0.5,
  "loss.distillation.temperature": 4.0,
  "schedule.exponential.final": 0.01,
  "mixing.ricap.alpha": 0.3,
}


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """{"optimizer.name": "sgd", ...}; tuples become lists, as in JSON.

  >>> flatten({"seed": 0, "augment": {"ops": ("rotate",), "rotate": {"p": 0.5}}})
  {'seed': 0, 'augment.ops': ['rotate'], 'augment.rotate.p': 0.5}
  """
  flat: dict[str, Any] = {}
  for key, value in config.items():
    if isinstance(value, Mapping):
      flat |= flatten(value, f"{prefix}{key}.")
    else:
      flat[prefix + key] = list(value) if isinstance(value, tuple) else value
  return flat


def without(flat: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
  """A flat config without `keys` and the keys below them."""
  return {k: v for k, v in flat.items() if not any(k == f or k.startswith(f + ".") for f in keys)}


def complete(config: Mapping[str, Any]) -> dict[str, Any]:
  """A config, perhaps of an older run, with every key of LATER_KEYS.

  >>> complete({"schedule": {"name": "cosine"}})["schedule"]
  {'name': 'cosine', 'exponential': {'final': 0.01}}

  Raises:
    UserError: a section is no dictionary, so this is the config of another program.
  """
  completed = copy.deepcopy(dict(config))
  for path, value in LATER_KEYS.items():
    *sections, key = path.split(".")
    section = completed
    for name in sections:
      section = section.setdefault(name, {})
      errors.require(isinstance(section, dict), f"config.{name}", section, "a section with keys")
    section.setdefault(key, value)
  return completed


def list_resume_keys(flat: Mapping[str, Any]) -> tuple[str, ...]:
  """The keys in which a run that goes on may differ from `flat`, the config that it began with.

  With ghost batches that are the parts of a batch on each device, results depend on the devices.
  Older runs do not tell how many these were.
  """
  guarded = _splits_by_device(flat) and flat.get("num_devices") != 0
  return tuple(key for key in RESUME_KEYS if not (guarded and key == "num_devices"))


def _splits_by_device(flat: Mapping[str, Any]) -> bool:
  return flat.get("model.norm") == "ghost" and flat.get("norm.ghost.num_splits") == 0


def get_identity(config: Mapping[str, Any]) -> dict[str, Any]:
  """The flat config without keys that change no result, and without LATER_KEYS at their values."""
  flat = without(flatten(config), FREE_KEYS)
  return {key: value for key, value in flat.items() if LATER_KEYS.get(key) != value}


def settle(config: ConfigDict) -> ConfigDict:
  """Returns a config in which no value depends on the machine any more.

  A run keeps it, so that its results can be repeated elsewhere.

  Raises:
    UserError: a key has a value that no key may have; each module checks its keys' ranges.
  """
  _check_values(config)
  settled = config.copy_and_resolve_references()
  settled.compute_dtype = settle_dtype(config.compute_dtype)
  if _splits_by_device(flatten(config.to_dict())):
    settled.num_devices = mesh_lib.create_mesh(config.num_devices, config.num_seeds).size
  return settled


def settle_dtype(name: str) -> str:
  """The type that a value of `compute_dtype` means here; a UserError if it is unknown."""
  errors.choose("compute_dtype", name, {"auto": None, **models.DTYPES})
  return backend.settle_dtype(name)


def _check_values(config: ConfigDict) -> None:
  known, given = flatten(common.get_config().to_dict()), flatten(config.to_dict())
  for problem, keys in (
    ("lacks", known.keys() - given),
    ("has unknown keys:", given.keys() - known),
  ):
    if keys:
      raise errors.UserError(
        f"the config {problem} {errors.list_some(sorted(keys))}; start from get_config() of "
        "configs/common.py, which has every key."
      )
  for key, value in given.items():
    errors.require(value is not None, key, value, "set; configs/common.py has its default")
    errors.require(not isinstance(value, float) or math.isfinite(value), key, value, "finite")
  shown = config.name.isprintable() and len(config.name) <= 100
  errors.require(shown, "name", config.name, "up to 100 printable characters")


def check_numbers(config: ConfigDict, *, has_validation: bool) -> None:
  """Raises a UserError for a number out of range that no other module checks."""
  smoothing = config.loss.label_smoothing
  epochs, most = config.total_epochs, errors.MAX_STEPS
  errors.require(0 < epochs <= most, "total_epochs", epochs, f"from 1 to {most:,}")
  tracker.check_tracker(config.log.tracker)
  errors.require(config.checkpoint.keep > 0, "checkpoint.keep", config.checkpoint.keep, "1 or more")
  errors.require(0 <= config.ema.decay < 1, "ema.decay", config.ema.decay, "at least 0 and below 1")
  errors.require(0 <= smoothing < 1, "loss.label_smoothing", smoothing, "at least 0 and below 1")
  errors.require(
    has_validation or config.schedule.name != "plateau",
    "data.validation_size",
    config.data.validation_size,
    "positive where schedule.name='plateau'",
  )


def check_progress(progress: state_lib.Progress, total_epochs: int, steps_per_epoch: int) -> None:
  """Raises a UserError unless a run can go on from `progress` to the end of `total_epochs`."""
  step, epochs = progress.step, len(progress.records)
  if not epochs * steps_per_epoch <= step <= (epochs + 1) * steps_per_epoch:
    raise errors.UserError(
      f"the run has come to step {step:,} after {epochs} epochs, which does not fit "
      f"{steps_per_epoch:,} steps an epoch: its data have changed. Restore them, or choose another "
      "--workdir."
    )
  least = math.ceil(step / steps_per_epoch)
  expected = f"{least} or more, as the run has reached step {step:,}"
  errors.require(total_epochs >= least, "total_epochs", total_epochs, expected)


def choose_normalization(
  augment: Mapping[str, Any], splits: splits_lib.Splits
) -> tuple[tuple[float, ...], tuple[float, ...]]:
  """The mean and the standard deviation of the section `augment`, or else those of the data."""
  return augment["mean"] or splits.mean, augment["std"] or splits.std


def get_feed_arguments(config: ConfigDict) -> dict[str, Any]:
  """The keyword arguments of `feeds.create_feed` that are keys of the config."""
  names = ("batch_size", "total_epochs", "steps_per_call", "seed", "num_seeds")
  return {
    **{name: config[name] for name in names},
    **{name: config.augment[name] for name in ("backend", "workers", "ops")},
    "op_arguments": {name: config.augment[name].to_dict() for name in arguments.RULES},
  }


def create_model(config: Mapping[str, Any], *, num_classes: int) -> nn.Module:
  """The network that a config, as a ConfigDict or a dict, describes; see `models.create_model`.

  Raises:
    UserError: a key of the network has a value that is unknown or out of range.
  """
  return models.create_model(
    **config["model"],
    num_classes=num_classes,
    norm_arguments=config["norm"],
    dtype=settle_dtype(config["compute_dtype"]),
  )


@contextlib.contextmanager
def explain_exhausted(config: ConfigDict) -> Iterator[None]:
  """Turns XLA's error for too little memory into a UserError that names what needs it."""
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    flat, keys = flatten(config.to_dict()), ("batch_size", "eval_batch_size", "num_seeds")
    sizes = ", ".join(f"{key}={flat[key]}" for key in (*keys, "data.image_size"))
    raise errors.UserError(
      f"the devices have too little memory for {sizes} ({errors.shorten(error)}); lower one of "
      "them, or keep the images in the memory of the host by augment.backend=albumentations. What "
      "is saved stays."
    ) from error


@contextlib.contextmanager
def explain_misfit(config: Mapping[str, Any]) -> Iterator[None]:
  """Turns a ValueError of a network, which knows no config keys, into a UserError with the keys.

  Networks are traced within it, once, before a run starts.
  """
  try:
    yield
  except errors.UserError:
    raise
  except ValueError as error:
    names = error.names if isinstance(error, errors.Misfit) else ()
    values = _list_suspects(config, names)
    change = "change one of" if len(values) > 1 else "change"
    raise errors.UserError(f"{errors.shorten(error)}; {change} {', '.join(values)}.") from error


def _list_suspects(config: Mapping[str, Any], names: tuple[str, ...]) -> list[str]:
  """`key=value` for the keys that a network depends on and that end with one of `names`.

  It lists all keys that a network depends on where `names` are those of none.
  """
  plain = config.to_dict() if isinstance(config, ConfigDict) else config
  sections = ("model", f"norm.{plain['model']['norm']}", "data.image_size", "batch_size")
  flat = flatten(plain)
  used = [key for key in flat if f"{key}.".startswith(tuple(f"{s}." for s in sections))]
  named = [key for key in used if key.rpartition(".")[2] in names]
  return [f"{key}={flat[key]!r}" for key in named or used]
