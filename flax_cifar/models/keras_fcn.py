"""Network C1, `keras_fcn`: `keras_base` without its dense layers; 250,080 parameters.

Source: EVA, session 6A, after its improvements. It gives no layer table. It names blocks of growing
width, transitions, batch norm and a global average pool; the widths are ours.
"""

import flax.linen as nn
from jaxtyping import Array, Float, Float32

from flax_cifar.models import blocks


class KerasFCN(blocks.Network):
  """Three blocks of two units with transitions between them, then the head."""

  @nn.compact
  def __call__(
    self, images: Float[Array, "n h w 3"], train: bool
  ) -> Float32[Array, "n {self.num_classes}"]:
    unit = self.get_unit(blocks.ConvUnit)
    transition = self.get_transition()

    x = unit(32, name="c1_1")(images, train)
    x = unit(32, name="c1_2")(x, train)
    x = transition(24, name="transition1")(x)
    x = unit(64, name="c2_1")(x, train)
    x = unit(64, name="c2_2")(x, train)
    x = transition(32, name="transition2")(x)
    x = unit(128, name="c3_1")(x, train)
    x = unit(128, name="c3_2")(x, train)
    return self.get_head()(x)
