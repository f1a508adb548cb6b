"""The networks by name, with the values of the config keys that choose them."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from flax_cifar import errors
from flax_cifar.models import (
  blocks,
  dilated,
  five_convs,
  ghost,
  keras_base,
  keras_fcn,
  norms,
  pyramid,
  skip,
  skip_dilated,
  tiny,
  wide,
)

MODELS: dict[str, Callable[..., nn.Module]] = {
  "dilated": dilated.Dilated,
  "pyramid": pyramid.Pyramid,
  "keras_base": keras_base.KerasBase,
  "keras_fcn": keras_fcn.KerasFCN,
  "five_convs": five_convs.FiveConvs,
  "ghost": ghost.Ghost,
  "skip": skip.Skip,
  "skip_dilated": skip_dilated.SkipDilated,
  "sprint": partial(wide.Wide, whitens=True),
  "sprint_wide": partial(wide.Wide, widths=(64, 256, 256), whitens=True),
  "tiny50k": tiny.Tiny,
  "tiny100k": partial(tiny.Tiny, widths=(48, 64, 96)),
  "tiny200k": partial(tiny.Tiny, widths=(64, 96, 128), units=(3, 4, 6)),
  "tiny700k": partial(tiny.Tiny, widths=(96, 192, 256), units=(3, 4, 6)),
  "wide": wide.Wide,
}
# Those that take model.residual.
RESIDUAL = tuple(n for n, model in MODELS.items() if getattr(model, "func", model) is tiny.Tiny)
DTYPES: dict[str, blocks.DType] = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def create_model(
  *,
  name: str,
  num_classes: int,
  norm: str,
  norm_arguments: Mapping[str, Mapping[str, Any]],
  dropout_rate: float,
  init: str,
  residual: Mapping[str, Any],
  dtype: str,
) -> nn.Module:
  """Builds the network called `name`.

  `model.apply(variables, images, train)` with images (N, H, W, C) returns logits (N, classes). The
  convolutions compute in `dtype`; parameters, statistics and logits are float32.

  Raises:
    UserError: unknown name, norm, initializer, activation or dtype; a rate, momentum or epsilon out
      of range; or options of residual units for a network that has none.
  """
  errors.require(
    0 <= dropout_rate < 1, "model.dropout_rate", dropout_rate, "at least 0 and below 1"
  )
  return errors.choose("model.name", name, MODELS)(
    num_classes=num_classes,
    norm=get_norm(norm, norm_arguments),
    dropout_rate=dropout_rate,
    kernel_init=get_init(init),
    dtype=errors.choose("compute_dtype", dtype, DTYPES),
    **get_residual_options(name, **residual),
  )


def get_residual_options(
  name: str, *, activation: str, squeeze_excite: float, drop_path: float
) -> dict[str, Any]:
  """The attributes for the residual units of the network `name`; {} where it has none.

  Raises:
    UserError: a value is unknown or out of range, or the network has no residual units to take it.
  """
  errors.choose("model.residual.activation", activation, blocks.ACTIVATIONS)
  fits, expected = 0 <= squeeze_excite <= 1, "a fraction in [0, 1]"
  errors.require(fits, "model.residual.squeeze_excite", squeeze_excite, expected)
  expected = "at least 0 and below 1"
  errors.require(0 <= drop_path < 1, "model.residual.drop_path", drop_path, expected)
  options = {"activation": activation, "squeeze_excite": squeeze_excite, "drop_path": drop_path}
  if name in RESIDUAL:
    return options
  for key, value in options.items():
    only = "relu" if key == "activation" else 0.0
    expected = f"{only!r} for model.name={name!r}; {', '.join(RESIDUAL)} have residual units"
    errors.require(value == only, f"model.residual.{key}", value, expected)
  return {}


def get_init(name: str) -> blocks.Initializer:
  """Returns the kernel initializer called `name`; a UserError if there is none."""
  return errors.choose("model.init", name, blocks.INITS)


def get_norm(name: str, arguments: Mapping[str, Mapping[str, Any]]) -> norms.Norm:
  """Returns the norm called `name`, with `arguments[name]` as its attributes.

  The norm itself checks the attributes whose range depends on the layer.

  Raises:
    UserError: `name` is not in NORMS, or a momentum or epsilon is out of range.
  """
  norm = errors.choose("model.norm", name, norms.NORMS)
  for key, value in arguments[name].items():
    if key == "momentum":
      errors.require(0 <= value < 1, f"norm.{name}.momentum", value, "at least 0 and below 1")
    if key == "epsilon":
      errors.check_epsilon(f"norm.{name}.epsilon", value)
  return partial(norm, **arguments[name])
