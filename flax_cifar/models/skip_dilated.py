"""Network E4, `skip_dilated`: strides, a dilated and a depthwise unit, three identity paths.

167,424 parameters with batch norm. Source: ERA V1, session 9.
"""

import flax.linen as nn
from jaxtyping import Array, Float, Float32

from flax_cifar.models import blocks


class SkipDilated(blocks.Network):
  """Three blocks that end in a strided unit instead of a pool; receptive field 47 pixels."""

  @nn.compact
  def __call__(
    self, images: Float[Array, "n h w 3"], train: bool
  ) -> Float32[Array, "n {self.num_classes}"]:
    unit = self.get_unit(blocks.ConvUnit, order="conv_relu_norm")
    squeeze = self.get_transition(pool=False)

    x = unit(32, name="c1")(images, train)
    x = x + unit(32, name="c2")(x, train)
    x = squeeze(16, name="transition1")(unit(64, stride=2, name="c3")(x, train))
    x = unit(32, dilation=2, padding=2, name="c4")(x, train)
    x = x + unit(32, groups=32, name="c5")(x, train)
    x = squeeze(32, name="transition2")(unit(64, stride=2, name="c6")(x, train))
    x = unit(64, name="c7")(x, train)
    x = x + unit(64, name="c8")(x, train)
    x = unit(96, stride=2, name="c9")(x, train)
    return self.get_head()(x)
