"""Network B2, `pyramid`: three blocks that widen and shrink, 48,656 parameters with batch norm.

Source: the network on which ERA V1 session 8 compared normalisations.
"""

from functools import partial

import flax.linen as nn
import jax

from flax_cifar.models.blocks import ConvHead, ConvUnit, DType, Initializer, Transition
from flax_cifar.models.norms import Norm


class Pyramid(nn.Module):
  """Two blocks of units that end in a bare 1x1 convolution and a pool; a third one and the head.

  Receptive field 44 pixels.
  """

  num_classes: int
  norm: Norm
  dropout_rate: float
  kernel_init: Initializer
  dtype: DType

  @nn.compact
  def __call__(self, images: jax.Array, train: bool) -> jax.Array:
    unit = partial(
      ConvUnit,
      norm=self.norm,
      kernel_init=self.kernel_init,
      dropout_rate=self.dropout_rate,
      dtype=self.dtype,
    )
    transition = partial(Transition, kernel_init=self.kernel_init, dtype=self.dtype)

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
    return ConvHead(self.num_classes, self.kernel_init, name="head")(x)
