"""The networks, by name."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from flax_cifar.errors import choose, require
from flax_cifar.models.blocks import DType, get_init
from flax_cifar.models.dilated import Dilated
from flax_cifar.models.five_convs import FiveConvs
from flax_cifar.models.ghost import Ghost
from flax_cifar.models.keras_base import KerasBase
from flax_cifar.models.keras_fcn import KerasFCN
from flax_cifar.models.norms import get_norm
from flax_cifar.models.pyramid import Pyramid
from flax_cifar.models.skip import Skip
from flax_cifar.models.skip_dilated import SkipDilated

MODELS: dict[str, type[nn.Module]] = {
  "dilated": Dilated,
  "pyramid": Pyramid,
  "keras_base": KerasBase,
  "keras_fcn": KerasFCN,
  "five_convs": FiveConvs,
  "ghost": Ghost,
  "skip": Skip,
  "skip_dilated": SkipDilated,
}
DTYPES: dict[str, DType] = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def create_model(
  *,
  name: str,
  num_classes: int,
  norm: str,
  norm_arguments: Mapping[str, Mapping[str, Any]],
  dropout_rate: float,
  init: str,
  dtype: str,
) -> nn.Module:
  """Builds the network called `name`; `model.apply(variables, images_NxHxWxC, train)` -> logits.

  Its convolutions compute in `dtype`; parameters, statistics and logits are float32.

  Raises:
    UserError: unknown name, norm, initialiser or dtype; a dropout rate outside [0, 1).
  """
  require(0 <= dropout_rate < 1, "model.dropout_rate", dropout_rate, "at least 0 and below 1")
  return choose("model.name", name, MODELS)(
    num_classes=num_classes,
    norm=get_norm(norm, norm_arguments),
    dropout_rate=dropout_rate,
    kernel_init=get_init(init),
    dtype=choose("compute_dtype", dtype, DTYPES),
  )
