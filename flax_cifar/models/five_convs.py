"""Network C2, `five_convs`: a block of each of five kinds of convolution; 436,480 parameters.

Source: EVA, session 6B. It names the kinds and their order; blocks of two units and the widths are
ours.
"""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax

from flax_cifar.models.blocks import (
  ConvUnit,
  DepthwiseSeparableUnit,
  GroupedUnit,
  Network,
  SpatiallySeparableUnit,
  Unit,
)

BLOCKS: dict[str, tuple[Callable[..., Unit], int]] = {
  "normal": (ConvUnit, 32),
  "spatial": (SpatiallySeparableUnit, 64),
  "depthwise": (DepthwiseSeparableUnit, 96),
  "kernel_groups": (partial(GroupedUnit, kernel_sizes=(3, 5)), 128),
  "dilation_groups": (partial(GroupedUnit, dilations=(1, 2)), 128),
}
TRANSITIONS = {"normal": 32, "depthwise": 64}  # channels of the one that follows the block


class FiveConvs(Network):
  """Normal 3x3, spatially separable, depthwise separable, grouped by size and by dilation; head.

  Transitions follow the first and the third block.
  """

  @nn.compact
  def __call__(self, images: jax.Array, train: bool) -> jax.Array:
    x = images
    for name, (kind, features) in BLOCKS.items():
      unit = self.get_unit(kind)
      for number in (1, 2):
        x = unit(features=features, name=f"{name}_{number}")(x, train)
      if name in TRANSITIONS:
        x = self.get_transition()(TRANSITIONS[name], name=f"{name}_transition")(x)
    return self.get_head()(x)
