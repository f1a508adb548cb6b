"""Network B2, `pyramid`: three blocks that widen and shrink, 48,656 parameters with batch norm.

Source: the network on which ERA V1 session 8 compared normalizations.
"""

import flax.linen as nn
from jaxtyping import Array, Float, Float32

from flax_cifar.models import blocks


class Pyramid(blocks.Network):
  """Two blocks of units that end in a bare 1x1 convolution and a pool; a third block; the head.

  Receptive field 44 pixels.
  """

  @nn.compact
  def __call__(
    self, images: Float[Array, "n h w 3"], train: bool
  ) -> Float32[Array, "n {self.num_classes}"]:
    unit = self.get_unit(blocks.ConvUnit)
    transition = self.get_transition()

    x = unit(16, name="c1_1")(images, train)
    x = unit(32, name="c1_2")(x, train)
    x = transition(16, name="transition1")(x)
    x = unit(16, name="c2_1")(x, train)
    x = unit(32, name="c2_2")(x, train)
    x = unit(32, padding=0, name="c2_3")(x, train)
    x = transition(16, name="transition2")(x)
    x = unit(16, name="c3_1")(x, train)
    x = unit(32, padding=0, name="c3_2")(x, train)
    x = unit(64, padding=0, name="c3_3")(x, train)
    return self.get_head()(x)
