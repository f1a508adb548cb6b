"""The networks, by name."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from flax_cifar.errors import choose, require
from flax_cifar.models.blocks import get_init
from flax_cifar.models.dilated import Dilated
from flax_cifar.models.norms import get_norm
from flax_cifar.models.pyramid import Pyramid

MODELS: dict[str, type[nn.Module]] = {"dilated": Dilated, "pyramid": Pyramid}


def create_model(
  *,
  name: str,
  num_classes: int,
  norm: str,
  norm_arguments: Mapping[str, Mapping[str, Any]],
  dropout_rate: float,
  init: str,
) -> nn.Module:
  """Builds the network called `name`; `model.apply(variables, images_NxHxWxC, train)` -> logits.

  Raises:
    UserError: unknown name, norm or initialiser; a dropout rate outside [0, 1).
  """
  require(0 <= dropout_rate < 1, "model.dropout_rate", dropout_rate, "at least 0 and below 1")
  return choose("model.name", name, MODELS)(
    num_classes=num_classes,
    norm=get_norm(norm, norm_arguments),
    dropout_rate=dropout_rate,
    kernel_init=get_init(init),
  )
