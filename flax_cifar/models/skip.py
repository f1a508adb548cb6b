"""Networks E1 to E3, `skip`: two identity paths, ReLU before the norm; 48,552 parameters.

Layer norm without affine, as in E3, leaves 48,072. Source: ERA V1, session 8.
"""

import flax.linen as nn
import jax

from flax_cifar.models.blocks import ConvUnit, Network


class Skip(Network):
  """Two blocks with an identity path that end in a bare 1x1 and a pool; a third one and the head.

  Receptive field 44 pixels. The names follow the source, which counts the bare convolutions.
  """

  @nn.compact
  def __call__(self, images: jax.Array, train: bool) -> jax.Array:
    unit = self.get_unit(ConvUnit, order="conv_relu_norm")
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
