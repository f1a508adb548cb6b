"""Network B2, `pyramid`: three blocks that widen and shrink, 48,656 parameters with batch norm.

Source: the network on which ERA V1 session 8 compared normalisations.
"""

from functools import partial

import flax.linen as nn
import jax

from flax_cifar.models.blocks import ConvHead, ConvUnit, DType, Initializer, MaxPool
from flax_cifar.models.lowering import conv_general_dilated
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
    squeeze = partial(
      nn.Conv,
      16,
      (1, 1),
      use_bias=False,
      kernel_init=self.kernel_init,
      dtype=self.dtype,
      conv_general_dilated=conv_general_dilated,
    )

    x = unit(16, name="c1_1")(images, train)
    x = unit(32, name="c1_2")(x, train)
    x = MaxPool(2, name="pool1")(squeeze(name="squeeze1")(x))
    x = unit(16, name="c2_1")(x, train)
    x = unit(32, name="c2_2")(x, train)
    x = unit(32, padding=0, name="c2_3")(x, train)
    x = MaxPool(2, name="pool2")(squeeze(name="squeeze2")(x))
    x = unit(16, name="c3_1")(x, train)
    x = unit(32, padding=0, name="c3_2")(x, train)
    x = unit(64, padding=0, name="c3_3")(x, train)
    return ConvHead(self.num_classes, self.kernel_init, name="head")(x)
