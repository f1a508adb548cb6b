"""Variants: the comma-separated parts after the colon of `--config=configs/NAME.py:PART,PART`.

A config file names its own recipes in its header. The first one, ours, needs no name; `published`
replays the source, trains on its whole training split and validates on the test split, as it did.
All files share the other parts, which combine with any recipe:

full        trains on every training image and holds none out: for the last run
trial       scores validation images only and never reads the test split: for choosing a recipe
smoke       trains two short epochs on a slice of the data, and writes every file of a run
norm=NAME   uses another norm: batch, layer, group, ghost or none
seed=N      uses another seed
epochs=N    trains for another number of epochs
lr=R        uses another peak learning rate

Each part is added to the run's name: `configs/s9.py:norm=group,seed=1` is named
`s9-norm-group-seed-1`.
"""

import operator
from collections.abc import Callable, Mapping

from ml_collections import ConfigDict

# The keys that a variant can set; --config.KEY=VALUE sets any other.
SHORT_KEYS = {
  "norm": "model.norm",
  "seed": "seed",
  "epochs": "total_epochs",
  "lr": "optimizer.learning_rate",
}

Recipe = Callable[[ConfigDict], None]  # changes a config in place
Settings = dict[str, str]  # short keys and their values, as in a variant


def format_settings(settings: Mapping[str, str]) -> str:
  """The variant that sets `settings`.

  >>> format_settings({"norm": "layer", "seed": "1"})
  'norm=layer,seed=1'
  """
  return ",".join(f"{key}={value}" for key, value in settings.items())


def apply_arg(config: ConfigDict, arg: str, recipes: Mapping[str, Recipe]) -> ConfigDict:
  """Applies the variant `arg` of `--config=FILE:arg` to `config`, and returns it.

  The norm is set first, because the recipe may depend on it; then the recipe; then the other parts,
  in order, those with a value after those without.

  Args:
    config: names the network; changed in place, and the parts are added to its name.
    arg: comma-separated; each part is a key of `recipes` or CHANGES, or `key=value` with a key
      of SHORT_KEYS.
    recipes: name -> recipe; the first one is the default.

  Raises:
    ValueError: an unknown part, a second recipe, or a part that is there twice; the message quotes
      it and lists the choices.
  """
  parts = [part for part in arg.split(",") if part]
  named = [part for part in parts if part in recipes]
  if len(named) > 1:
    raise ValueError(f"{named[0]!r} and {named[1]!r} are both recipes; choose one.")
  keys = [part.partition("=")[0] for part in parts]
  if twice := [part for part, key in zip(parts, keys, strict=True) if keys.count(key) > 1]:
    raise ValueError(f"{' and '.join(map(repr, twice))} set the same; choose one.")
  for part in parts:
    if part.startswith("norm="):
      _set(config, part, recipes)
  recipe = named[0] if named else next(iter(recipes))
  recipes[recipe](config)
  for part in sorted(parts, key=lambda part: "=" in part):
    if part in CHANGES:
      CHANGES[part](config)
    elif part not in recipes:
      _set(config, part, recipes)
  config.name = "-".join([config.name, *(part.replace("=", "-") for part in parts)])
  return config


def _set(config: ConfigDict, part: str, recipes: Mapping[str, Recipe]) -> None:
  key, _, value = part.partition("=")
  if not value or key not in SHORT_KEYS:
    choices = [*recipes, *CHANGES, *(f"{key}=VALUE" for key in SHORT_KEYS)]
    raise ValueError(f"config variant {part!r} is unknown; choose from {', '.join(choices)}.")
  path = SHORT_KEYS[key]
  kind = type(operator.attrgetter(path)(config))
  try:
    config.update_from_flattened_dict({path: kind(value)})
  except ValueError:
    raise ValueError(f"config variant {part!r} needs a value of type {kind.__name__}.") from None


def _shorten(config: ConfigDict) -> None:
  """Trains two short epochs on a slice of the data, end to end."""
  config.total_epochs = 2
  config.data.limit = 512
  config.data.validation_size = min(config.data.validation_size, 1000)
  config.batch_size = 64


def _take_all(config: ConfigDict) -> None:
  """Trains on every training image; no image is left to validate on."""
  config.data.validation_size = 0


def _leave_test_alone(config: ConfigDict) -> None:
  """Scores validation images only."""
  config.protocol = "trial"


CHANGES: dict[str, Recipe] = {"smoke": _shorten, "full": _take_all, "trial": _leave_test_alone}
