"""Network C2, `five_convs`: a block for each of five kinds of convolution; 436,480 parameters.

Source: EVA, session 6B. It names the kinds and their order. The blocks of two units and the widths
are ours.
"""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
from jaxtyping import Array, Float, Float32

from flax_cifar.models import blocks

BLOCKS: dict[str, tuple[Callable[..., blocks.Unit], int]] = {
  "normal": (blocks.ConvUnit, 32),
  "spatial": (blocks.SpatiallySeparableUnit, 64),
  "depthwise": (blocks.DepthwiseSeparableUnit, 96),
  "kernel_groups": (partial(blocks.GroupedUnit, kernel_sizes=(3, 5)), 128),
  "dilation_groups": (partial(blocks.GroupedUnit, dilations=(1, 2)), 128),
}
TRANSITIONS = {"normal": 32, "depthwise": 64}  # channels of the transition after the block


class FiveConvs(blocks.Network):
  """Normal, spatially and depthwise separable, grouped by size and by dilation; then the head.

  The normal convolutions are 3x3. Transitions follow the first and the third block.
  """

  @nn.compact
  def __call__(
    self, images: Float[Array, "n h w 3"], train: bool
  ) -> Float32[Array, "n {self.num_classes}"]:
    x = images
    for name, (kind, features) in BLOCKS.items():
      unit = self.get_unit(kind)
      for number in (1, 2):
        x = unit(features=features, name=f"{name}_{number}")(x, train)
      if name in TRANSITIONS:
        x = self.get_transition()(TRANSITIONS[name], name=f"{name}_transition")(x)
    return self.get_head()(x)
