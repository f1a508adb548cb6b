"""Networks E1 to E3, `skip`: two identity paths, ReLU before the norm; 48,552 parameters.

Layer norm without affine, as in E3, leaves 48,072. Source: ERA V1, session 8.
"""

import flax.linen as nn
from jaxtyping import Array, Float, Float32

from flax_cifar.models import blocks


class Skip(blocks.Network):
  """Two blocks that each have an identity path, a bare 1x1 and a pool; a third block; the head.

  Receptive field 44 pixels. The names follow the source, which counts the bare convolutions.
  """

  @nn.compact
  def __call__(
    self, images: Float[Array, "n h w 3"], train: bool
  ) -> Float32[Array, "n {self.num_classes}"]:
    unit = self.get_unit(blocks.ConvUnit, order="conv_relu_norm")
    transition = self.get_transition()

    x = unit(24, name="c1")(images, train)
    x = x + unit(24, name="c2")(x, train)
    x = transition(8, name="transition1")(x)
    x = unit(32, name="c4")(x, train)
    x = x + unit(32, name="c5")(x, train)
    x = unit(32, name="c6")(x, train)
    x = transition(8, name="transition2")(x)
    x = unit(32, name="c8")(x, train)
    x = unit(32, name="c9")(x, train)
    x = unit(32, name="c10")(x, train)
    return self.get_head()(x)
